"""Who calls save, who writes, and what happens when one of them cannot."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import Rank, at_operation, checkpoints, events, run_ranks, wait_until

from lastgood import SaveError, catalog, commit, disk, member


def state() -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.full((100, 100), float(i)) for i in range(8)}


def manifests(run: Path) -> list[Any]:
    return [catalog.check_full(entry) for entry in catalog.committed(run)]


def refuse(path_ending: str, operation: str = "write") -> list[bool]:
    """From now on, while the returned list is not empty, the disk refuses what this rank writes to such files."""
    active = [True]

    def observe(op: disk.Operation, when: str) -> None:
        if active and when == "before" and op.name == operation and str(op.path).endswith(path_ending):
            raise OSError(errno.EIO, "the disk of this rank is broken", str(op.path))

    disk.observer = observe
    return active


# -- `if rank == 0: ckpt.save(...)` -----------------------------------------------------------------------------------


def test_saving_on_rank_0_alone_is_complete_and_named_once(tmp_path: Path) -> None:
    def main(rank: Rank) -> list[float]:
        seconds = []
        with rank.checkpointer(state=state(), replicated=["*"], deadline=1.5) as ckpt:
            if rank.rank == 0:
                for step in range(5):
                    began = time.monotonic()
                    ckpt.save(step, blocking=True).result()
                    seconds.append(time.monotonic() - began)
                rank.mark("saved")
            rank.await_mark("saved")
        return seconds

    ended = run_ranks(3, main, tmp_path)
    seconds = ended[0].ok()
    assert seconds[0] >= 1.4 and sum(seconds[1:]) < 1.4, "the first save waits for the others, the later ones do not"
    for other in (1, 2):
        assert len(ended[0].logged(f"rank {other} did not call save(0)")) == 1
    assert len([line for line in ended[0].log if "did not call save" in line]) == 2
    for manifest in manifests(tmp_path / "run"):
        assert len(manifest.tensors) == 8
        assert manifest.ranks[0].random is not None and manifest.ranks[1].random is None
    assert [e["missing"] for e in events(tmp_path / "run", "save")] == [[1, 2]] * 5
    restored = run_ranks(3, restore, tmp_path / "again", run=tmp_path / "run")
    assert [e.ok() for e in restored] == [4, 4, 4]


def test_a_rank_that_never_saves_does_not_gather_the_messages_of_all_saves(tmp_path: Path) -> None:
    def main(rank: Rank) -> None:
        with rank.checkpointer(state={"a": torch.ones(3)}, replicated=["*"], deadline=0.5) as ckpt:
            if rank.rank == 0:
                for step in range(member._REMEMBERED + 10):
                    ckpt.save(step, blocking=True).result()
                rank.mark("saved")
            else:
                rank.await_mark("saved")
                inbox = {key for key, _ in ckpt.channel._inbox if key.startswith("save/")}
                assert len(inbox) <= 2 * member._REMEMBERED

    for ended in run_ranks(2, main, tmp_path):
        ended.ok()


def restore(rank: Rank) -> int:
    target = {name: torch.zeros_like(value) for name, value in state().items()}
    with rank.checkpointer(state=target, replicated=["*"]) as ckpt:
        step = ckpt.restore()
    assert all(torch.equal(target[name], value) for name, value in state().items())
    return step


def test_the_next_save_of_rank_0_does_not_wait_for_the_deadline_of_the_one_before(tmp_path: Path) -> None:
    def main(rank: Rank) -> float:
        began = time.monotonic()
        with rank.checkpointer(state=state(), replicated=["*"], deadline=60) as ckpt:
            if rank.rank == 0:
                for step in range(3):
                    ckpt.save(step)
                rank.mark("saved")
            rank.await_mark("saved")
        return time.monotonic() - began

    ended = run_ranks(2, main, tmp_path)
    assert ended[0].ok() < 30
    assert len(checkpoints(tmp_path / "run")) == 3


def test_a_rank_that_is_at_a_later_step_already_is_not_waited_for(tmp_path: Path) -> None:
    def main(rank: Rank) -> float:
        with rank.checkpointer(state=state(), replicated=["*"], deadline=60) as ckpt:
            began = time.monotonic()
            if rank.rank == 0:
                ckpt.save(1, blocking=True)
            ckpt.save(2, blocking=True)
            return time.monotonic() - began

    ended = run_ranks(2, main, tmp_path)
    assert all(e.ok() < 30 for e in ended)
    assert [e["missing"] for e in events(tmp_path / "run", "save")] == [[1], []]


def test_a_rank_that_comes_back_is_waited_for_again(tmp_path: Path) -> None:
    def main(rank: Rank) -> None:
        with rank.checkpointer(state=state(), replicated=["*"], deadline=60) as ckpt:
            for step in range(6):
                if rank.rank == 0 or step >= 3:
                    if step == 3:
                        rank.mark(f"ready-{rank.rank}")
                        rank.await_mark("ready-0")
                        rank.await_mark("ready-1")
                    if rank.rank == 1 and step == 5:
                        time.sleep(0.5)  # late, but known to come
                    ckpt.save(step, blocking=step > 2)

    for ended in run_ranks(2, main, tmp_path):
        ended.ok()
    took_part = {m.step: m.ranks[1].random is not None for m in manifests(tmp_path / "run")}
    assert took_part[5]
    assert [e["missing"] for e in events(tmp_path / "run", "save")][:3] == [[1]] * 3


# -- a writer whose disk refuses --------------------------------------------------------------------------------------


def test_rank_0_writes_for_a_rank_whose_disk_refuses_and_tries_it_again_later(tmp_path: Path) -> None:
    count = commit._RETRY_WIDTH + 3

    def main(rank: Rank) -> None:
        with rank.checkpointer(state=state(), replicated=["*"]) as ckpt:
            active = refuse("00001.safetensors") if rank.rank == 1 else [True]
            for step in range(1, count + 1):
                if step == 3:
                    active.clear()
                ckpt.save(step, blocking=True).result()

    ended = run_ranks(3, main, tmp_path)
    for e in ended:
        e.ok()
    writers = []
    for path in sorted((tmp_path / "run").glob("step-*")):
        writers.append(sorted(p.name for p in path.glob("*.safetensors")))
    # (Three are kept by default: the events tell of the others.)
    assert len(list(events(tmp_path / "run", "save"))) == count
    assert writers[-1] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"], "full width again"
    assert len(ended[0].logged("rank 1 could not write its share")) == 1
    assert ended[0].logged("the disk of this rank is broken"), "and why"
    assert ended[0].logged("shared among ranks [0, 1, 2] again")


@pytest.mark.parametrize("operation", ["create", "write", "sync"])
def test_no_checkpoint_is_lost_to_a_refusing_writer(tmp_path: Path, operation: str) -> None:
    def main(rank: Rank) -> list[Any]:
        with rank.checkpointer(state=state(), replicated=["*"]) as ckpt:
            if rank.rank == 1:
                refuse(".safetensors", operation)
            return [ckpt.save(step, blocking=True).state for step in (1, 2)]

    for ended in run_ranks(2, main, tmp_path):
        assert ended.ok() == ["committed", "committed"]
    first, second = manifests(tmp_path / "run")
    assert [s.file for s in first.shards] == ["00000.safetensors", "00001-by-0.safetensors"]
    assert [s.file for s in second.shards] == ["00000.safetensors"], "the next save does without that writer"
    assert [e.ok() for e in run_ranks(2, restore, tmp_path / "2", run=tmp_path / "run")] == [2, 2]


def test_all_writers_but_rank_0_refuse(tmp_path: Path) -> None:
    def main(rank: Rank) -> list[str]:
        with rank.checkpointer(state=state(), replicated=["*"]) as ckpt:
            if rank.rank:
                refuse(".safetensors")
            return [ckpt.save(step, blocking=True).state for step in (1, 2)]

    for ended in run_ranks(4, main, tmp_path):
        assert ended.ok() == ["committed", "committed"]
    assert [s.file for s in manifests(tmp_path / "run")[1].shards] == ["00000.safetensors"]


def test_what_only_the_refusing_rank_has_is_not_given_up_silently(tmp_path: Path) -> None:
    def main(rank: Rank) -> list[str]:
        own = torch.full((3,), float(rank.rank))
        ckpt = rank.checkpointer(state=state(), own=own, replicated=["state.*"], local=["own"])
        ckpt.save(1, blocking=True).result()
        if rank.rank == 1:
            refuse("-own.safetensors")
        handle = ckpt.save(2, blocking=True)
        with pytest.raises(SaveError, match=r"rank 1 .*broken"):
            handle.result()
        disk.observer = None
        ckpt.save(3, blocking=True).result()
        ckpt.close()
        return [handle.state]

    for ended in run_ranks(2, main, tmp_path):
        assert ended.ok() == ["failed"]
    assert checkpoints(tmp_path / "run") == ["step-00000001", "step-00000003"]
    assert not (tmp_path / "run" / "step-00000002").exists()


@pytest.mark.parametrize("writers", [1, 2, 3])
def test_the_number_of_writers_can_be_chosen(tmp_path: Path, writers: int) -> None:
    def main(rank: Rank) -> None:
        with rank.checkpointer(state=state(), replicated=["*"], writers=writers) as ckpt:
            ckpt.save(1)

    for ended in run_ranks(3, main, tmp_path):
        ended.ok()
    assert [s.file for s in manifests(tmp_path / "run")[0].shards] == [f"{n:05d}.safetensors" for n in range(writers)]


# -- one save at a time -----------------------------------------------------------------------------------------------


def slow(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_skipping_is_decided_for_all_ranks_alike(tmp_path: Path, slow_rank: int) -> None:
    def main(rank: Rank) -> list[str]:
        with rank.checkpointer(state=state(), replicated=["*"], busy="skip") as ckpt:
            ckpt.save(1, blocking=True).result()
            if rank.rank == slow_rank:
                at_operation("write", "before", ".safetensors", slow(1.0))
            handles = [ckpt.save(step) for step in range(2, 6)]
            wait_until(handles[0].done, "the slow save")
            handles.append(ckpt.save(6, blocking=True))
        assert all(handle.done() for handle in handles)
        return [handle.state for handle in handles]

    ended = [e.ok() for e in run_ranks(3, main, tmp_path)]
    assert ended[0] == ended[1] == ended[2], "no rank decides alone"
    assert ended[0] == ["committed", "skipped", "skipped", "skipped", "committed"]
    assert checkpoints(tmp_path / "run")[-2:] == ["step-00000002", "step-00000006"]


def test_one_save_is_under_way_at_a_time_and_memory_is_bounded(tmp_path: Path) -> None:
    def main(rank: Rank) -> tuple[int, int]:
        writing, most = [0], [0]

        def observe(op: disk.Operation, when: str) -> None:
            if op.name == "write" and str(op.path).endswith(".safetensors"):
                writing[0] += 1 if when == "before" else -1
                most[0] = max(most[0], writing[0])

        disk.observer = observe
        with rank.checkpointer(state=state(), replicated=["*"]) as ckpt:
            for step in range(1, 12):
                ckpt.save(step)
            return most[0], ckpt._snapshot.size

    size = sum(t.numel() * t.element_size() for t in state().values())
    ended = run_ranks(2, main, tmp_path)
    assert ended[0].ok()[0] == ended[1].ok()[0] == 1
    assert size <= ended[0].ok()[1] <= 1.2 * size, "rank 0 holds one copy of the state"
    assert ended[1].ok()[1] <= 0.7 * size, "the others hold their share"


def test_three_failures_in_a_row_are_raised_on_every_rank(tmp_path: Path) -> None:
    def main(rank: Rank) -> list[str]:
        told = []
        ckpt = rank.checkpointer(state=state(), replicated=["*"])
        active = refuse("00000.safetensors") if rank.rank == 0 else []
        for step in range(1, 8):
            try:
                told.append(ckpt.save(step, blocking=True).state)
            except SaveError as error:
                assert "the last 3 saves failed" in str(error)
                told.append("raised")
            if step == 6:
                active.clear()
        ckpt.close()
        return told

    expected = ["failed", "failed", "failed", "raised", "failed", "raised", "committed"]
    assert [e.ok() for e in run_ranks(2, main, tmp_path)] == [expected, expected]
    assert sorted(os.listdir(tmp_path / "run")) == ["events.jsonl", "generations", "lock", "step-00000007"]


def test_a_failed_save_of_rank_0_alone_gives_its_space_back(tmp_path: Path) -> None:
    """Also where the other ranks never call save: nobody waits for their word before the clean-up."""

    def main(rank: Rank) -> None:
        ckpt = rank.checkpointer(state=state(), replicated=["*"], deadline=1)
        if rank.rank == 0:
            refuse("00000.safetensors", "sync")
            assert ckpt.save(1, blocking=True).state == "failed"
            assert not list(rank.run.glob("step-*"))
            with pytest.raises(SaveError):
                ckpt.close()
            rank.mark("done")
        rank.await_mark("done")
        ckpt.close()

    for ended in run_ranks(2, main, tmp_path):
        ended.ok()


def test_the_space_that_other_ranks_need_counts_too(tmp_path: Path) -> None:
    def main(rank: Rank) -> list[str]:
        told = []
        with rank.checkpointer(state={"a": torch.full((300_000,), float(rank.rank))}, local=["*"]) as ckpt:
            for step, free in ((1, 1 << 40), (2, 2), (3, 3)):
                # Room for so many ranks' tensors, and what lies between them.
                disk.free_bytes = lambda path, free=free: commit._MARGIN + free * 1_220_000  # type: ignore[misc]
                handle = ckpt.save(step, blocking=True)
                told.append(handle.state)
                handle.seen = True
        return told

    ended = run_ranks(3, main, tmp_path)
    assert [e.ok() for e in ended] == [["committed", "failed", "committed"]] * 3
    assert ended[0].logged("and the save needs")
    assert checkpoints(tmp_path / "run") == ["step-00000001", "step-00000003"]
