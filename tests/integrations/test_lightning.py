"""Lightning through lastgood: the same weights after a kill, and .ckpt files that are whole or refused."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import Rank, checkpoints, die, run_ranks

lightning = pytest.importorskip("lightning")

import lightning_ddp  # noqa: E402

from lastgood import DamagedError, LastGoodError, RefusedError, disk  # noqa: E402
from lastgood.integrations.lightning import LastGood, LastGoodCheckpointIO  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class DieAt(lightning.Callback):
    """Kills its rank when a batch of this step begins, and counts the batches that were trained."""

    def __init__(self, step: int | None) -> None:
        self.step, self.count = step, 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.count += 1
        if trainer.global_step == self.step:
            callback = next(c for c in trainer.callbacks if isinstance(c, LastGood))
            callback.checkpointer.wait()
            die()

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def join(rank: Rank) -> None:
    place = {"RANK": rank.rank, "LOCAL_RANK": rank.rank, "WORLD_SIZE": rank.size, "LOCAL_WORLD_SIZE": rank.size}
    more = {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in {**place, **more}.items()})
    if rank.size > 1:
        rank.group()


class Drawing(lightning_ddp.Batches):
    """Draws a seed whenever an iterator is made, as torch's DataLoader does."""

    def __iter__(self) -> Any:
        torch.empty((), dtype=torch.int64).random_()
        return super().__iter__()


def train(rank: Rank, run: Path, death: int | None = None) -> Any:
    join(rank)
    lightning_ddp.Batches = Drawing  # type: ignore[misc]
    counter = DieAt(death)
    model = lightning_ddp.train(str(run), 3, 2, counter)
    return [p.detach().clone() for p in model.parameters()], counter.count


@pytest.mark.parametrize("death", [7, 10, 13])
def test_a_killed_ddp_training_ends_with_the_same_bits(tmp_path: Path, death: int) -> None:
    """15 steps in 3 epochs: saved in the middle of an epoch (6, 12) and at its end (10)."""
    whole = run_ranks(2, lambda rank: train(rank, tmp_path / "whole"), tmp_path / "a")
    ended = run_ranks(2, lambda rank: train(rank, tmp_path / "run", death), tmp_path / "b")
    assert [end.code for end in ended] == [-9, -9]
    resumed = run_ranks(2, lambda rank: train(rank, tmp_path / "run"), tmp_path / "c")
    for before, after in zip(whole, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before.ok()[0], after.ok()[0], strict=True))
        assert before.ok()[1] == after.ok()[1] == 15
    assert resumed[0].logged(f"restored step {death - death % 2} ")
    assert checkpoints(tmp_path / "run")[-1].startswith("step-00000015")


def test_an_ordinary_shuffling_loader_goes_on_exactly_from_the_end_of_an_epoch(tmp_path: Path) -> None:
    def fit(rank: Rank, run: Path, death: int | None, seed: int) -> Any:
        torch.manual_seed(seed)
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=4, logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[DieAt(death), LastGood(run, 5)],
        )  # fmt: skip
        model = lightning_ddp.Net()
        torch.manual_seed(seed)
        data = torch.randn(20, 8, generator=torch.Generator().manual_seed(3))
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4, shuffle=True))
        return [p.detach().clone() for p in model.parameters()]

    whole = run_ranks(1, lambda rank: fit(rank, tmp_path / "whole", None, 5), tmp_path / "a")[0].ok()
    assert run_ranks(1, lambda rank: fit(rank, tmp_path / "run", 13, 5), tmp_path / "b")[0].code == -9
    resumed = run_ranks(1, lambda rank: fit(rank, tmp_path / "run", None, 99), tmp_path / "c")[0].ok()
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_the_last_save_of_a_fit_is_never_skipped(tmp_path: Path) -> None:
    def slow(operation: disk.Operation, when: str) -> None:
        if operation.name == "write" and when == "before" and operation.path.name.endswith(".safetensors"):
            time.sleep(1.0)

    def fit(rank: Rank) -> None:
        disk.observer = slow
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[LastGood(rank.run, 1, busy="skip")],
        )  # fmt: skip
        trainer.fit(lightning_ddp.Net(), lightning_ddp.Batches(5, 0))

    (ended,) = run_ranks(1, fit, tmp_path)
    ended.ok()
    assert ended.logged("step 5 is not saved"), "the one at the end of the last batch"
    assert checkpoints(tmp_path / "run")[-1].startswith("step-00000005")


def test_a_ckpt_path_beside_a_run_with_checkpoints_is_refused(tmp_path: Path) -> None:
    def main(rank: Rank) -> None:
        train(rank, rank.run)
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=4, logger=False, callbacks=[LastGood(rank.run, 2)]
        )
        model = lightning_ddp.Net()
        trainer.strategy.connect(model)
        trainer.fit(model, lightning_ddp.Batches(5, 0), ckpt_path=str(rank.scratch / "own.ckpt"))

    torch.save(
        {"state_dict": lightning_ddp.Net().state_dict(), "pytorch-lightning_version": "2.4.0"}, tmp_path / "own.ckpt"
    )
    (ended,) = run_ranks(1, main, tmp_path)
    with pytest.raises(LastGoodError, match="Leave ckpt_path out"):
        ended.ok()


def write_file(path: Path, **more: Any) -> Path:
    LastGoodCheckpointIO().save_checkpoint({"state_dict": {"w": torch.arange(1000.0)}, **more}, path)
    return path


def test_a_ckpt_file_is_ordinary_and_a_damaged_one_names_the_newest_intact(tmp_path: Path) -> None:
    io = LastGoodCheckpointIO()
    old, good, bad = (write_file(tmp_path / "new" / f"{name}.ckpt", epoch=name) for name in ("old", "good", "bad"))
    os.utime(old, (1, 1))
    assert io.load_checkpoint(bad, map_location=lambda storage, _: storage)["epoch"] == "bad"
    assert torch.equal(torch.load(good)["state_dict"]["w"], torch.arange(1000.0))
    data = bytearray(bad.read_bytes())
    data[len(data) // 2] ^= 1
    bad.write_bytes(data)
    with pytest.raises(DamagedError, match=r"bad\.ckpt is damaged.*newest intact file beside it is .*good\.ckpt"):
        io.load_checkpoint(bad)
    io.remove_checkpoint(bad)
    with pytest.raises(FileNotFoundError):
        io.load_checkpoint(bad)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def test_a_ckpt_file_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_file(tmp_path / "a.ckpt", hyper_parameters=Evil())
    with pytest.raises(RefusedError, match="mkdir"):
        LastGoodCheckpointIO().load_checkpoint(path)
    assert not (tmp_path / "evil").exists()


def test_a_trainer_saves_and_loads_its_own_files_through_the_plugin(tmp_path: Path) -> None:
    def main(rank: Rank) -> Any:
        def fit(epochs: int, path: str | None) -> Any:
            trainer = lightning.Trainer(
                accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_progress_bar=False,
                enable_model_summary=False, plugins=[LastGoodCheckpointIO()], default_root_dir=rank.scratch,
                callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(rank.scratch / "ckpt", save_last=True)],
            )  # fmt: skip
            trainer.fit(lightning_ddp.Net(), lightning_ddp.Batches(5, 0), ckpt_path=path)
            return trainer.global_step

        return fit(1, None), fit(2, str(rank.scratch / "ckpt" / "last.ckpt"))

    assert run_ranks(1, main, tmp_path)[0].ok() == (5, 10)
