"""Accelerate through lastgood: the same weights after a kill, whatever the objects are wrapped in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import Rank, checkpoints, die, run_ranks

pytest.importorskip("accelerate")

import accelerate_ddp
from accelerate import Accelerator, DistributedType

from lastgood import LastGoodError, catalog
from lastgood.integrations.accelerate import LastGood

pytestmark = pytest.mark.filterwarnings("ignore")


def join(rank: Rank) -> None:
    if rank.size > 1:
        place = {"RANK": rank.rank, "LOCAL_RANK": rank.rank, "WORLD_SIZE": rank.size, "LOCAL_WORLD_SIZE": rank.size}
        more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
        os.environ.update({name: str(value) for name, value in {**place, **more}.items()})
        rank.group()


def train(rank: Rank, run: Path, death: int | None = None) -> list[torch.Tensor]:
    join(rank)

    def at_step(ckpt: LastGood, step: int) -> None:
        if step == death:
            ckpt.wait()
            die()

    model = accelerate_ddp.train(str(run), 12, 3, at_step)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("size", [1, 2])
def test_a_killed_training_ends_with_the_same_bits(tmp_path: Path, size: int) -> None:
    whole = run_ranks(size, lambda rank: train(rank, tmp_path / "whole"), tmp_path / "a")
    ended = run_ranks(size, lambda rank: train(rank, tmp_path / "run", 8), tmp_path / "b")
    assert {end.code for end in ended} == {-9}
    assert checkpoints(tmp_path / "run") == ["step-00000003", "step-00000006"]
    resumed = run_ranks(size, lambda rank: train(rank, tmp_path / "run"), tmp_path / "c")
    assert resumed[0].logged("restored step 6 ")
    for before, after in zip(whole, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before.ok(), after.ok(), strict=True))


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_replicated_weights_are_written_once_and_registered_objects_come_back(tmp_path: Path) -> None:
    def main(rank: Rank) -> Any:
        join(rank)
        accelerator = Accelerator(cpu=True)
        counter = Counter()
        accelerator.register_for_checkpointing(counter)
        net = torch.nn.Linear(100, 100)
        model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
        model(torch.ones(1, 100)).sum().backward()
        optimizer.step()
        counter.count = 5
        with LastGood(accelerator, rank.run, model=model, optimizer=optimizer) as ckpt:
            ckpt.save(1, blocking=True).result()
            counter.count = 0
            assert ckpt.restore() == 1
        return counter.count

    assert [end.ok() for end in run_ranks(2, main, tmp_path)] == [5, 5]
    entry = catalog.newest(tmp_path / "run")
    assert entry is not None
    manifest = catalog.check_full(entry)
    assert {"model.weight", "optimizer.state.model.weight.momentum_buffer"} <= set(manifest.tensors)
    once = 2 * (100 * 100 + 100) * 4
    assert once <= manifest.tensor_bytes < 1.5 * once


def test_an_accelerator_whose_state_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    class Deep:
        distributed_type = DistributedType.DEEPSPEED

    with pytest.raises(LastGoodError, match="DEEPSPEED"):
        LastGood(Deep(), tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
