"""Hundreds of saves with random kills: nothing grows, nothing is left behind, and who looks finds what is promised."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.faults import soak
from tests.faults.test_crash import campaign, in_fork

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL; Windows has its own campaign"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc of Linux"),
    pytest.mark.timeout(900),
]


def test_hundreds_of_saves_with_random_kills() -> None:
    assert "0 failed" in campaign("soak", "--saves", "200")


LEAKS = {
    "descriptors": "kept.append(open('/dev/null'))",
    "threads": "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
    "memory": "kept.append(bytearray(range(256)) * 1000)",
}


@pytest.mark.parametrize("what", LEAKS)
def test_a_leak_is_noticed(what: str) -> None:
    printed = in_fork(
        "import threading, time",
        "from tests.faults import soak",
        "soak.jobs.limit_threads()",
        "kept = []",
        "with soak.scratch() as directory:",
        "    found = soak.Soak(directory)",
        f"    found.life(250, None, lambda: {LEAKS[what]})",
        "print(found.problems)",
    )
    assert f"{what} grew by" in printed


def test_a_policy_that_is_not_kept_is_noticed() -> None:
    printed = in_fork(
        "from tests.faults import soak",
        "from lastgood import catalog",
        "soak.jobs.limit_threads()",
        "catalog.delete = lambda entry, **options: None",
        "with soak.scratch() as directory:",
        "    found = soak.Soak(directory)",
        "    found.life(8, None)",
        "print(found.watcher.problems)",
    )
    assert "checkpoints at once" in printed


@pytest.mark.parametrize(("steps", "noticed"), [([], False), ([90], False), ([60, 120], True), ([50, 100, 150], True)])
def test_only_one_step_of_memory_is_forgiven(tmp_path: Path, steps: list[int], noticed: bool) -> None:
    """Python's table of interned strings grows once, if at all."""
    samples = [
        {
            "memory": (200 << 20) + (7 << 20) * sum(n >= step for step in steps),
            "descriptors": 9,
            "threads": 4,
            "where": {},
        }
        for n in range(200)
    ]
    found = soak.Soak(tmp_path)
    found._measure("life 1", samples)
    assert bool(found.problems) == noticed
