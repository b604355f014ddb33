"""Ranks that die, hang or come late, in every phase of a save: what can be saved is saved, and nobody hangs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import (
    Ended,
    Rank,
    World,
    at_message,
    at_operation,
    checkpoints,
    die,
    freeze,
    run_ranks,
    wait_until,
)

from lastgood import LastGoodError, PeerError, SaveError, catalog
from lastgood.loading import read_tensors

PHASES = ["before the call", "called", "called and said what it holds", "file made", "written", "synced", "reported"]
ROOT_PHASES = [
    "before the call",
    "announced",
    "file made",
    "written",
    "synced",
    "manifest made",
    "manifest synced",
    "committed",
    "told",
]
KEPT = 3
"""Checkpoints that the retention policy leaves."""
HANG = 3.0
"""Deadline of the tests in which a rank hangs, seconds: long enough for the ranks that live on a busy machine."""


def arm(ckpt: Any, phase: str, act: Callable[[], None]) -> None:
    """Let this rank act in a phase of its next save."""
    shard = f"{ckpt.world.rank:05d}.safetensors" if ckpt.world.rank == 0 else ".safetensors"
    if phase == "before the call":
        act()
    elif phase == "called":
        at_message(ckpt, f"here/{ckpt.generation}", "after", act)
    elif phase == "called and said what it holds":
        at_message(ckpt, "/holds", "after", act)
    elif phase == "announced":
        at_message(ckpt, "/call", "after", act)
    elif phase == "file made":
        at_operation("create", "after", shard, act)
    elif phase == "written":
        at_operation("write", "after", shard, act)
    elif phase == "synced":
        at_operation("sync", "after", shard, act)
    elif phase == "reported":
        at_message(ckpt, "/report", "after", act)
    elif phase == "manifest made":
        at_operation("create", "after", "manifest.json.tmp", act)
    elif phase == "manifest synced":
        at_operation("replace", "before", "manifest.json", act)
    elif phase == "committed":
        at_operation("replace", "after", "manifest.json", act)
    elif phase == "told":
        at_message(ckpt, "/outcome", "after", act)
    else:
        raise ValueError(phase)


def tensors(step: int, rank: int) -> dict[str, torch.Tensor]:
    """The state after a step: `shared` is the same on all ranks, `own` is not."""
    return {
        "shared": torch.arange(3000.0) + step,
        "more": torch.full((50, 70), float(step)),
        "own": torch.full((5,), 100.0 * step + rank),
    }


def life(victim: int, phase: str, act: Callable[[], None], *, own: bool, deadline: float) -> Callable[[Rank], Any]:
    """Save four steps; the victim acts in the second one."""

    def main(rank: Rank) -> list[Any]:
        state = tensors(0, rank.rank)
        if not own:
            del state["own"]
        ckpt = rank.checkpointer(
            state=state, replicated=["state.shared", "state.more"], local=["state.own"], deadline=deadline
        )
        told = []
        for step in (1, 2, 3, 4):
            for name, value in tensors(step, rank.rank).items():
                if name in state:
                    state[name].copy_(value)
            if step == 2 and rank.rank == victim:
                arm(ckpt, phase, act)
            began = time.monotonic()
            handle = ckpt.save(step)
            assert handle.wait(100), "nobody waits for ever"
            told.append((handle.state, str(handle.error or ""), time.monotonic() - began))
        try:
            ckpt.close()
        except SaveError:
            told.append("close said so")
        return told

    return main


def check(run: Path, ended: list[Ended], victim: int, phase: str, own: bool, died: bool = False) -> None:
    survivors = [e for e in ended if e.rank != victim]
    told = {step: saved[0] == "committed" for step, saved in enumerate(survivors[0].ok()[:4], 1)}
    for e in survivors:
        assert [saved[0] == "committed" for saved in e.ok()[:4]] == list(told.values()), (e.value, e.log)
    if own:
        assert told == {1: True, 2: phase == "reported", 3: False, 4: False}
    elif not died:
        assert all(told.values())
    else:
        # The random state of one that dies before it says what it holds is lost, and with it the exact resume: that
        # save is given up. The next is made without the victim.
        assert [*told.values()].count(False) == 1 and told[1]
        assert not (phase in ("before the call", "called") and told[2])
    assert checkpoints(run) == [f"step-{step:08d}" for step, saved in told.items() if saved][-KEPT:]
    if own:
        error = ended[0].value[2][1]
        assert f"rank {victim} " in error and "state.own" in error, "who and what is missing is said"
    elif died:
        error = next(error for state, error, _ in ended[0].value if state != "committed")
        assert f"rank {victim} is gone" in error and "random state" in error
    elif phase != "reported":
        assert ended[0].logged(f"rank {victim} ")
    for entry in catalog.committed(run):
        manifest = catalog.check_full(entry)
        values = read_tensors(entry, manifest, list(manifest.tensors))
        for name in ("shared", "more") + (("own",) if own else ()):
            assert torch.equal(values[f"state.{name}"], tensors(entry.step, 0)[name])
        if own:
            assert torch.equal(values[f"rank{victim}/state.own"], tensors(entry.step, victim)["own"])
        files = {p.name for p in entry.path.glob("*.safetensors")} - {s.file for s in manifest.shards}
        assert files <= {f"{victim:05d}.safetensors"}, "of the dead rank at most"


@pytest.mark.parametrize("own", [False, True], ids=["replicated", "each its own"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_dies(tmp_path: Path, size: int, phase: str, own: bool) -> None:
    victim = 1 if size == 2 else 2
    ended = run_ranks(size, life(victim, phase, die, own=own, deadline=60), tmp_path)
    check(tmp_path / "run", ended, victim, phase, own, died=True)
    assert ended[victim].code == -signal.SIGKILL
    assert all(told[2] < 30 for told in ended[0].value[:4]), "a death is noticed at once, not at the deadline"


@pytest.mark.parametrize("own", [False, True], ids=["replicated", "each its own"])
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_hangs(tmp_path: Path, size: int, own: bool) -> None:
    """All phases at the same time: they mostly wait."""
    victim = size - 1
    worlds = {
        phase: World(size, life(victim, phase, freeze, own=own, deadline=HANG), tmp_path / str(number))
        for number, phase in enumerate(PHASES)
    }
    for number, (phase, world) in enumerate(worlds.items()):
        ended = world.wait([rank for rank in range(size) if rank != victim])
        check(tmp_path / str(number) / "run", ended, victim, phase, own)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("own", [False, True], ids=["replicated", "each its own"])
def test_a_rank_is_late_but_within_the_deadline(tmp_path: Path, phase: str, own: bool) -> None:
    ended = run_ranks(3, life(2, phase, lambda: time.sleep(0.4), own=own, deadline=60), tmp_path)
    for e in ended:
        assert [told[0] for told in e.ok()] == ["committed"] * 4
        assert not e.logged("WARNING rank")
    for entry in catalog.committed(tmp_path / "run"):
        manifest = catalog.check_full(entry)
        assert all(manifest.ranks[rank].random is not None for rank in range(3))
        assert {p.name for p in entry.path.glob("*.safetensors")} == {s.file for s in manifest.shards}


@pytest.mark.parametrize("phase", ROOT_PHASES)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_rank_0_dies(tmp_path: Path, size: int, phase: str) -> None:
    ended = run_ranks(size, life(0, phase, die, own=False, deadline=60), tmp_path)
    check_root(tmp_path / "run", ended, phase)
    for e in ended[1:]:
        assert all(told[2] < 30 for told in e.value[:3])


def check_root(run: Path, ended: list[Ended], phase: str) -> None:
    there = "step-00000002" in checkpoints(run)
    assert there == (phase in ("committed", "told"))
    for e in ended[1:]:
        states = [told[0] for told in e.ok()[:3]]
        assert states[0] == "committed"
        assert states[1] in (("committed",) if there else ("unknown", "failed")), (states, e.log)
        assert states[2] in ("unknown", "failed")
        assert e.value[-1] == "close said so"
    again = run_ranks(1, lambda rank: restored(rank), run.parent / "again", run=run)
    assert again[0].ok() == (2 if there else 1)


def restored(rank: Rank) -> int:
    state = {name: value for name, value in tensors(0, 0).items() if name != "own"}
    with rank.checkpointer(state=state, replicated=["*"]) as ckpt:
        step = ckpt.restore()
    assert torch.equal(state["shared"], tensors(step, 0)["shared"])
    return step


def test_rank_0_hangs(tmp_path: Path) -> None:
    worlds = {
        phase: World(2, life(0, phase, freeze, own=False, deadline=1.5), tmp_path / str(number))
        for number, phase in enumerate(ROOT_PHASES)
    }
    for number, (phase, world) in enumerate(worlds.items()):
        check_root(tmp_path / str(number) / "run", world.wait([1]), phase)


def test_a_rank_that_hung_and_goes_on_is_waited_for_again(tmp_path: Path) -> None:
    def main(rank: Rank) -> list[str]:
        state = tensors(0, 0)
        ckpt = rank.checkpointer(state=state, replicated=["*"], deadline=2)
        told = []
        for step in (1, 2, 3, 4):
            if step == 2 and rank.rank == 1:
                rank.mark("frozen")
                freeze()
            if step == 4 and rank.rank == 0:
                rank.mark("awake, please")
                ckpt.deadline = 60
                rank.await_mark("back")
            if step == 4 and rank.rank == 1:
                rank.mark("back")
            handle = ckpt.save(step)
            handle.wait(100)
            told.append(handle.state)
        ckpt.close()
        return told

    world = World(2, main, tmp_path)
    wait_until(lambda: (tmp_path / "mark-awake, please").exists(), "two saves without rank 1")
    world.kill(1, signal.SIGCONT)
    ended = world.wait()
    assert ended[0].ok() == ["committed"] * 4
    assert ended[1].ok()[-1] == "committed"
    assert len(ended[0].logged("rank 1 did not call save(2)")) == 1
    assert not ended[0].logged("save(3)"), "it is said once"
    last = catalog.check_full(catalog.committed(tmp_path / "run")[-1])
    assert last.step == 4 and last.ranks[1].random is not None, "the rank took part again"


def test_a_late_rank_with_something_of_its_own_is_waited_for_even_when_rank_0_is_in_a_hurry(tmp_path: Path) -> None:
    def main(rank: Rank) -> list[str]:
        own = torch.full((3,), float(rank.rank))
        with rank.checkpointer(own=own, local=["own"]) as ckpt:
            if rank.rank == 1:
                rank.await_mark("in a hurry")
                time.sleep(0.5)
            handles = []
            for step in (1, 2):
                if rank.rank == 0 and step == 2:
                    rank.mark("in a hurry")
                handles.append(ckpt.save(step))
        return [handle.state for handle in handles]

    assert [e.ok() for e in run_ranks(2, main, tmp_path)] == [["committed"] * 2] * 2


def test_different_structures_are_refused_by_name(tmp_path: Path) -> None:
    def main(rank: Rank) -> str:
        state = {"a": torch.ones(3), "b": torch.ones(4)}
        if rank.rank == 1:
            state = {"a": torch.ones(3, dtype=torch.float64), "c": torch.ones(4)}
        with pytest.raises(SaveError) as caught, rank.checkpointer(state=state, replicated=["*"]) as ckpt:
            ckpt.save(1).result()
        return str(caught.value)

    for ended in run_ranks(2, main, tmp_path):
        text = ended.ok()
        for part in ("rank 1", "state.a is float32 [3] on rank 0 and float64 [3] on rank 1", "state.b", "state.c"):
            assert part in text
    assert checkpoints(tmp_path / "run") == []
    assert not list((tmp_path / "run").glob("step-*")), "a save that was given up leaves nothing"


@pytest.mark.parametrize("who", [0, 1])
def test_restore_called_by_some_ranks_only_ends_by_the_deadline(tmp_path: Path, who: int) -> None:
    def main(rank: Rank) -> str:
        with rank.checkpointer(state=tensors(0, 0), replicated=["*"], deadline=1) as ckpt:
            if rank.rank != who:
                rank.await_mark("over")
                return "did not call"
            try:
                ckpt.restore()
            except PeerError as error:
                return str(error)
            finally:
                rank.mark("over")
        return "restored alone"

    ended = run_ranks(2, main, tmp_path)
    assert f"rank {1 - who} did not call restore()" in ended[who].ok()


def test_a_rank_that_dies_during_restore_is_named(tmp_path: Path) -> None:
    def save(rank: Rank) -> None:
        with rank.checkpointer(state=tensors(1, 0), replicated=["*"]) as ckpt:
            ckpt.save(1)

    def restore(rank: Rank) -> str:
        ckpt = rank.checkpointer(state=tensors(0, 0), replicated=["*"])
        if rank.rank == 2:
            at_operation("read", "before", ".safetensors", die)
        with pytest.raises(LastGoodError) as caught:
            ckpt.restore()
        return str(caught.value)

    for e in run_ranks(3, save, tmp_path / "1", run=tmp_path / "run"):
        e.ok()
    ended = run_ranks(3, restore, tmp_path / "2", run=tmp_path / "run")
    assert ended[2].code == -signal.SIGKILL
    assert all("rank 2" in e.ok() for e in ended[:2])


def test_ranks_that_never_come_are_named_by_the_deadline(tmp_path: Path) -> None:
    def main(rank: Rank) -> str:
        if rank.rank == 2:
            return "elsewhere"
        try:
            rank.checkpointer(state=tensors(0, 0), deadline=1)
        except PeerError as error:
            return str(error)
        return "began"

    ended = run_ranks(3, main, tmp_path)
    assert "rank 2 of 3 did not make its Checkpointer" in ended[0].ok()
    assert "rank 2 of 3" in ended[1].ok()


def test_a_rank_of_another_job_does_not_take_the_place_of_a_dead_one(tmp_path: Path) -> None:
    def first(rank: Rank) -> None:
        ckpt = rank.checkpointer(state=tensors(0, 0), replicated=["*"])
        if rank.rank == 1:
            die()
        wait_until(lambda: ckpt.channel.why_gone(1), "rank 1 to be gone")
        rank.mark("gone")
        rank.await_mark("tried")
        assert ckpt.channel.connected == set()
        ckpt.save(1, blocking=True).result()
        ckpt.close()

    def second(rank: Rank) -> str:
        try:
            rank.checkpointer(state=tensors(0, 0), replicated=["*"], deadline=0.5)
        except LastGoodError as error:
            return f"{type(error).__name__} {error}"
        return "joined"

    world = World(2, first, tmp_path / "1", run=tmp_path / "run")
    wait_until(lambda: (tmp_path / "1" / "mark-gone").exists(), "rank 1 to be gone")
    others = run_ranks(2, second, tmp_path / "2", run=tmp_path / "run")
    assert others[0].ok().startswith("RunHeldError")
    assert others[1].ok().startswith("PeerError") and "another job" in others[1].ok()
    (tmp_path / "1" / "mark-tried").touch()
    world.wait()[0].ok()


def test_one_rank_leaves_before_the_others_save(tmp_path: Path) -> None:
    def main(rank: Rank) -> str:
        ckpt = rank.checkpointer(state=tensors(0, 0), replicated=["*"])
        ckpt.save(1, blocking=True).result()
        if rank.rank == 1:
            ckpt.close()
            rank.mark("left")
            return "left"
        rank.await_mark("left")
        began = time.monotonic()
        state = ckpt.save(2, blocking=True).state
        assert time.monotonic() - began < 30
        ckpt.close()
        return state

    assert [e.ok() for e in run_ranks(2, main, tmp_path)] == ["committed", "left"]


def test_the_only_save_is_completed_without_the_random_state_of_a_rank_that_died(tmp_path: Path) -> None:
    def main(rank: Rank) -> str:
        ckpt = rank.checkpointer(state=tensors(0, 0), replicated=["*"])
        if rank.rank == 1:
            die()
        handle = ckpt.save(1, blocking=True)
        ckpt.close()
        return handle.state

    ended = run_ranks(2, main, tmp_path)
    assert ended[0].ok() == "committed", "an inexact checkpoint is better than none"
    assert ended[0].logged("rank 1 is gone")


def test_what_a_rank_wrote_too_late_is_taken_back(tmp_path: Path) -> None:
    def main(rank: Rank) -> str:
        ckpt = rank.checkpointer(state=tensors(0, 0), replicated=["*"], deadline=2)
        if rank.rank == 1:
            at_operation("create", "before", "00001.safetensors", lambda: rank.await_mark("committed"))
        handle = ckpt.save(1)
        handle.wait(100)
        rank.mark("committed") if rank.rank == 0 else None
        ckpt.close()
        return handle.state

    ended = run_ranks(2, main, tmp_path)
    assert [e.ok() for e in ended] == ["committed", "committed"]
    entry = catalog.committed(tmp_path / "run")[0]
    manifest = catalog.check_full(entry)
    assert {p.name for p in entry.path.glob("*.safetensors")} == {s.file for s in manifest.shards}
    assert ended[1].logged("came too late") and os.path.exists(entry.path)
