"""Saved by any number of ranks, restored by any other number: the same tensors, values and random states."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import Rank, checkpoints, run_ranks

from lastgood import catalog
from lastgood.manifest import Manifest


def build(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(37, 41), torch.nn.BatchNorm1d(41), torch.nn.Linear(41, 700))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "extra": {"epoch": 0, (1, "a"): None}}


def train(objects: dict[str, Any], steps: int) -> None:
    for _ in range(steps):
        objects["optimizer"].zero_grad()
        objects["model"](torch.randn(8, 37)).square().mean().backward()
        objects["optimizer"].step()
        objects["scheduler"].step()
        objects["extra"]["epoch"] += 1


def content(objects: dict[str, Any]) -> dict[str, Any]:
    """Everything, as plain comparable values."""
    optimizer = objects["optimizer"].state_dict()
    return {
        "model": {k: v.tolist() for k, v in objects["model"].state_dict().items()},
        "moments": {
            i: {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in s.items()}
            for i, s in optimizer["state"].items()
        },
        "groups": optimizer["param_groups"],
        "scheduler": objects["scheduler"].state_dict(),
        "extra": dict(objects["extra"]),
    }


def save_replicated(rank: Rank) -> Any:
    objects = build(7)
    train(objects, 3)
    ckpt = rank.checkpointer(**objects, replicated=["*"])
    random.seed(rank.rank)
    torch.manual_seed(rank.rank)
    ckpt.save(3, blocking=True).result()
    here = torch.rand(3).tolist(), random.random()
    ckpt.close()
    return content(objects), here


def restore(rank: Rank) -> Any:
    objects = build(99)
    ckpt = rank.checkpointer(**objects, replicated=["*"])
    assert ckpt.restore() == 3
    ckpt.close()
    return content(objects), (torch.rand(3).tolist(), random.random())


def manifest_of(run: Path) -> Manifest:
    entry = catalog.newest(run)
    assert entry is not None
    return catalog.check_full(entry)


@pytest.mark.parametrize("saved_by", [1, 2, 3, 4])
def test_saved_by_some_ranks_restored_by_others(tmp_path: Path, saved_by: int) -> None:
    saved = [ended.ok() for ended in run_ranks(saved_by, save_replicated, tmp_path / "save", run=tmp_path / "run")]
    assert all(state == saved[0][0] for state, _ in saved)
    derived: dict[tuple[int, int], Any] = {}
    for number, size in enumerate([*(n for n in (1, 2, 4) if n != saved_by), saved_by, 4, 4]):
        ended = run_ranks(size, restore, tmp_path / f"restore-{number}", run=tmp_path / "run")
        for rank, (state, following) in enumerate(e.ok() for e in ended):
            assert state == saved[0][0]
            if rank < saved_by:
                assert following == saved[rank][1], "a rank that had a random state continues with its own"
                assert not ended[rank].logged("no random state")
            else:
                assert ended[rank].logged("no random state"), "what is made up is said"
                assert derived.setdefault((rank, size), following) == following, "and is the same every time"
                assert following not in [s[1] for s in saved]
    assert len({str(value) for value in derived.values()}) == len(derived), "and different on every rank"


@pytest.mark.parametrize("saved_by", [2, 4])
def test_replicated_bytes_are_written_once_in_total_and_in_even_shares(tmp_path: Path, saved_by: int) -> None:
    def save(rank: Rank) -> None:
        torch.manual_seed(3)
        model = torch.nn.Sequential(*(torch.nn.Linear(500, 500) for _ in range(4)), torch.nn.Linear(500, 12000))
        # Under an optimizer: what nothing changes is rank 0's alone.
        ckpt = rank.checkpointer(model=model, sgd=torch.optim.SGD(model.parameters()), replicated=["*"])
        ckpt.save(1, blocking=True).result()
        ckpt.close()

    for ended in run_ranks(saved_by, save, tmp_path / "many"):
        ended.ok()
    for ended in run_ranks(1, save, tmp_path / "one"):
        ended.ok()
    many, one = manifest_of(tmp_path / "many" / "run"), manifest_of(tmp_path / "one" / "run")
    payload = [s.size - s.header_size for s in many.shards]
    on_disk = [p.stat().st_size for p in (tmp_path / "many" / "run" / "step-00000001").glob("*.safetensors")]
    assert sum(payload) == sum(s.size - s.header_size for s in one.shards)
    assert sorted(on_disk) == sorted(s.size for s in many.shards), "no file beside those of the manifest"
    assert len(payload) == saved_by
    assert max(payload) - min(payload) < 0.25 * max(payload)
    assert {n: (t.dtype, t.shape) for n, t in many.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in one.tensors.items()
    }
    assert many.objects == one.objects and many.kinds == one.kinds


def test_a_save_in_many_processes_is_one_checkpoint(tmp_path: Path) -> None:
    def save(rank: Rank) -> None:
        ckpt = rank.checkpointer(**build(1), replicated=["*"])
        for step in (1, 2, 3):
            ckpt.save(step)
        ckpt.close()

    for ended in run_ranks(3, save, tmp_path):
        ended.ok()
    assert checkpoints(tmp_path / "run") == ["step-00000001", "step-00000002", "step-00000003"]


def test_saving_without_restoring_first_is_no_mistake_of_a_late_rank(tmp_path: Path) -> None:
    def save(rank: Rank) -> Any:
        ckpt = rank.checkpointer(**build(1), replicated=["*"])
        if rank.rank == 0:
            ckpt.save(1)
            ckpt.save(2, blocking=True)
            rank.mark("saved")
        else:
            rank.await_mark("saved")
        path = ckpt.save(3, blocking=True).result()
        ckpt.close()
        return path

    assert all(ended.ok() == tmp_path / "run" / "step-00000003" for ended in run_ranks(2, save, tmp_path))
