"""Saved by any number of ranks, restored by any other number: the same tensors, values and random states."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
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


class Sampler:
    """Of which every rank has its own place in the data."""

    def __init__(self) -> None:
        self.place, self.order = 0, torch.zeros(3, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place, self.order = state["place"], state["order"]


def own_things(rank: Rank) -> dict[str, Any]:
    torch.manual_seed(5)
    sampler = Sampler()
    sampler.place, sampler.order = 10 + rank.rank, torch.arange(3) + rank.rank
    older = np.random.RandomState(20 + rank.rank)
    older.randn()  # Leaves the other of the pair behind.
    model = torch.nn.Linear(3, 2)
    (model(torch.ones(3)).sum() * (rank.rank + 1)).backward()
    return {
        "model": model,
        "sampler": sampler,
        "table": torch.full((4,), float(rank.rank)),
        "name": f"rank {rank.rank}",
        "same": {"epoch": 3, "weights": torch.ones(5)},
        "noise": torch.Generator().manual_seed(20 + rank.rank),
        "dice": random.Random(20 + rank.rank),
        "older": older,
        "shuffle": torch.Generator().manual_seed(9),
    }


def draw(objects: dict[str, Any]) -> list[float]:
    return [*torch.rand(2, generator=objects["noise"]).tolist(), objects["dice"].random(), objects["older"].randn()]


@pytest.mark.parametrize(("saved_by", "restored_by"), [(2, 4), (1, 3), (3, 1)])
def test_what_every_rank_had_for_itself_goes_to_another_number_of_ranks(
    tmp_path: Path, saved_by: int, restored_by: int
) -> None:
    options: dict[str, Any] = {"gradients": True, "replicated": ["model.weight", "model.bias", "shuffle"]}

    def save(rank: Rank) -> Any:
        objects = own_things(rank)
        with rank.checkpointer(**objects, **options) as ckpt:
            ckpt.save(3)
        return draw(objects)

    def restore(rank: Rank) -> Any:
        blank = Rank(50, rank.size, rank.scratch, rank.run)
        objects = own_things(blank)
        with rank.checkpointer(**objects, **options) as ckpt:
            assert ckpt.restore() == 3
            assert ckpt["name"] == "rank 0" and ckpt["same"]["epoch"] == 3
        assert objects["sampler"].place == 10 and objects["sampler"].order.tolist() == [0, 1, 2]
        assert objects["table"].tolist() == [0.0] * 4
        assert objects["model"].weight.grad.tolist() == [[1.0] * 3] * 2
        shuffled = torch.rand(2, generator=objects["shuffle"]).tolist()
        return draw(objects), shuffled, objects["same"]["weights"].tolist()

    saved = [ended.ok() for ended in run_ranks(saved_by, save, tmp_path / "save", run=tmp_path / "run")]
    first = run_ranks(restored_by, restore, tmp_path / "a", run=tmp_path / "run")
    again = run_ranks(restored_by, restore, tmp_path / "b", run=tmp_path / "run")
    assert [e.ok() for e in first] == [e.ok() for e in again], "what is derived is the same every time"
    noise = [ended.ok()[0] for ended in first]
    assert all(len(set(column)) == restored_by for column in zip(*noise, strict=True)), "no first number is another's"
    kept = min(saved_by, restored_by)
    assert noise[:kept] == saved[:kept], "a rank whose generator was saved goes on with its own"
    assert len({str(numbers) for numbers in [*noise, *saved]}) == max(saved_by, restored_by), "nobody draws another's"
    assert {str(ended.ok()[1]) for ended in first} == {
        str(torch.rand(2, generator=torch.Generator().manual_seed(9)).tolist())
    }
    for rank, ended in enumerate(first):
        assert len(ended.logged("noise: rank")) == len(ended.logged("dice: rank")) == (rank >= saved_by)
        assert not ended.logged("shuffle:") and not ended.logged("same:")
        for name in ("sampler", "table", "name", "model"):
            assert len(ended.logged(f"{name}: {saved_by} ranks had")) == (saved_by > 1 and rank == 0)


def test_a_generator_that_all_ranks_had_alike_stays_so(tmp_path: Path) -> None:
    def save(rank: Rank) -> None:
        with rank.checkpointer(order=torch.Generator().manual_seed(4)) as ckpt:
            ckpt.save(1)

    def restore(rank: Rank) -> Any:
        order = torch.Generator()
        with rank.checkpointer(order=order) as ckpt:
            ckpt.restore()
        return torch.randperm(9, generator=order).tolist()

    for ended in run_ranks(2, save, tmp_path / "save", run=tmp_path / "run"):
        ended.ok()
    ended_all = run_ranks(3, restore, tmp_path / "restore", run=tmp_path / "run")
    wanted = torch.randperm(9, generator=torch.Generator().manual_seed(4)).tolist()
    assert [e.ok() for e in ended_all] == [wanted] * 3
    assert not any(e.logged("order") for e in ended_all)
