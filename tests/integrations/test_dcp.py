"""torch.distributed.checkpoint through lastgood: whole saves, verified loads, and the same weights after a kill."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import dcp_fsdp
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_processes import Rank, at_operation, die, run_ranks
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lastgood import disk
from lastgood.integrations.dcp import Reader, Writer, newest_step

pytestmark = pytest.mark.filterwarnings("ignore")


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.full_tensor().detach() for parameter in model.parameters()]


def train(rank: Rank, run: Path) -> list[torch.Tensor]:
    rank.group()
    found = weights(dcp_fsdp.train(str(run), 12, 3))
    dist.barrier()
    return found


def save(run: Path, step: int, **state: Any) -> None:
    dcp.save({"w": torch.full((5, 3), float(step)), **state}, storage_writer=Writer(run, step=step), no_dist=True)


def load(run: Path, **options: Any) -> tuple[int | None, torch.Tensor]:
    state = {"w": torch.zeros(5, 3)}
    reader = Reader(run, no_dist=True, **options)
    dcp.load(state, storage_reader=reader, no_dist=True)
    return reader.step, state["w"]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("when", ["part", "record"])
def test_a_killed_fsdp2_job_ends_with_the_same_bits(tmp_path: Path, when: str) -> None:
    whole = run_ranks(2, lambda rank: train(rank, tmp_path / "whole"), tmp_path / "a")
    expected = whole[0].ok()

    def killed(rank: Rank) -> Any:
        if when == "part" and rank.rank == 1:
            writes = []

            def watch(operation: Any, moment: str) -> None:
                if operation.name == "sync" and moment == "before" and str(operation.path).endswith(".bin"):
                    writes.append(operation.path)
                    if len(writes) == 3:
                        die()

            disk.observer = watch
        elif when == "record" and rank.rank == 0:
            at_operation("replace", "before", "dcp-00000003.json", die)
        return train(rank, tmp_path / "run")

    ended = run_ranks(2, killed, tmp_path / "b", wait_for=[1 if when == "part" else 0])
    assert any(end.code == -9 for end in ended)
    assert newest_step(tmp_path / "run") == 6
    for end in run_ranks(2, lambda rank: train(rank, tmp_path / "run"), tmp_path / "c"):
        assert all(torch.equal(a, b) for a, b in zip(end.ok(), expected, strict=True))
    assert newest_step(tmp_path / "run") == 12


@pytest.mark.parametrize("what", ["part", "record", "short", "lost"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path: Path, what: str, caplog: Any) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    newest = tmp_path / "step-00000003"
    part = next(newest.glob("part-*.bin"))
    record = next(newest.glob("dcp-*.json"))
    if what == "part":
        flip(part, 17)
    elif what == "record":
        flip(record, record.stat().st_size // 2)
    elif what == "short":
        os.truncate(part, part.stat().st_size - 1)
    else:
        part.unlink()
    step, found = load(tmp_path)
    assert step == 2 and torch.equal(found, torch.full((5, 3), 2.0))
    assert "damaged and skipped" in caplog.text
    with pytest.raises(CheckpointException, match=r"no checkpoint in .* verifies"):
        load(tmp_path, step=3)


def test_all_ranks_fall_back_together_when_one_finds_damage(tmp_path: Path) -> None:
    def main(rank: Rank) -> Any:
        rank.group()
        mesh = init_device_mesh("cpu", (2,))
        state = {"d": distribute_tensor(torch.arange(10.0).reshape(5, 2), mesh, [Shard(0)]), "own": {"lr": 0.1}}
        for step in (1, 2):
            dcp.save({**state, "step": step}, storage_writer=Writer(rank.run, step=step))
        dist.barrier()
        if rank.rank == 0:
            flip(next((rank.run / "step-00000002").glob("part-00001-*.bin")), 3)
        dist.barrier()
        target = {"d": distribute_tensor(torch.zeros(5, 2), mesh, [Shard(1)]), "own": {"lr": 0.0}, "step": 0}
        reader = Reader(rank.run)
        dcp.load(target, storage_reader=reader)
        return reader.step, target["step"], target["own"], target["d"].full_tensor()

    for end in run_ranks(2, main, tmp_path / "a"):
        step, saved_step, own, tensor = end.ok()
        assert (step, saved_step, own) == (1, 1, {"lr": 0.1})
        assert torch.equal(tensor, torch.arange(10.0).reshape(5, 2))


def test_two_ranks_save_and_one_process_loads(tmp_path: Path) -> None:
    whole = torch.randn(7, 4, dtype=torch.bfloat16)

    def main(rank: Rank) -> None:
        rank.group()
        mesh = init_device_mesh("cpu", (2,))
        dcp.save({"d": distribute_tensor(whole, mesh, [Shard(0)])}, storage_writer=Writer(rank.run))

    for end in run_ranks(2, main, tmp_path / "a"):
        end.ok()
    state = {"d": torch.zeros(7, 4, dtype=torch.bfloat16)}
    dcp.load(state, storage_reader=Reader(tmp_path / "a" / "run", no_dist=True), no_dist=True)
    assert torch.equal(state["d"], whole)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def test_an_object_that_runs_code_is_refused_at_save_and_never_run_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointException, match="bad cannot be saved"):
        save(tmp_path / "run", 1, bad=Evil())
    assert not list((tmp_path / "run").rglob("*.bin"))
    # A file by another hand, with checksums that fit.
    monkeypatch.setattr(Writer, "_check_object", lambda *_: None)
    save(tmp_path / "run", 2, bad=Evil())
    with pytest.raises(CheckpointException, match="mkdir"):
        dcp.load({"bad": 1}, storage_reader=Reader(tmp_path / "run", no_dist=True), no_dist=True)
    assert not (tmp_path / "evil").exists()


def test_a_roll_back_makes_the_later_steps_history(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    save(tmp_path, 2, again=1)
    assert newest_step(tmp_path) == 2
    flip(next((tmp_path / "step-00000002").glob("part-*.bin")), 0)
    assert load(tmp_path)[0] == 1


def test_keep_deletes_the_oldest_and_leaves_what_a_killed_save_left_to_the_next(tmp_path: Path) -> None:
    for step in range(1, 6):
        state = {"w": torch.full((5, 3), float(step))}
        dcp.save(state, storage_writer=Writer(tmp_path, keep=2), no_dist=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert load(tmp_path)[0] == 4


def test_a_checkpoint_that_was_looked_at_on_macos_is_deleted_as_a_whole(tmp_path: Path) -> None:
    for _ in range(3):
        dcp.save({"w": torch.zeros(5, 3)}, storage_writer=Writer(tmp_path, keep=2), no_dist=True)
        for path in tmp_path.iterdir():
            (path / ".DS_Store").write_bytes(b"Bud1")
            (path / "._part").write_bytes(b"Mac OS X")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert load(tmp_path)[0] == 2


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.complex64, torch.float8_e4m3fn, torch.float64])
def test_every_kind_of_tensor_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.arange(24).reshape(4, 6) % 3
    tensors = {"view": base.to(dtype).t(), "scalar": torch.tensor(2).to(dtype), "empty": torch.empty(0, 3, dtype=dtype)}
    dcp.save(dict(tensors), storage_writer=Writer(tmp_path), no_dist=True)
    state = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(state, storage_reader=Reader(tmp_path, no_dist=True), no_dist=True)
    for name, tensor in tensors.items():
        assert torch.equal(state[name].float(), tensor.float()), name


def test_an_async_save_with_a_checkpoint_id_is_found_by_the_run(tmp_path: Path) -> None:
    def main(rank: Rank) -> Any:
        rank.group()
        state = {"w": torch.arange(6.0), "n": 3}
        where = rank.run / "step-10"
        dcp.async_save(state, checkpoint_id=str(where), storage_writer=Writer()).result()
        state["w"].zero_()
        dcp.load(state, storage_reader=Reader(rank.run))
        assert torch.equal(state["w"], torch.arange(6.0))
        return newest_step(rank.run)

    assert run_ranks(2, main, tmp_path)[0].ok() == 10


def test_a_failed_write_leaves_nothing_and_the_checkpoint_before(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def full() -> None:
        raise OSError(28, "No space left on device")

    at_operation("sync", "before", ".bin", full)
    try:
        with pytest.raises(CheckpointException, match="was not saved"):
            save(tmp_path, 2)
    finally:
        disk.observer = None
    assert not list((tmp_path / "step-00000002").iterdir())
    assert load(tmp_path)[0] == 1


def test_the_bytes_that_torch_unpickles_are_made_by_the_reader(tmp_path: Path) -> None:
    save(tmp_path, 1, note={"a": (1, 2.5, "x")})
    seen = []

    class Planner(dcp.DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            seen.append(value.getvalue())
            super().load_bytes(read_item, value)

    state = {"w": torch.zeros(5, 3), "note": {"a": None}}
    dcp.load(state, storage_reader=Reader(tmp_path, no_dist=True), planner=Planner(), no_dist=True)
    assert state["note"] == {"a": (1, 2.5, "x")} and seen
    assert all(pickle.PROTO not in data[:1] for data in seen)
