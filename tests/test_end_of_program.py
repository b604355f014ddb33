"""However a program ends: what was promised is on the disk, or the end is loud and not zero."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import endings
import lastgood
from lastgood import catalog, generation

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the programs are forked")

SAVED = {
    # By program: its exit code, the steps on the disk, and words on its standard error.
    "never_closed": (0, [1], "saved step 1"),
    "never_closed_and_slow": (0, [1], "saved step 1"),
    "dropped": (0, [1], "saved step 1"),
    "an_exception": (1, [1], "RuntimeError: of the program itself"),
    "exception_without_with": (1, [1], "RuntimeError: of the program itself"),
    "exit_3": (3, [1], "saved step 1"),
    "exit_0_inside": (0, [1], "saved step 1"),
    "interrupted": (-2, [1], "KeyboardInterrupt"),
    "from_a_daemon_thread": (0, [1], "saved step 1"),
    "failed_at_the_end": (74, [], "the program ends, and its last save failed: step 1"),
    "failed_and_exit_0": (74, [], "the program ends, and its last save failed: step 1"),
    "failed_and_exit_0_inside": (1, [], "SaveError: step 1 was not saved"),
    "failed_and_closed": (1, [], "SaveError: step 1 was not saved"),
    "failed_and_exception": (1, [], "step 1 was not saved"),
    "failed_and_seen": (0, [], "seen"),
    "failed_then_saved": (0, [2], "step 1 was not saved"),
    "forked_child_ends": (0, [1, 2], "child 0"),
    "hung_and_never_closed": (74, [1], "the program ends, and its last save failed: waited"),
    "hung_and_closed": (74, [1], "SaveError: waited"),
    "hung_and_caught": (74, [1], "caught waited"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("endings")
    done = subprocess.run([sys.executable, endings.__file__, directory], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory


def test_every_ending_is_looked_at() -> None:
    assert {ending.__name__ for ending in endings.ENDINGS} == set(SAVED)


@pytest.mark.parametrize("name", SAVED)
def test_what_was_promised_is_kept_or_missed_loudly(ended: Path, name: str) -> None:
    code, steps, words = SAVED[name]
    said = (ended / f"{name}.err").read_text()
    assert json.loads((ended / "statuses.json").read_text())[name] == code, said
    assert [entry.step for entry in catalog.committed(ended / name)] == steps
    assert words in said
    for entry in catalog.committed(ended / name):
        catalog.check_full(entry)
    # The run was given back: the next job need not wait. But a thread that hangs could still have written to it.
    (number,) = generation.generations(ended / name)
    assert (ended / name / "generations" / f"{number:08d}.end").exists() == (not name.startswith("hung"))


@pytest.mark.parametrize("name", [name for name in SAVED if name.startswith("hung")])
def test_a_disk_that_hangs_is_spoken_of_and_given_up(ended: Path, name: str) -> None:
    said = (ended / f"{name}.err").read_text()
    assert "waiting since 0 s for the save of step 2 to be written" in said and "at most 2 s (10 deadlines)" in said
    assert "The last good checkpoint is step-00000001; nothing of it is touched" in said
    with lastgood.Checkpointer(ended / name, w=torch.zeros(1000)) as ckpt:
        assert ckpt.restore() == 1


def test_a_failed_last_save_says_why_and_leaves_nothing(ended: Path) -> None:
    said = (ended / "failed_at_the_end.err").read_text()
    assert "No space left on device" in said and "untouched" in said
    assert catalog.entries(ended / "failed_at_the_end") == []
