"""Disks that are full or broken: every operation of a save fails, on every rank, while the training goes on.

In one life of a job, saves fail and succeed in turn: the first at its first operation, the next at its second, and so
on. Each failure must leave the last good checkpoint whole, be logged and raised by the handle, and be followed by a
save that succeeds and leaves nothing of the failed one behind. In the end the training must have the same bits as one
that never saved.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lastgood import Checkpointer, Keep, SaveError, catalog, commit, disk
from lastgood.errors import LastGoodError
from tests.faults import job as jobs
from tests.faults.crash import KEPT, left_overs
from tests.faults.job import FAST_SECONDS, Job, Kind, Notes, read_notes
from tests.faults.processes import Ranks, scratch
from tests.faults.report import Result

Mode = Literal["once", "late", "lasting", "short"]
"""One operation is refused; one is done and reported as failed; all are refused from one on; a write stops half-way."""
MODES: tuple[Mode, ...] = ("once", "late", "lasting", "short")
ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EMFILE")
_TAKES_SPACE = ("create", "write", "append", "mkdir", "overwrite")
_OPENS = ("create", "append", "overwrite", "read", "sync_dir")
_NEEDS = {"ENOSPC": _TAKES_SPACE, "EDQUOT": _TAKES_SPACE, "EMFILE": _OPENS}
"""What a full disk, or a process with too many open files, refuses; a broken or read-only one refuses all."""


class Trouble:
    """The observer that makes one operation of a save fail, and with mode "lasting" all that come after it."""

    def __init__(self, error: str, mode: Mode) -> None:
        self._error, self._mode = error, mode
        self._lock = threading.Lock()
        self._at: int | None = None
        self.count = 0
        """Operations since :meth:`arm`, of those that this error can hit."""
        self.struck = ""
        """What failed first."""

    def arm(self, at: int | None) -> None:
        """Let operation `at` fail, counted from now; None lets all succeed."""
        with self._lock:
            self.count, self._at, self.struck = 0, at, ""

    def __call__(self, operation: disk.Operation, when: Literal["before", "after"]) -> None:
        if operation.name not in _NEEDS.get(self._error, (operation.name,)) or operation.name == "overwrite":
            return
        if self._mode == "short" and operation.name != "write":
            return
        with self._lock:
            if when != ("after" if self._mode == "late" else "before"):
                return
            number, self.count = self.count, self.count + 1
            if self._at is None or number < self._at or (number > self._at and self._mode != "lasting"):
                return
            self.struck = self.struck or f"{operation.name} {operation.path.name}"
        if self._mode == "short":
            assert operation.data is not None and operation.file is not None
            operation.file.write(operation.data[: len(operation.data) // 2])
        code = getattr(errno, self._error)
        raise OSError(code, os.strerror(code), str(operation.path))


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def live(
    run: Path, notes: Notes, *, rank: int, world: int, kind: Kind, victim: int, error: str, mode: Mode, count: int
) -> int:
    """One rank of a life in which every other save fails, on the victim, at one operation after the other."""
    # A writer that could not write is left out for some saves; here it is to fail again in the save after the next.
    commit._RETRY_WIDTH = 1
    job = Job.build(rank, kind)
    log = _Log()
    logging.getLogger("lastgood").addHandler(log)
    trouble = Trouble(error, mode)
    with Checkpointer(
        run,
        keep=Keep(last=KEPT),
        deadline=FAST_SECONDS,
        rank=rank,
        world_size=world,
        **job.options,
        **job.objects,
    ) as ckpt:
        ckpt.restore()
        peers = len(ckpt.channel.connected)
        disk.observer = trouble if rank == victim else None
        job.train(1)
        ckpt.save(1, blocking=True).result()
        for number in range(count):
            step = 2 * number + 2
            job.train(step)
            log.lines.clear()
            trouble.arm(number)
            handle = ckpt.save(step, blocking=True)
            # The work that follows a commit belongs to the save: it is over when the next one may write.
            ckpt._finish_save()
            struck = trouble.struck
            trouble.arm(None)
            notes.write("failing", step=step, state=handle.state, struck=struck, log=bool(log.lines))
            if handle.state != "committed":
                try:
                    handle.result()
                    return 4
                except SaveError as refusal:
                    notes.write("raised", error=str(refusal))
            if rank == 0:
                _check_good(run, notes, step)
            job.train(step + 1)
            good = ckpt.save(step + 1, blocking=True)
            ckpt._finish_save()
            if good.state != "committed":
                notes.write("wrong", problem=f"step {step + 1} was not saved although the disk is well: {good.error}")
            if rank == 0:
                _check_good(run, notes, step + 1)
                problem = left_overs(run)
                if problem:
                    notes.write("wrong", problem=f"after {error} at operation {number} ({struck}): {problem}")
            if len(ckpt.channel.connected) != peers and number + 1 < count:
                notes.write("wrong", problem="a rank is gone")
                return 5
    notes.write("end", digest=job.digest(), step=2 * count + 1)
    return 0


def _check_good(run: Path, notes: Notes, step: int) -> None:
    """Every checkpoint that is there must be whole, and the one before this step must be there."""
    there = catalog.committed(run)
    if not there or there[-1].step < step - 1:
        notes.write("wrong", problem=f"at step {step} the newest is {there[-1].name if there else None}")
    for entry in there:
        try:
            catalog.check_full(entry)
        except LastGoodError as error:
            notes.write("wrong", problem=f"at step {step}: {error}")


@dataclass(frozen=True)
class Case:
    """A job in which one rank's disk fails in one way."""

    victim: int
    kind: Kind
    error: str
    mode: Mode

    def __str__(self) -> str:
        return f"{self.error} {self.mode}, rank {self.victim}, {self.kind}"


def try_case(case: Case, directory: Path, world: int = 2) -> tuple[list[str], list[str]]:
    """Let every operation fail. Returns what failed, in words, and what is wrong."""

    def life(count: int, place: Path) -> Ranks:
        def action(rank: int) -> Callable[[], int]:
            return lambda: live(
                place / "run",
                Notes(place, rank),
                rank=rank,
                world=world,
                kind=case.kind,
                victim=case.victim,
                error=case.error,
                mode=case.mode,
                count=count,
            )

        ranks = Ranks([action(rank) for rank in range(world)], place)
        ranks.wait()
        return ranks

    count = 26 if case.victim == 0 else 6
    # How many operations a save has is seen from the failures: where all were reached, there may be more.
    while True:
        place = directory / f"{case.victim}-{case.kind}-{case.error}-{case.mode}-{count}"
        ranks = life(count, place)
        failing = [note for note in read_notes(place, case.victim) if note["what"] == "failing"]
        struck = [note["struck"] for note in failing]
        reached_all = "" in struck
        wrong = [f"exit codes {ranks.codes}:\n{ranks.log()}"] if set(ranks.codes.values()) != {0} else []
        if wrong or reached_all:
            break
        count *= 2
    for rank in range(world):
        expected = jobs.reference(case.kind, rank, 2 * count + 1)
        for note in read_notes(place, rank):
            if note["what"] == "wrong":
                wrong.append(note["problem"])
            if note["what"] == "failing" and note["state"] != "committed" and not note["log"]:
                wrong.append(f"the failure of step {note['step']} is not in the log of rank {rank}")
            if note["what"] == "end" and note["digest"] != expected[note["step"]]:
                wrong.append(f"rank {rank} ended in other bits than a run that never saved")
    return [item for item in struck if item], wrong


def cases(errors: Sequence[str] = ERRORS, modes: Sequence[Mode] = MODES) -> Iterator[Case]:
    """Every combination that means something."""
    for error in errors:
        for mode in modes:
            if mode == "short" and error not in ("ENOSPC", "EDQUOT", "EIO"):
                continue  # The others come when something is opened or begun.
            for victim in (0, 1):
                yield Case(victim, "own" if mode == "once" else "replicated", error, mode)


def run(chosen: Sequence[Case], workers: int = 3) -> Result:
    """Try all cases, in several processes."""
    jobs.limit_threads()
    result = Result("Full and failing disks")
    with result.timed(), scratch() as directory:

        def work(mine: Sequence[Case], number: int) -> Callable[[], int]:
            def body() -> int:
                notes = Notes(directory / "results", number)
                for case in mine:
                    struck, wrong = try_case(case, directory)
                    notes.write("result", case=str(case), struck=struck, wrong=wrong)
                return 0

            return body

        group = Ranks([work(chosen[n::workers], n) for n in range(workers)], directory / "workers")
        group.limit = None
        codes = group.wait()
        assert set(codes.values()) == {0}, f"{codes}\n{group.log()}"
        for number in range(workers):
            for note in read_notes(directory / "results", number):
                result.tried[note["case"]] += len(note["struck"])
                result.failed += [f"{note['case']}: {problem}" for problem in note["wrong"]]
    return result


@contextmanager
def small_disk(directory: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes in memory, mounted at `directory`. Raises OSError where that is not allowed."""
    import subprocess

    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "lastgood-small", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(errno.EPERM, f"no file system can be mounted here: {done.stderr.strip()}", str(directory))
    try:
        yield directory
    finally:
        end = time.monotonic() + 10
        while subprocess.run(["umount", str(directory)], capture_output=True).returncode and time.monotonic() < end:
            time.sleep(0.1)
