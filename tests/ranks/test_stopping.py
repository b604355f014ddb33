"""All ranks save the same step and end with the agreed exit code, whoever was asked to stop, and when."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import Rank, World, at_message, checkpoints, events, run_ranks, wait_until

from lastgood import disk, stop


def objects() -> dict[str, Any]:
    torch.manual_seed(1)
    return {"model": torch.nn.Linear(20, 20), "replicated": ["*"]}


def loop(rank: Rank, work: Callable[[int], None], total: int | None = None, **options: Any) -> int:
    """A training of `steps`; leaves the number of steps that this rank has done."""
    done = 0
    with rank.checkpointer(**objects(), **options) as ckpt:
        try:
            for step in ckpt.steps(total):
                work(step)
                done = step + 1
        finally:
            (rank.scratch / f"done-{rank.rank}").write_text(str(done))
    return done


def lockstep(rank: Rank) -> Callable[[int], None]:
    """Steps in which every rank needs the others, as with an all-reduce whose result the host reads."""
    rank.group()

    def work(step: int) -> None:
        dist.all_reduce(torch.ones(1))
        if step == 20:
            rank.mark(f"at-20-{rank.rank}")

    return work


def saved_step(run: Path) -> int:
    return int(checkpoints(run)[-1].split("-")[1].split(".")[0])


def assert_stopped_together(world: World, scratch: Path, code: int = 75) -> int:
    ended = world.wait()
    assert [e.code for e in ended] == [code] * len(ended)
    steps = {(scratch / f"done-{e.rank}").read_text() for e in ended}
    assert steps == {str(saved_step(scratch / "run"))}, "all ranks did the same number of steps, and that was saved"
    assert len(checkpoints(scratch / "run")) == 1
    event = next(events(scratch / "run", "save"))
    assert event["missing"] == []
    return event["step"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("to", [(0,), (2,), (0, 1, 2)], ids=["rank 0", "rank 2", "all"])
def test_a_signal_to_some_ranks_stops_all_at_the_same_step(tmp_path: Path, number: int, to: tuple[int, ...]) -> None:
    world = World(3, lambda rank: loop(rank, lockstep(rank)), tmp_path)
    wait_until(lambda: (tmp_path / f"mark-at-20-{to[0]}").exists(), "step 20")
    for rank in to:
        world.kill(rank, number)
    assert assert_stopped_together(world, tmp_path) > 20


@pytest.mark.parametrize("first", [0, 1])
def test_hosts_that_run_ahead_of_each_other_stop_at_the_step_of_the_first(tmp_path: Path, first: int) -> None:
    """As with CUDA: the host of one rank has queued many steps that the other has yet to come to."""

    def main(rank: Rank) -> None:
        def work(step: int) -> None:
            if rank.rank == first and step == 50:
                rank.mark("ahead")
                rank.await_mark("asked")  # its host now waits for the device
            elif rank.rank != first and step == 5:
                rank.await_mark("ahead")
            time.sleep(0.002)

        loop(rank, work)

    world = World(2, main, tmp_path)
    wait_until(lambda: (tmp_path / "mark-ahead").exists(), "one rank to be ahead")
    world.kill(1 - first, signal.SIGTERM)
    time.sleep(0.2)
    (tmp_path / "mark-asked").touch()
    assert assert_stopped_together(world, tmp_path) >= 51


def test_signals_at_different_steps(tmp_path: Path) -> None:
    def main(rank: Rank) -> None:
        work = lockstep(rank)

        def step(number: int) -> None:
            work(number)
            if number == 30 + rank.rank:
                os.kill(os.getpid(), signal.SIGTERM)

        loop(rank, step)

    assert assert_stopped_together(World(3, main, tmp_path), tmp_path) >= 31


def test_the_exit_code_is_the_callers_and_the_stop_file_works(tmp_path: Path) -> None:
    world = World(2, lambda rank: loop(rank, lockstep(rank), stop_code=12), tmp_path)
    wait_until(lambda: (tmp_path / "mark-at-20-1").exists(), "step 20")
    stop.ask(tmp_path / "run")
    assert_stopped_together(world, tmp_path, code=12)
    assert not (tmp_path / "run" / stop.STOP_FILE).exists()
    assert [e["why"] for e in events(tmp_path / "run", "stop")] == ["the stop file"]
    # And the next life goes on from there.
    before = saved_step(tmp_path / "run")
    again = World(2, lambda rank: loop(rank, lambda step: None, total=before + 5), tmp_path / "2", run=tmp_path / "run")
    assert [e.ok() for e in again.wait()] == [before + 5] * 2


def test_a_second_signal_ends_the_program_at_once(tmp_path: Path) -> None:
    def main(rank: Rank) -> None:
        def work(step: int) -> None:
            rank.mark(f"in-step-{rank.rank}")
            time.sleep(300)

        loop(rank, work)

    world = World(2, main, tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("mark-in-step-*"))) == 2, "the first step")
    for rank in range(2):
        world.kill(rank, signal.SIGTERM)
    # The same request, passed on by the launcher, does not count.
    time.sleep(0.1)
    for rank in range(2):
        world.kill(rank, signal.SIGINT)
    time.sleep(stop.REPEAT_SECONDS + 0.3)
    assert world.alive() == [0, 1]
    for rank in range(2):
        world.kill(rank, signal.SIGTERM)
    assert [e.code for e in world.wait()] == [-signal.SIGTERM] * 2


def test_a_second_signal_ends_a_program_whose_own_handler_would_go_on(tmp_path: Path) -> None:
    def main(rank: Rank) -> None:
        signal.signal(
            signal.SIGTERM, lambda number, frame: rank.mark(f"heard-{len(list(rank.scratch.glob('mark-h*')))}")
        )

        def work(step: int) -> None:
            rank.mark("in-step")
            time.sleep(300)

        loop(rank, work)

    world = World(1, main, tmp_path, limit=30)
    wait_until(lambda: (tmp_path / "mark-in-step").exists(), "the first step")
    world.kill(0, signal.SIGTERM)
    wait_until(lambda: (tmp_path / "mark-heard-0").exists(), "the program's own handler")
    time.sleep(stop.REPEAT_SECONDS + 0.3)
    world.kill(0, signal.SIGTERM)
    assert world.wait()[0].code == -signal.SIGTERM
    assert (tmp_path / "mark-heard-1").exists(), "it is called again, and has its chance"


def test_a_signal_twice_in_a_moment_still_saves(tmp_path: Path) -> None:
    """Ctrl-C reaches every process of the terminal, and the launcher passes it on: two signals, one request."""
    world = World(2, lambda rank: loop(rank, lockstep(rank)), tmp_path)
    wait_until(lambda: (tmp_path / "mark-at-20-1").exists(), "step 20")
    for number in (signal.SIGINT, signal.SIGTERM):
        for rank in range(2):
            world.kill(rank, number)
    assert_stopped_together(world, tmp_path)


def test_handlers_that_were_there_before_are_called_and_come_back(tmp_path: Path) -> None:
    def main(rank: Rank) -> tuple[list[int], bool]:
        heard: list[int] = []

        def former(number: int, frame: Any) -> None:
            heard.append(number)

        signal.signal(signal.SIGUSR1, former)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        work = lockstep(rank)

        def step(number: int) -> None:
            work(number)
            os.kill(os.getpid(), signal.SIGINT)  # ignored before, ignored now
            if number == 25:
                os.kill(os.getpid(), signal.SIGUSR1)

        with pytest.raises(SystemExit):
            loop(rank, step)
        return heard, signal.getsignal(signal.SIGUSR1) is former

    for ended in run_ranks(2, main, tmp_path):
        assert ended.ok() == ([signal.SIGUSR1], True)
    assert saved_step(tmp_path / "run") >= 26


def test_a_forked_worker_answers_signals_as_without_us(tmp_path: Path) -> None:
    def main(rank: Rank) -> int:
        status = -1

        def work(step: int) -> None:
            nonlocal status
            if step == 3:
                child = os.fork()
                if child == 0:
                    rank.mark(f"forked-{rank.rank}")  # before that, python drops signals in a forked child
                    time.sleep(100)
                    os._exit(0)
                rank.await_mark(f"forked-{rank.rank}")
                os.kill(child, signal.SIGTERM)
                status = os.waitpid(child, 0)[1]

        loop(rank, work, total=6)
        return os.waitstatus_to_exitcode(status)

    assert [e.ok() for e in run_ranks(2, main, tmp_path)] == [-signal.SIGTERM] * 2
    assert saved_step(tmp_path / "run") == 6


def test_a_schedule_by_minutes_saves_the_same_steps_on_all_ranks(tmp_path: Path) -> None:
    def main(rank: Rank) -> list[int]:
        rank.group()
        saved = []
        with rank.checkpointer(**objects(), minutes=0.3 / 60) as ckpt:
            save = ckpt.save

            def noting(step: int, **options: Any) -> Any:
                saved.append(step)
                return save(step, **options)

            ckpt.save = noting  # type: ignore[method-assign]
            flag = torch.zeros(1)
            for _ in ckpt.steps():
                time.sleep(0.01)
                flag[0] = float(len(saved) >= 3 and rank.rank == 0)
                dist.all_reduce(flag)
                if flag[0]:
                    break
        return saved

    ended = [e.ok() for e in run_ranks(3, main, tmp_path)]
    assert ended[0] == ended[1] == ended[2] and len(ended[0]) >= 3
    assert all(event["missing"] == [] for event in events(tmp_path / "run", "save"))


@pytest.mark.parametrize("last", [0, 1])
def test_a_meeting_is_called_while_ranks_finish(tmp_path: Path, last: int) -> None:
    """One rank has ended its loop when the other is asked to stop: nobody hangs, and the training is complete."""

    def main(rank: Rank) -> int:
        def work(step: int) -> None:
            if rank.rank == last and step == 9:
                rank.await_mark("finished")
                os.kill(os.getpid(), signal.SIGTERM)

        with rank.checkpointer(**objects()) as ckpt:
            if rank.rank != last:
                at_message(ckpt, f"here/{ckpt.generation}", "before", lambda: rank.mark("finished"))
            for step in ckpt.steps(10):
                work(step)
        return step

    ended = run_ranks(2, main, tmp_path)
    assert [e.ok() for e in ended] == [9, 9]
    assert checkpoints(tmp_path / "run") == ["step-00000010"]


def test_a_stop_in_the_last_step_but_one(tmp_path: Path) -> None:
    """Ranks are asked when some have no step left in which they could act."""

    def main(rank: Rank) -> int:
        def work(step: int) -> None:
            if step == 8 and rank.rank == 0:
                rank.await_mark("finished")
                os.kill(os.getpid(), signal.SIGTERM)
            if step == 9 and rank.rank == 1:
                rank.mark("finished")

        return loop(rank, work, total=10)

    ended = run_ranks(2, main, tmp_path)
    assert [e.ok() for e in ended] == [10, 10]
    assert checkpoints(tmp_path / "run") == ["step-00000010"]


def test_a_rank_that_is_asked_to_stop_after_rank_0_died_stops(tmp_path: Path) -> None:
    def main(rank: Rank) -> None:
        def work(step: int) -> None:
            time.sleep(0.01)
            if rank.rank == 0 and step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        loop(rank, work)

    world = World(2, main, tmp_path)
    wait_until(lambda: world.alive() == [1], "rank 0 to be dead")
    time.sleep(0.2)
    world.kill(1, signal.SIGTERM)
    ended = world.wait()
    assert ended[1].code == 75 and ended[1].logged("rank 0 is gone")


def test_two_loops_in_one_program(tmp_path: Path) -> None:
    """Meetings of the first loop mean nothing to the second."""

    def main(rank: Rank) -> list[int]:
        rank.group()
        seen = []
        with rank.checkpointer(**objects(), minutes=0.05 / 60) as ckpt:
            for total in (15, 30):
                for step in ckpt.steps(total):
                    dist.all_reduce(torch.ones(1))
                    time.sleep(0.01)
                    seen.append(step)
        return seen

    assert [e.ok() for e in run_ranks(2, main, tmp_path)] == [list(range(30))] * 2


def slow_writes(operation: disk.Operation, when: str) -> None:
    if operation.name == "write" and when == "before" and operation.path.name.endswith(".safetensors"):
        time.sleep(0.5)


@pytest.mark.parametrize("asked", [False, True], ids=["at the end", "at a stop"])
def test_the_last_save_is_never_skipped(tmp_path: Path, asked: bool) -> None:
    """``busy="skip"`` leaves out saves of which another follows. After the last one none does."""

    def main(rank: Rank) -> None:
        disk.observer = slow_writes
        work = lockstep(rank)

        def step(number: int) -> None:
            work(number)
            if asked and number == 3 and rank.rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)

        loop(rank, step, total=None if asked else 5, every=2, busy="skip")

    ended = run_ranks(2, main, tmp_path)
    assert [e.code for e in ended] == [75 * asked] * 2
    done = {int((tmp_path / f"done-{rank}").read_text()) for rank in range(2)}
    assert done == {saved_step(tmp_path / "run")}
    assert "step-00000002" in checkpoints(tmp_path / "run"), "the save that was under way"


def test_outside_the_main_thread_the_stop_file_works(tmp_path: Path) -> None:
    def main(rank: Rank) -> int:
        codes: list[Any] = []

        def train() -> None:
            try:
                loop(rank, lockstep(rank))
            except SystemExit as leave:
                codes.append(leave.code)

        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        return codes[0]

    world = World(2, main, tmp_path)
    wait_until(lambda: (tmp_path / "mark-at-20-0").exists(), "step 20")
    stop.ask(tmp_path / "run")
    assert [e.ok() for e in world.wait()] == [75, 75]


def test_a_loop_that_is_broken_off_holds_nobody(tmp_path: Path) -> None:
    def main(rank: Rank) -> int:
        def steps(ckpt: Any) -> Iterator[int]:
            for step in ckpt.steps(40):
                if rank.rank == 1 and step == 5:
                    break
                yield step

        with rank.checkpointer(**objects(), deadline=5) as ckpt:
            done = 0
            for step in steps(ckpt):
                done = step
                if rank.rank == 0 and step == 20:
                    os.kill(os.getpid(), signal.SIGTERM)
            rank.await_mark("end") if rank.rank == 1 else None
        return done

    world = World(2, main, tmp_path)
    wait_until(lambda: 0 not in world.alive(), "rank 0 to end")
    (tmp_path / "mark-end").touch()
    ended = world.wait()
    assert ended[0].code == 75 and ended[1].ok() == 4
    assert saved_step(tmp_path / "run") == 21
