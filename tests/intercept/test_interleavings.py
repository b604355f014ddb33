"""Two ranks that save the same pair, stopped anywhere between any two operations: a model of them, without processes.

Each rank is a thread that goes on by one operation when it is told to, on a directory of its own in memory. A schedule
is a list of turns, (rank, number of operations); after its last turn a rank is killed, and in the end both are.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lastgood.intercept.runtime import ranks, saving, system
from lastgood.intercept.runtime.report import Report
from lastgood.intercept.runtime.settings import Settings

NAMES = ("G_233333333333.pth", "D_233333333333.pth")
STEPS = (2, 3)
"""What the ranks save; step 1 lies there."""
ALL = 1 << 30
Schedule = list[tuple[int, int]]


class Process(threading.Thread):
    """A process that stops in front of each operation until it is its turn."""

    def __init__(self, pid: int, rank: int, work: Callable[[Process], None]) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.rank = rank
        self.holds: list[str] = []
        self.ended = False
        self._work = work
        self._turn = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        self._until: Callable[[], bool] = lambda: True
        self._killed = False
        self.error: BaseException | None = None
        self.start()
        self._done.acquire()

    def run(self) -> None:
        try:
            self.stop()
            self._work(self)
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        self._done.release()

    def stop(self, until: Callable[[], bool] = lambda: True) -> None:
        """In front of an operation, which can be done only when `until` holds."""
        if self._killed:
            raise Killed
        self._until = until
        self._done.release()
        self._turn.acquire()
        if self._killed:
            raise Killed

    def go_on(self, operations: int) -> int:
        """Returns how many of them it did: it may wait for the other one, or end."""
        for done in range(operations):
            if self.ended or not self._until():
                return done
            self._turn.release()
            self._done.acquire()
            if self.error is not None:
                raise self.error
        return operations

    def kill(self) -> None:
        """Nothing of it is done any more, and its locks are free."""
        self.holds = []
        if not self._killed:
            self._killed = True
            self._turn.release()
            self.join()


class Killed(BaseException):
    pass


class World:
    """The functions of the system, as the processes of the model see them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.processes: dict[int, Process] = {}
        self.stops_at_looks = False
        for name in ("replace", "rename", "link", "remove", "copyfile", "mkdir"):
            patch.setattr(system, name, self._stopping(getattr(system, name)))
        patch.setattr(system, "open_file", self._opening(system.open_file))
        patch.setattr(system, "listdir", self._looking(system.listdir))
        patch.setattr(system, "stat", self._looking(system.stat))
        patch.setattr(system, "locked", self._locked)
        patch.setattr(system, "is_alive", lambda pid: pid in self.processes)
        patch.setattr(system, "birth", lambda pid: "")
        patch.setattr(os, "getpid", lambda: getattr(threading.current_thread(), "pid", 1))
        patch.setattr(ranks, "rank", lambda: getattr(threading.current_thread(), "rank", 0))
        patch.setattr(system, "sync_file", lambda descriptor: None)
        patch.setattr(system, "sync_dir", lambda path: None)
        clock = itertools.count(1_000_000)
        patch.setattr(time, "time", lambda: next(clock) / 100)
        patch.setattr(atexit, "register", lambda function: function)

    def _stopping(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **keywords: Any) -> Any:
            process = threading.current_thread()
            if isinstance(process, Process):
                process.stop()
            return real(*arguments, **keywords)

        return operation

    def _looking(self, real: Callable[..., Any]) -> Callable[..., Any]:
        stopping = self._stopping(real)
        return lambda *arguments: (stopping if self.stops_at_looks else real)(*arguments)

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        stopping = self._stopping(real)

        def opening(path: str, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
            stops = "r" not in mode or self.stops_at_looks
            return (stopping if stops else real)(path, mode, *arguments, **keywords)

        return opening

    @contextlib.contextmanager
    def _locked(self, *targets: str) -> Iterator[None]:
        process = threading.current_thread()
        if not isinstance(process, Process):
            yield
            return
        wanted = [path for path in targets if path not in process.holds]
        process.stop(lambda: not any(path in other.holds for other in self.processes.values() for path in wanted))
        process.holds += wanted
        yield  # And not `finally`: a process that is killed does nothing more.
        for path in wanted:
            process.holds.remove(path)

    def start(self, process: Process) -> Process:
        self.processes[process.pid] = process
        return process

    def kill(self, process: Process) -> None:
        process.kill()
        self.processes.pop(process.pid, None)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


@pytest.fixture
def memory() -> Iterator[Path]:
    directory = tempfile.mkdtemp(prefix="lastgood-test-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    yield Path(directory)
    shutil.rmtree(directory)


def saver(run: str) -> saving.Saver:
    made = saving.Saver(Settings(run=run, complete=["G_*.pth,D_*.pth"], patience=0), Report(""))
    made.report.say = lambda message: None  # type: ignore[method-assign]
    return made


def save(by: saving.Saver, directory: Path, step: int) -> None:
    for name in NAMES:
        source = directory / f"source-{threading.get_ident()}"
        source.write_text(f"{step}")
        by.put(str(source), str(directory / name), 1, step, time.time())


class Job:
    """Two ranks, of which one begins a step when the other has saved the last one, or is dead."""

    def __init__(self, world: World, memory: Path) -> None:
        self.world = world
        self.directory = Path(tempfile.mkdtemp(dir=memory))
        self.saved = {1: [0, 1]}
        before = saver("before")
        save(before, self.directory, 0)
        save(before, self.directory, 1)
        self.ranks = [world.start(Process(100 + rank, rank, self._work)) for rank in (0, 1)]

    def _work(self, process: Process) -> None:
        mine = saver("run")
        for step in STEPS:
            process.stop(lambda: len(self.saved.get(step - 1, [])) == 2 or len(self.world.processes) == 1)  # noqa: B023
            save(mine, self.directory, step)
            self.saved.setdefault(step, []).append(process.rank)

    def run(self, schedule: Schedule) -> list[int]:
        """Returns how many operations were done in each turn."""
        done = []
        for at, (rank, operations) in enumerate(schedule):
            done.append(self.ranks[rank].go_on(operations))
            if rank not in {later for later, _ in schedule[at + 1 :]}:
                self.world.kill(self.ranks[rank])
        for process in self.ranks:
            self.world.kill(process)
        return done

    def settle(self) -> None:
        saver("after").units.settle(str(self.directory))

    def loaded(self) -> tuple[str, ...]:
        """What a program finds that is started now."""
        self.settle()
        return tuple((self.directory / name).read_text() for name in NAMES)

    def check(self, schedule: Schedule) -> None:
        g, d = self.loaded()
        assert g == d, f"{schedule}: G of step {g}, D of step {d}"
        assert int(g) >= max(self.saved), f"{schedule}: step {g}, though a rank had saved {max(self.saved)}"
        again = self.loaded()
        assert again == (g, d), f"{schedule}: first {g}, then {again}"
        marks = list((self.directory / ".lastgood").glob("open-*"))
        assert not marks, f"{schedule}: {marks}"


def check_all(world: World, memory: Path, schedules: Iterable[Schedule]) -> None:
    for schedule in schedules:
        job = Job(world, memory)
        job.run(schedule)
        job.check(schedule)
        shutil.rmtree(job.directory)


def operations(world: World, memory: Path) -> int:
    """How many a rank does for one step."""
    return Job(world, memory).run([(0, 0), (1, ALL)])[1] // len(STEPS)


def test_a_pair_fits_where_one_rank_is_killed_and_the_other_goes_on(world: World, memory: Path) -> None:
    end = operations(world, memory) + 1
    turns = itertools.product((0, 1), range(end), (*range(1, end), ALL))
    check_all(world, memory, ([(rank, one), (1 - rank, two)] for rank, one, two in turns))


def test_a_pair_fits_where_one_rank_is_killed_in_the_save_of_the_other(world: World, memory: Path) -> None:
    end = operations(world, memory) + 1
    turns = itertools.product((0, 1), range(1, end), range(1, end))
    check_all(world, memory, ([(rank, one), (1 - rank, two), (rank, end - one)] for rank, one, two in turns))


def test_a_pair_fits_where_ranks_take_turns_at_random(world: World, memory: Path) -> None:
    """Here they are stopped in front of each look at the disk, too."""
    world.stops_at_looks = True
    end = operations(world, memory)
    chance = random.Random(0)

    def schedule() -> Schedule:
        first = chance.randrange(2)
        return [((first + turn) % 2, chance.randrange(1, end)) for turn in range(chance.randrange(3, 7))]

    check_all(world, memory, (schedule() for _ in range(400)))


def test_what_a_living_rank_has_put_in_place_is_not_taken_back_by_who_looks(world: World, memory: Path) -> None:
    """Rank 0 is killed, rank 1 is in its save when another process begins, and ends it."""
    end = operations(world, memory) + 1
    for one, two in itertools.product(range(1, end), range(1, end)):
        job = Job(world, memory)
        looking = world.start(Process(200, 0, lambda _: job.settle()))  # noqa: B023 - done in this round.
        for process, count in ((job.ranks[0], one), (job.ranks[1], two), (looking, ALL), (job.ranks[1], end)):
            process.go_on(count)
            if process is not job.ranks[1]:
                world.kill(process)
        world.kill(job.ranks[1])
        job.check([(0, one), (1, two), (200, ALL), (1, end)])
        shutil.rmtree(job.directory)


def test_a_pair_fits_wherever_what_puts_it_right_is_killed(world: World, memory: Path) -> None:
    killed = 0
    for schedule in ([(0, 0), (1, one)] for one in range(operations(world, memory))):
        for two in itertools.count(1):
            job = Job(world, memory)
            job.run(schedule)
            next_start = world.start(Process(200, 0, lambda _: job.settle()))  # noqa: B023 - done in this round.
            done = next_start.go_on(two)
            world.kill(next_start)
            job.check([*schedule, (200, two)])
            shutil.rmtree(job.directory)
            if done < two:
                break
            killed += 1
    assert killed > 50
