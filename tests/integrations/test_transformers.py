"""Hugging Face's Trainer through lastgood: the same weights after a kill, and nothing loaded that is not whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import Rank, at_operation, die, run_ranks

pytest.importorskip("transformers")

import transformers_trainer
from transformers import TrainerCallback

from lastgood import DamagedError, LastGoodError
from lastgood.integrations import transformers as sealed
from lastgood.integrations.transformers import last_good

pytestmark = pytest.mark.filterwarnings("ignore")


class DieAt(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            die()


def train(rank: Rank, run: Path, callbacks: Any = ()) -> Any:
    if rank.size > 1:
        place = {"RANK": rank.rank, "LOCAL_RANK": rank.rank, "WORLD_SIZE": rank.size, "LOCAL_WORLD_SIZE": rank.size}
        more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
        os.environ.update({name: str(value) for name, value in {**place, **more}.items()})
        rank.group()
    trainer = transformers_trainer.train(str(run), 12, 2, callbacks)
    return [p.detach().clone() for p in trainer.model.parameters()], trainer.state.global_step


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if "checkpoint-" in path.name)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("size", "death"), [(1, "step"), (2, "step"), (2, "seal"), (2, "damage")])
def test_a_killed_trainer_ends_with_the_same_bits(tmp_path: Path, size: int, death: str) -> None:
    """Dropout and shuffling are on: random states and the place in the data must be the same, too."""
    whole = run_ranks(size, lambda rank: train(rank, tmp_path / "whole"), tmp_path / "a")

    def killed(rank: Rank) -> Any:
        if death == "seal" and rank.rank == 0:
            at_operation("replace", "before", "checkpoint-8/lastgood.json", die)
        return train(rank, tmp_path / "run", [] if death == "seal" else [DieAt(9)])

    ended = run_ranks(size, killed, tmp_path / "b", wait_for=[0])
    assert ended[0].code == -9
    if death == "damage":
        flip(tmp_path / "run" / "checkpoint-8" / "optimizer.pt")
    expected = 8 if death == "step" else 6
    resumed = run_ranks(size, lambda rank: train(rank, tmp_path / "run"), tmp_path / "c")
    for before, after in zip(whole, resumed, strict=True):
        assert before.ok()[1] == after.ok()[1] == 12
        assert all(torch.equal(a, b) for a, b in zip(before.ok()[0], after.ok()[0], strict=True))
    assert resumed[0].logged(f"going on from {tmp_path}/run/checkpoint-{expected}")
    assert ("old-checkpoint-8-0" in names(tmp_path / "run")) == (expected == 6)
    assert last_good(tmp_path / "run") == tmp_path / "run" / "checkpoint-12"


def test_where_no_checkpoint_verifies_the_training_does_not_start_afresh(tmp_path: Path) -> None:
    run_ranks(1, lambda rank: train(rank, tmp_path / "run"), tmp_path / "a")[0].ok()
    for path in (tmp_path / "run").glob("checkpoint-*/model.safetensors"):
        flip(path)
    (ended,) = run_ranks(1, lambda rank: train(rank, tmp_path / "run"), tmp_path / "b")
    with pytest.raises(DamagedError, match=r"no checkpoint in .* verifies"):
        ended.ok()
    assert names(tmp_path / "run") == ["checkpoint-10", "checkpoint-12", "checkpoint-8"]


def test_checkpoints_of_a_plain_trainer_are_neither_used_nor_moved(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-4").mkdir(parents=True)
    (ended,) = run_ranks(1, lambda rank: train(rank, tmp_path / "run"), tmp_path / "b")
    with pytest.raises(LastGoodError, match="saved without seals"):
        ended.ok()
    assert names(tmp_path / "run") == ["checkpoint-4"]


def test_what_a_killed_first_save_left_is_set_aside(tmp_path: Path) -> None:
    def killed(rank: Rank) -> Any:
        at_operation("replace", "before", "checkpoint-2/lastgood.json", die)
        return train(rank, tmp_path / "run")

    assert run_ranks(1, killed, tmp_path / "a")[0].code == -9
    assert run_ranks(1, lambda rank: train(rank, tmp_path / "run"), tmp_path / "b")[0].ok()[1] == 12
    assert "old-checkpoint-2-0" in names(tmp_path / "run")


def test_a_checkpoint_that_cannot_be_sealed_does_not_count_and_does_not_stop_the_training(tmp_path: Path) -> None:
    def main(rank: Rank) -> Any:
        def full() -> None:
            raise OSError(28, "No space left on device")

        at_operation("sync", "before", "checkpoint-12/optimizer.pt", full)
        return train(rank, tmp_path / "run")

    (ended,) = run_ranks(1, main, tmp_path / "a")
    assert ended.ok()[1] == 12
    assert ended.logged("could not be sealed")
    assert last_good(tmp_path / "run") == tmp_path / "run" / "checkpoint-10"


def test_a_checkpoint_that_was_looked_at_on_macos_is_not_called_damaged(tmp_path: Path) -> None:
    """Finder writes its view of a directory whenever it likes; ._ files stay behind where a directory is copied to."""
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "parts").mkdir(parents=True)
    for name in ("model.safetensors", "parts/a.bin", ".DS_Store", "parts/._a.bin"):
        (checkpoint / name).write_bytes(b"as it was saved")
    sealed._seal(checkpoint)
    assert "._" not in (record := (checkpoint / "lastgood.json").read_text()) and ".DS_Store" not in record
    (checkpoint / ".DS_Store").write_bytes(b"looked at again")
    (checkpoint / "parts" / "._a.bin").unlink()
    assert sealed._damage(checkpoint) is None and last_good(tmp_path) == checkpoint
    (checkpoint / "parts" / "a.bin").write_bytes(b"as it was not..")
    assert "parts/a.bin was altered" in str(sealed._damage(checkpoint))


def test_a_record_that_names_files_of_macos_is_still_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    for name in ("model.safetensors", ".DS_Store"):
        (checkpoint / name).write_bytes(b"as it was saved")
    with monkeypatch.context() as patch:
        patch.setattr(sealed.files, "is_of_macos", lambda name: False)
        sealed._seal(checkpoint)
    (checkpoint / ".DS_Store").write_bytes(b"looked at")
    assert sealed._damage(checkpoint) is None
