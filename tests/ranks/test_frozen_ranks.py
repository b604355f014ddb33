"""Frozen tensors of a job of many ranks: rank 0 writes them twice, nobody else does, and then they are shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import Rank, run_ranks

from lastgood import catalog, disk
from lastgood.shard import FROZEN

WIDTH = 384


def build(seed: int = 7) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 32))
    model[0].requires_grad_(False)
    return {"model": model, "optimizer": torch.optim.AdamW(model[1].parameters(), lr=1e-2)}


def train(objects: dict[str, Any]) -> None:
    objects["model"](torch.ones(2, WIDTH)).square().mean().backward()
    objects["optimizer"].step()
    objects["optimizer"].zero_grad()


def save_six(rank: Rank) -> Any:
    objects = build()
    with rank.checkpointer(**objects, replicated=["*"]) as ckpt:
        for step in range(1, 7):
            train(objects)
            ckpt.save(step, blocking=True).result()
            ckpt._finish_save()
    return {name: tensor.tolist() for name, tensor in objects["model"].state_dict().items()}


def save_six_with_a_drifting_rank(rank: Rank) -> Any:
    """Rank 1 changes what rank 0 holds for frozen: it takes other tensors for frozen from then on."""
    objects = build()
    with rank.checkpointer(**objects, replicated=["*"]) as ckpt:
        for step in range(1, 7):
            train(objects)
            if rank.rank == 1 and step == 3:
                with torch.no_grad():
                    objects["model"][0].weight += 1
            ckpt.save(step, blocking=True).result()
            ckpt._finish_save()
    return {name: tensor.tolist() for name, tensor in objects["model"].state_dict().items()}


def restore(rank: Rank) -> Any:
    objects = build(seed=rank.rank)
    with rank.checkpointer(**objects, replicated=["*"]) as ckpt:
        assert ckpt.restore() == 6
    return {name: tensor.tolist() for name, tensor in objects["model"].state_dict().items()}


@pytest.mark.parametrize("size", [2, 3])
def test_rank_0_writes_them_twice_and_then_they_are_shared(tmp_path: Path, size: int) -> None:
    saved = run_ranks(size, save_six, tmp_path)
    run = tmp_path / "run"
    kept = catalog.committed(run)
    assert len({disk.identity(entry.path / FROZEN) for entry in kept}) == 2
    for entry in kept:
        manifest = catalog.check_full(entry)
        # One copy of everything, whoever wrote it.
        whole = sum(record.size - record.header_size for record in manifest.shards)
        assert whole == sum(c.end - c.begin for t in manifest.tensors.values() for c in t.chunks)
    assert all(ended.ok() == saved[0].ok() for ended in run_ranks(size + 1, restore, tmp_path))


def test_ranks_that_disagree_on_what_is_frozen_still_save_everything(tmp_path: Path) -> None:
    saved = run_ranks(2, save_six_with_a_drifting_rank, tmp_path)
    assert [entry.step for entry in catalog.committed(tmp_path / "run")] == [4, 5, 6]
    for entry in catalog.committed(tmp_path / "run"):
        catalog.check_full(entry)
    assert all(ended.ok() == saved[0].ok() for ended in run_ranks(2, restore, tmp_path))
