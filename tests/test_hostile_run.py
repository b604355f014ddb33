"""What somebody, or a broken disk, put in the place of the files that say who holds a run."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lastgood
from lastgood import Checkpointer, generation, torchfile
from lastgood.errors import DamagedError, LastGoodError


def make_run(run: Path) -> None:
    with Checkpointer(run, state={"w": torch.ones(3)}) as ckpt:
        ckpt.save(1, blocking=True)


def a_directory(lock: Path) -> None:
    lock.mkdir()


def a_loop(lock: Path) -> None:
    lock.symlink_to(lock)


def a_pipe(lock: Path) -> None:
    os.mkfifo(lock)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX: links and pipes")
@pytest.mark.parametrize("replace", [a_directory, a_loop, a_pipe])
def test_a_lock_that_is_no_file_is_named(tmp_path: Path, replace: Callable[[Path], None]) -> None:
    run = tmp_path / "run"
    make_run(run)
    (run / "lock").unlink()
    replace(run / "lock")
    with pytest.raises(LastGoodError, match=r"lock cannot be locked .* delete it while no job uses the run"):
        Checkpointer(run, state={"w": torch.ones(3)})


@pytest.mark.parametrize(
    "content", ["5", "[]", "[" * 100_000, '{"a":' * 100_000, '{"started": "x", "machine": 5}', '{"started": 1e300}']
)
def test_a_record_that_is_no_record_is_a_job_of_which_nothing_is_known(tmp_path: Path, content: str) -> None:
    run = tmp_path / "run"
    make_run(run)
    numbers = generation.generations(run)
    (run / "generations" / f"{numbers[-1]:08d}.end").unlink()
    (run / "generations" / f"{numbers[-1]:08d}.json").write_text(content)
    state = {"w": torch.zeros(3)}
    with Checkpointer(run, state=state, stale=0.2) as ckpt:
        assert ckpt.restore() == 1
    assert state["w"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("content", ["5", '{"started": "x"}', '{"started": 1e300, "pid": {}}'])
def test_the_message_about_a_holder_can_be_made_of_any_record(tmp_path: Path, content: str) -> None:
    run = tmp_path / "run"
    make_run(run)
    with Checkpointer(run, state={"w": torch.ones(3)}) as ckpt:
        ckpt.restore()
        path = run / "generations" / f"{ckpt.generation:08d}.json"
        before = path.read_bytes()
        path.write_text(content)
        assert "is held by" in generation._held(run, generation.record(run, ckpt.generation))
        path.write_bytes(before)


def test_a_safetensors_file_whose_names_are_no_text_is_refused(tmp_path: Path) -> None:
    header = rb'{"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(DamagedError):
        lastgood.load(path)
    with pytest.raises(DamagedError):
        torchfile.read(path)
    assert torchfile.verify(path)
