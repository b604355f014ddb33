"""Unmodified programs, killed at every file operation: with `lastgood run` they all continue from the newest state."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from campaigns import CAMPAIGNS, crash, lost

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs fork")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory on another file system than the test's."""
    try:
        directory = tempfile.mkdtemp(prefix="lastgood-test-", dir="/dev/shm")
    except OSError:
        pytest.skip("there is no /dev/shm")
    yield Path(directory)
    subprocess.run(["rm", "-rf", directory], check=True)


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_a_killed_program_goes_on_from_the_newest_state(name: str, memory: Path, tmp_path: Path) -> None:
    """A few points: `python -m tests.intercept` takes them all."""
    campaign = CAMPAIGNS[name]
    for module in set(campaign.preload.split(",")) - {"torch"}:
        pytest.importorskip(module)
    results, output = crash(campaign, memory, tmp_path, stride=campaign.quick)
    assert sum(result["killed"] for result in results) >= 2
    assert not lost(results), output
    assert not any(results[-1]["codes"]), output
    assert "could not remove" not in output


def test_a_script_loses_its_only_file_without_us(memory: Path, tmp_path: Path) -> None:
    assert lost(crash(CAMPAIGNS["naive-torn"], memory, tmp_path, stride=1, protected=False)[0])


def test_gpt_sovits_loses_its_state_without_us(memory: Path, tmp_path: Path) -> None:
    assert lost(crash(CAMPAIGNS["sovits-torn"], memory, tmp_path, stride=1, protected=False)[0])


def test_another_end_than_the_undisturbed_one_counts_as_lost(memory: Path, tmp_path: Path) -> None:
    """The check itself: a program that forgets its optimizer goes on from the right step to a wrong end."""
    forgetful = replace(CAMPAIGNS["naive-before"], program="forgetful.py")
    results, _ = crash(forgetful, memory, tmp_path, stride=9)
    assert lost(results)
