"""Two jobs on one run, jobs whose machine is gone, and run directories that move."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import Rank, World, checkpoints, die, events, freeze, run_ranks, wait_until

import lastgood
from lastgood import Keep, LastGoodError, PeerError, RunHeldError, SaveError, catalog, disk, generation
from lastgood.files import is_temporary
from lastgood.world import job_id


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((40,), value)}


def on_machine(name: str) -> None:
    """Let this process be on a machine of its own: other locks, another identity."""
    acquire = disk.FileLock.try_acquire.__func__
    disk.FileLock.try_acquire = classmethod(  # type: ignore[method-assign,assignment]
        lambda cls, path: acquire(cls, path.with_name(f"{path.name}-{name}"))
    )
    generation.machine_id = lambda: name


def test_a_second_job_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    def main(rank: Rank) -> Any:
        if rank.rank == 1:
            rank.await_mark("held")
            with pytest.raises(RunHeldError) as caught:
                lastgood.Checkpointer(rank.run, state=state())
            rank.mark("tried")
            return str(caught.value)
        with lastgood.Checkpointer(rank.run, state=state()) as ckpt:
            ckpt.save(1)
            rank.mark("held")
            rank.await_mark("tried")
            ckpt.save(2, blocking=True).result()
        return os.getpid()

    pid, text = (e.ok() for e in run_ranks(2, main, tmp_path))
    assert f"process {pid} on " in text and "command: " in text
    assert checkpoints(tmp_path / "run") == ["step-00000001", "step-00000002"]


def test_a_job_of_many_ranks_holds_the_run_as_one(tmp_path: Path) -> None:
    def first(rank: Rank) -> None:
        with rank.checkpointer(state=state(), replicated=["*"]) as ckpt:
            rank.mark(f"held-{rank.rank}")
            rank.await_mark("tried")
            ckpt.save(1, blocking=True).result()

    def second(rank: Rank) -> str:
        with pytest.raises(LastGoodError) as caught:
            rank.checkpointer(state=state(), replicated=["*"], deadline=0.5)
        return type(caught.value).__name__

    world = World(2, first, tmp_path / "1", run=tmp_path / "run")
    wait_until(lambda: len(list((tmp_path / "1").glob("mark-held-*"))) == 2, "the first job")
    assert [e.ok() for e in run_ranks(2, second, tmp_path / "2", run=tmp_path / "run")] == ["RunHeldError", "PeerError"]
    (tmp_path / "1" / "mark-tried").touch()
    for e in world.wait():
        e.ok()


def test_two_jobs_that_start_at_once_do_not_mix(tmp_path: Path) -> None:
    """No launcher tells them apart: the process group of each does."""
    first, second = tmp_path / "1", tmp_path / "2"

    def one(rank: Rank) -> int:
        rank.group()
        if rank.rank:
            wait_until(lambda: (second / "mark-tried").exists(), "the rank of the other job")
        with rank.checkpointer(state=state(), replicated=["*"], deadline=30.0) as ckpt:
            return ckpt.restore()

    def other(rank: Rank) -> str:
        rank.group()
        if rank.rank == 0:
            rank.await_mark("tried")  # late: it has not even tried to take the run
            return ""
        wait_until(lambda: (rank.run / "generations" / "00000001.json").exists(), "the first job")
        try:
            with pytest.raises(PeerError) as caught:
                rank.checkpointer(state=state(), replicated=["*"], deadline=2.0)
        finally:
            rank.mark("tried")
        return str(caught.value)

    world = World(2, one, first, run=tmp_path / "run", limit=60.0)
    ended = run_ranks(2, other, second, run=tmp_path / "run", limit=60.0)
    assert [e.ok() for e in world.wait()] == [0, 0]
    assert "held by another job" in ended[1].ok()


def test_what_tells_jobs_apart_before_there_is_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The master's port under torchrun, which gives it to all its ranks; elsewhere a rank may have one of its own."""
    for elastic in (False, True):
        if elastic:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        else:
            monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        found = set()
        for port in ("29500", "29501"):
            monkeypatch.setenv("MASTER_PORT", port)
            found.add(job_id())
        assert len(found) == (2 if elastic else 1)


def test_a_job_that_died_here_is_replaced_at_once(tmp_path: Path) -> None:
    def first(rank: Rank) -> None:
        ckpt = lastgood.Checkpointer(rank.run, state=state())
        ckpt.save(1, blocking=True)
        die()

    def second(rank: Rank) -> tuple[int, float]:
        began = time.monotonic()
        with lastgood.Checkpointer(rank.run, state=state(0)) as ckpt:
            return ckpt.restore(), time.monotonic() - began

    run_ranks(1, first, tmp_path / "1", run=tmp_path / "run")
    step, seconds = run_ranks(1, second, tmp_path / "2", run=tmp_path / "run")[0].ok()
    assert step == 1 and seconds < 30


@pytest.mark.parametrize("links", [True, False])
def test_a_job_that_dies_while_it_takes_the_run_leaves_no_half_record(tmp_path: Path, links: bool) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    def first(rank: Rank) -> None:
        def observe(operation: disk.Operation, when: str) -> None:
            if when == "before" and operation.name == "write" and operation.path.parent.name == "generations":
                die()

        disk.observer = observe
        lastgood.Checkpointer(rank.run, state=state())

    def second(rank: Rank) -> float:
        if not links:
            disk.link = refuse
        began = time.monotonic()
        with lastgood.Checkpointer(rank.run, state=state()) as ckpt:
            ckpt.save(1, blocking=True).result()
        return time.monotonic() - began

    assert run_ranks(1, first, tmp_path / "1", run=tmp_path / "run")[0].code == -signal.SIGKILL
    assert len(disk.names(tmp_path / "run" / "generations")) == 1
    assert run_ranks(1, second, tmp_path / "2", run=tmp_path / "run")[0].ok() < 30
    names = disk.names(tmp_path / "run" / "generations")
    assert "00000001.json" in names and not [name for name in names if is_temporary(name)]


def test_a_job_whose_machine_vanished_is_replaced_once_its_heart_stands_still(tmp_path: Path) -> None:
    def first(rank: Rank) -> None:
        on_machine("A")
        ckpt = lastgood.Checkpointer(rank.run, state=state())
        ckpt.save(1, blocking=True)
        die()

    def second(rank: Rank) -> tuple[int, float, int]:
        on_machine("B")
        began = time.monotonic()
        with lastgood.Checkpointer(rank.run, state=state(0), stale=1.0) as ckpt:
            return ckpt.restore(), time.monotonic() - began, ckpt.generation

    run_ranks(1, first, tmp_path / "1", run=tmp_path / "run")
    step, seconds, number = run_ranks(1, second, tmp_path / "2", run=tmp_path / "run")[0].ok()
    assert step == 1 and seconds >= 1.0 and number == 2


def test_the_other_ranks_wait_while_rank_0_watches_a_heart_that_stands_still(tmp_path: Path) -> None:
    """With a deadline shorter than the watch."""

    def first(rank: Rank) -> None:
        on_machine("A")
        ckpt = lastgood.Checkpointer(rank.run, state=state())
        ckpt.save(1, blocking=True)
        die()

    def second(rank: Rank) -> int:
        on_machine("B" if rank.rank == 0 else "C")
        with rank.checkpointer(state=state(0), replicated=["*"], stale=14.0, deadline=6.0) as ckpt:
            return ckpt.restore()

    run_ranks(1, first, tmp_path / "1", run=tmp_path / "run")
    assert [e.ok() for e in run_ranks(2, second, tmp_path / "2", run=tmp_path / "run")] == [1, 1]


@pytest.mark.parametrize("machine", ["A", "B"])
def test_a_rank_whose_rank_0_was_refused_says_who_holds_the_run(tmp_path: Path, machine: str) -> None:
    """Without a process group nobody tells it: it looks."""

    def holder(rank: Rank) -> int:
        on_machine("A")
        with lastgood.Checkpointer(rank.run, state=state()):
            rank.mark("held")
            rank.await_mark("told")
        return os.getpid()

    def other(rank: Rank) -> str:
        rank.await_mark("held")
        on_machine(machine)
        try:
            lastgood.Checkpointer(rank.run, state=state(), rank=1, world_size=2, deadline=0.5)
        except PeerError as error:
            return str(error)
        finally:
            rank.mark("told")
        return "found"

    pid, text = (e.ok() for e in run_ranks(2, [holder, other], tmp_path))
    assert f"is held by process {pid} on " in text and "waited in vain" in text


@pytest.mark.parametrize("reason", ["held", "a file", "not writable"])
def test_all_ranks_are_told_at_once_why_rank_0_cannot_take_the_run(tmp_path: Path, reason: str) -> None:
    """Again with every try, until it can."""

    run = tmp_path / "parent" / "run"
    run.parent.mkdir()
    if reason == "a file":
        run.write_text("")

    def meet(rank: Rank, name: str) -> None:
        rank.mark(f"{name}-{rank.rank}")
        rank.await_mark(f"{name}-{1 - rank.rank}", 30.0)

    def main(rank: Rank) -> tuple[list[str], int]:
        rank.group()
        told = []
        make_dirs = disk.make_dirs
        if rank.rank == 0 and reason == "not writable":
            disk.make_dirs = refuse
        for number in range(2):
            meet(rank, f"try-{number}")
            with pytest.raises(LastGoodError) as caught:
                rank.checkpointer(run=run, state=state(), replicated=["*"])
            told.append(f"{type(caught.value).__name__} {caught.value}")
        disk.make_dirs = make_dirs
        meet(rank, "told")
        if rank.rank == 0 and reason == "held":
            (tmp_path / "holder" / "mark-end").touch()
            wait_until(lambda: (run / "generations" / "00000001.end").exists(), "the holder's end")
            time.sleep(0.2)
        elif rank.rank == 0 and reason == "a file":
            run.unlink()
        meet(rank, "free")
        with rank.checkpointer(run=run, state=state(), replicated=["*"], deadline=20.0) as ckpt:
            return told, ckpt.restore()

    def hold(rank: Rank) -> None:
        with lastgood.Checkpointer(rank.run, state=state()):
            rank.mark("held")
            rank.await_mark("end", 50.0)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    if reason == "held":
        holder = World(1, hold, tmp_path / "holder", run=run, limit=60.0)
        wait_until(lambda: (tmp_path / "holder" / "mark-held").exists(), "the holder")
    ended = run_ranks(2, main, tmp_path / "2", limit=60.0)
    if reason == "held":
        holder.wait()[0].ok()
    zero, one = (e.ok() for e in ended)
    assert zero[1] == one[1] == 0 and all(e.seconds < 40 for e in ended), "not at the deadline"
    texts = {"held": "is held by process", "a file": "is a file", "not writable": "cannot be written"}
    kind = "RunHeldError" if reason == "held" else "LastGoodError"
    for text in (*zero[0], *one[0]):
        assert text.startswith(kind) and texts[reason] in text


def test_a_job_that_lives_on_another_machine_is_not_replaced(tmp_path: Path) -> None:
    def first(rank: Rank) -> None:
        on_machine("A")
        with lastgood.Checkpointer(rank.run, state=state()):
            rank.mark("held")
            rank.await_mark("tried")

    def second(rank: Rank) -> str:
        on_machine("B")
        rank.await_mark("held")
        try:
            lastgood.Checkpointer(rank.run, state=state(), stale=40.0)
        except RunHeldError as error:
            return str(error)
        finally:
            rank.mark("tried")
        return "taken"

    assert "is held by process" in run_ranks(2, [first, second], tmp_path)[1].ok()


def test_a_replaced_job_that_wakes_up_does_no_harm(tmp_path: Path) -> None:
    def first(rank: Rank) -> tuple[str, str, list[str]]:
        on_machine("A")
        ckpt = lastgood.Checkpointer(rank.run, state=state(), keep=Keep(last=1))
        ckpt.save(1, blocking=True).result()
        handle = ckpt.save(2, blocking=True)
        rank.mark("asleep")
        freeze()
        rank.await_mark("replaced")
        before = sorted(path.name for path in rank.run.glob("step-*"))
        handle = ckpt.save(3, blocking=True)
        with pytest.raises(SaveError):
            ckpt.close()
        assert sorted(path.name for path in rank.run.glob("step-*")) == before, "nothing deleted, nothing left"
        return handle.state, f"{type(handle.error).__name__} {handle.error}", before

    def second(rank: Rank) -> list[str]:
        on_machine("B")
        with lastgood.Checkpointer(rank.run, state=state(0), stale=5.0, keep=Keep(last=9)) as ckpt:
            assert ckpt.restore() == 2
            ckpt.save(3, blocking=True).result()
            rank.mark("replaced")
            rank.await_mark("woken")
            ckpt.save(4, blocking=True).result()
        return checkpoints(rank.run)

    world = World(1, first, tmp_path / "1", run=tmp_path / "run")
    wait_until(lambda: (tmp_path / "1" / "mark-asleep").exists(), "the first job to sleep")
    other = World(1, second, tmp_path / "2", run=tmp_path / "run")
    wait_until(lambda: (tmp_path / "2" / "mark-replaced").exists(), "the second job to take over")
    (tmp_path / "1" / "mark-replaced").touch()
    world.kill(0, signal.SIGCONT)
    kind, text, before = world.wait()[0].ok()
    (tmp_path / "2" / "mark-woken").touch()
    assert kind == "failed" and text.startswith("ReplacedError") and "taken over by generation 2" in text
    assert other.wait()[0].ok() == [*before, "step-00000004.g2"]
    for entry in catalog.committed(tmp_path / "run"):
        catalog.check_full(entry)


def test_a_run_that_is_moved_away_takes_no_more_saves(tmp_path: Path) -> None:
    def main(rank: Rank) -> str:
        ckpt = lastgood.Checkpointer(rank.run, state=state())
        ckpt.save(1, blocking=True).result()
        os.rename(rank.run, rank.run.with_name("moved"))
        handle = ckpt.save(2, blocking=True)
        time.sleep(5)  # two heartbeats: said once
        with pytest.raises(SaveError, match="moved or deleted"):
            ckpt.close()
        return handle.state

    (ended,) = run_ranks(1, main, tmp_path)
    assert ended.ok() == "failed"
    assert len(ended.logged("the heartbeat of")) == 1 and not ended.logged("Traceback")
    assert checkpoints(tmp_path / "moved") == ["step-00000001"]
    again = run_ranks(1, lambda rank: restored(rank), tmp_path / "2", run=tmp_path / "moved")
    assert again[0].ok() == 1


def restored(rank: Rank) -> int:
    with lastgood.Checkpointer(rank.run, state=state(0)) as ckpt:
        return ckpt.restore()


def test_a_new_run_under_the_name_of_one_that_was_moved_away_is_not_written_to(tmp_path: Path) -> None:
    def first(rank: Rank) -> str:
        ckpt = lastgood.Checkpointer(rank.run, state=state())
        ckpt.save(1, blocking=True).result()
        os.rename(rank.run, rank.run.with_name("moved"))
        rank.mark("moved")
        rank.await_mark("begun")
        handle = ckpt.save(2, blocking=True)
        with pytest.raises(SaveError):
            ckpt.close()
        return str(handle.error)

    def second(rank: Rank) -> None:
        rank.await_mark("moved")
        with lastgood.Checkpointer(rank.run, state=state(5)) as ckpt:
            assert ckpt.restore() == 0
            ckpt.save(1, blocking=True).result()
            rank.mark("begun")

    ended = run_ranks(2, [first, second], tmp_path)
    ended[1].ok()
    assert "another run" in ended[0].ok()
    assert checkpoints(tmp_path / "run") == ["step-00000001"]


def test_a_copy_of_a_run_in_use_is_a_run(tmp_path: Path) -> None:
    def main(rank: Rank) -> list[int]:
        with lastgood.Checkpointer(rank.run, state=state()) as ckpt:
            ckpt.save(1, blocking=True).result()
            shutil.copytree(rank.run, rank.run.with_name("copy"))
            ckpt.save(2, blocking=True).result()
        steps = []
        for run in (rank.run, rank.run.with_name("copy")):
            with lastgood.Checkpointer(run, state=state(0)) as ckpt:
                steps.append(ckpt.restore())
        return steps

    assert run_ranks(1, main, tmp_path)[0].ok() == [2, 1]


# -- permissions and the log ------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become another user")
def test_a_colleague_of_the_group_takes_the_run_over(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    run = tmp_path / "run"
    run.mkdir()
    os.chown(run, 4001, 4000)

    def as_user(user: int) -> Any:
        def main(rank: Rank) -> int:
            os.umask(0o022)
            os.setgroups([4000])
            os.setgid(user)
            os.setuid(user)
            with lastgood.Checkpointer(run, state=state(0), group=4000, keep=Keep(last=1)) as ckpt:
                step = ckpt.restore()
                ckpt.save(step + 1, blocking=True).result()
            return step

        return main

    for number, user in enumerate((4001, 4002, 4001)):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        scratch.chmod(0o777)
        (ended,) = run_ranks(1, as_user(user), scratch, run=run)
        assert ended.ok() == number
        assert not ended.logged("WARNING") and not ended.logged("could not be")
    assert len(checkpoints(run)) == 1, "what the colleague made could be deleted"
    for path in run.glob("step-*/*"):
        assert path.stat().st_gid == 4000 and mode(path) & 0o060 == 0o060


def test_the_umask_is_honoured(tmp_path: Path) -> None:
    def main(rank: Rank) -> None:
        os.umask(0o077 if rank.size == 1 else 0o002)
        with rank.checkpointer(state=state(), replicated=["*"], mirror=rank.run.with_name("mirror")) as ckpt:
            ckpt.restore()
            ckpt.save(1, blocking=True).result()

    for size, directory, file in ((1, 0o700, 0o600), (2, 0o775, 0o664)):
        for e in run_ranks(size, main, tmp_path / str(size)):
            e.ok()
        found = [p for name in ("run", "mirror") for p in (tmp_path / str(size) / name).rglob("*")]
        assert len(found) > 8
        for path in found:
            assert mode(path) == (directory if path.is_dir() else file), path


def test_the_event_log_tells_what_happened(tmp_path: Path) -> None:
    def main(rank: Rank) -> None:
        for life in range(2):
            with rank.checkpointer(
                state=state(), replicated=["*"], keep=Keep(last=2), tensorboard=rank.scratch / "board"
            ) as ckpt:
                step = ckpt.restore()
                for _ in range(2):
                    step += 1
                    ckpt.save(step, blocking=True, metrics={"loss": 1 / step}).result()
                if life:
                    ckpt.restore(step=3)

    for e in run_ranks(2, main, tmp_path):
        e.ok()
    log = list(events(tmp_path / "run"))
    told = [(event["event"], event["step"], event["generation"]) for event in log]
    assert told == [
        ("save", 1, 1),
        ("save", 2, 1),
        ("restore", 2, 2),
        ("delete", 1, 2),
        ("save", 3, 2),
        ("delete", 2, 2),
        ("save", 4, 2),
        ("restore", 3, 3),
    ]
    save = log[4]
    assert save["checkpoint"] == "step-00000003.g2" and save["deleted"] == ["step-00000001"]
    assert save["metrics"] == {"loss": pytest.approx(1 / 3)} and save["missing"] == []
    size = sum(p.stat().st_size for p in (tmp_path / "run" / "step-00000003.g2").glob("*.safetensors"))
    assert save["bytes"] == size and save["seconds"] > 0 and save["stall"] >= 0
    assert all(abs(event["time"] - time.time()) < 300 for event in log)
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen = set()
    for directory in (tmp_path / "board",):
        reader = board.EventAccumulator(str(directory))
        reader.Reload()
        for name in reader.Tags()["scalars"]:
            seen |= {(name, item.step) for item in reader.Scalars(name)}
    assert seen == {(f"lastgood/{n}", s) for n in ("bytes", "seconds", "stall_seconds") for s in (1, 2, 3, 4)}
