"""Two ranks on two hosts whose link is cut, slow, lossy, or comes back, at each phase of a save.

No wait lasts longer than the deadlines say; a rank that cannot be reached is named; rank 0 completes the save where it
has all bytes, and the checkpoint before stands where it has not. Hosts that do not share the disk are told so.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lastgood import Checkpointer, Keep, catalog, disk
from lastgood.errors import LastGoodError
from tests.faults import job as jobs
from tests.faults.crash import committed
from tests.faults.hosts import FOREVER, Hosts, hide, two_hosts
from tests.faults.job import Job, Kind, Notes, read_notes
from tests.faults.processes import Ranks, scratch
from tests.faults.report import Result

DEADLINE = 2.0
SLACK = 12.0
"""Seconds for what is no waiting: the work, and a machine that others use too."""
STEPS = 6
FAULT_AT = 3
"""The save in which the link fails."""
Fault = Literal["cut for good", "cut longer than the deadline", "cut for a moment", "slow", "lossy"]
FAULTS: tuple[Fault, ...] = ("cut for good", "cut longer than the deadline", "cut for a moment", "slow", "lossy")
_CUTS = {"cut for good": FOREVER, "cut longer than the deadline": 1.25 * DEADLINE, "cut for a moment": 0.25 * DEADLINE}


@dataclass(frozen=True)
class Case:
    """When the link fails, and how."""

    fault: Fault
    kind: Kind
    rank: int
    """Whose operation it is at which it fails."""
    operation: int
    """Of the disk operations of that rank in the save, from 0; -1 for before the save."""

    def __str__(self) -> str:
        moment = "before a save" if self.operation < 0 else f"at operation {self.operation} of rank {self.rank}"
        return f"{self.fault}, {self.kind}, {moment}"


class _Log(logging.Handler):
    def __init__(self, out: Notes) -> None:
        super().__init__(logging.WARNING)
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        self._out.write("log", text=record.getMessage())


def fail(hosts: Hosts, fault: Fault) -> None:
    if fault in _CUTS:
        hosts.wire.cut(_CUTS[fault])
    else:
        hosts.wire.worsen(**{"delay": 0.25} if fault == "slow" else {"loss": 0.15})


def live(run: Path, out: Notes, rank: int, case: Case, hosts: Hosts) -> int:
    """One rank on its host."""
    hosts.enter(rank)
    logging.getLogger("lastgood").addHandler(_Log(out))
    job = Job.build(rank, case.kind)
    lock, count, armed = threading.Lock(), 0, False

    def observe(operation: disk.Operation, when: str) -> None:
        nonlocal count
        if armed and when == "before" and operation.name not in ("read", "overwrite"):
            with lock:
                count += 1
                if count == case.operation + 1:
                    fail(hosts, case.fault)

    # A wire that is only slow or lossy loses nobody: there the deadline is to be out of reach.
    deadline = DEADLINE if case.fault in _CUTS else 60.0
    options = {**job.options, "keep": Keep(last=3), "deadline": deadline, "stale": 0.2}
    # The deadline is for a link that fails, not for a machine on which one rank comes to life seconds after the other.
    out.write("ready")
    _wait_until(lambda: bool(read_notes(out.directory, 1 - rank)))
    ckpt = Checkpointer(run, rank=rank, world_size=2, **options, **job.objects)
    ckpt.restore()
    disk.observer = observe
    for step in range(1, STEPS + 1):
        job.train(step)
        armed = step == FAULT_AT and case.operation >= 0 and rank == case.rank
        if step == FAULT_AT and case.operation < 0 and rank == 0:
            fail(hosts, case.fault)
        began = time.monotonic()
        try:
            handle = ckpt.save(step)
            handle.wait(10 * DEADLINE + SLACK)
            state, error = handle.state, str(handle.error)
        except LastGoodError as refusal:
            state, error = "refused", str(refusal)
        out.write("saved", step=step, state=state, error=error, seconds=time.monotonic() - began)
        armed = False
        # As in a real training, where no rank is ahead of the others for longer than a step.
        _wait_until(lambda step=step: len(_saved(out.directory, 1 - rank)) >= step)
    out.write("end")
    return 0


def _wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 10 * DEADLINE + SLACK
    while time.monotonic() < end and not happened():
        time.sleep(0.01)


def _saved(place: Path, rank: int) -> dict[int, dict[str, Any]]:
    """By step, what a rank notes of its save."""
    return {note["step"]: note for note in read_notes(place, rank) if note["what"] == "saved"}


def try_case(case: Case, place: Path, hosts: Hosts) -> Iterator[str]:
    """Let the link fail. Yields what is wrong."""
    run = place / "run"
    hosts.wire.mend()

    def action(rank: int) -> Callable[[], int]:
        return lambda: live(run, Notes(place, rank), rank, case, hosts)

    ranks = Ranks([action(rank) for rank in range(2)], place)
    codes = ranks.wait()
    notes = [read_notes(place, rank) for rank in range(2)]
    if set(codes.values()) != {0}:
        yield f"exit codes {codes}\n{ranks.log()}"
        return
    saved = [_saved(place, rank) for rank in range(2)]
    named = any("rank 1" in note.get("text", "") + note.get("error", "") for note in notes[0])
    # Another rank waits for the announcement of a save, and up to three deadlines for its outcome.
    patience = {0: DEADLINE + SLACK, 1: 4 * DEADLINE + SLACK} if case.fault in _CUTS else {0: 60.0, 1: 60.0}
    for rank in range(2):
        for note in saved[rank].values():
            if note["seconds"] > patience[rank]:
                yield f"rank {rank} waited {note['seconds']:.1f} s in step {note['step']}"
            if note["state"] == "pending":
                yield f"rank {rank} knows of no end of step {note['step']}"
    states = [[saved[rank][step]["state"] for step in range(1, STEPS + 1)] for rank in range(2)]
    lasting = case.fault in ("cut for good", "cut longer than the deadline")
    if not lasting and states != [["committed"] * STEPS] * 2:
        yield f"the states are {states}"
    if lasting and case.kind == "replicated" and states[0] != ["committed"] * STEPS:
        yield f"rank 0 did not complete the saves alone: {states[0]}"
    # The last of the link may have carried all that this save needed.
    missed = case.operation < 0 or max(saved[0][step]["seconds"] for step in saved[0]) > 0.9 * DEADLINE
    if lasting and missed and not named:
        yield "rank 0 names no missing rank"
    if lasting and case.kind == "own" and case.operation < 0 and states[0][FAULT_AT - 1] == "committed":
        yield "a save was committed without what only rank 1 had"
    if case.fault == "cut longer than the deadline" and [mine[-1] for mine in states] != ["committed"] * 2:
        yield f"after the link came back the ranks do not save together: {states} {saved[0][STEPS]['error']}"
    there = catalog.committed(run)
    reported = max((n["step"] for mine in saved for n in mine.values() if n["state"] == "committed"), default=0)
    if not there or there[-1].step < reported:
        yield f"step {reported} was reported, and {there} is there"
    for entry in there:
        catalog.check_full(entry)


def unshared(place: Path, hosts: Hosts, group: bool) -> Iterator[str]:
    """Rank 1's host has another disk under the run's name."""
    shared = place / "shared"
    shared.mkdir()
    hosts.wire.mend()

    def action(rank: int) -> Callable[[], int]:
        def body() -> int:
            hosts.enter(rank)
            if group:
                import torch.distributed as dist

                method = f"tcp://{hosts.addresses[0]}:29777"
                dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2)
            if rank == 1:
                hide(shared)
            job, out = Job.build(rank, "replicated"), Notes(place, rank)
            try:
                Checkpointer(shared / "run", rank=rank, world_size=2, deadline=30.0, **job.options, **job.objects)
            except LastGoodError as error:
                out.write("told", kind=type(error).__name__, error=str(error))
                return 0
            return 1

        return body

    ranks = Ranks([action(rank) for rank in range(2)], place)
    codes = ranks.wait()
    for rank in range(2):
        told = read_notes(place, rank)
        words = "do not share this disk" if group else "see one disk" if rank else "rank 1 of 2 did not make"
        if codes[rank] != 0 or not told or told[0]["kind"] != "PeerError" or words not in told[0]["error"]:
            yield f"rank {rank} was told {told}, code {codes[rank]}\n{ranks.log()}"
    if committed(shared / "run"):
        yield "a checkpoint was committed"


def cases(every: int) -> Iterator[Case]:
    """Every fault before a save and at every so many-th disk operation of each rank in it."""
    for fault in FAULTS:
        kinds: tuple[Kind, ...] = ("replicated", "own") if fault in _CUTS else ("replicated",)
        for kind in kinds:
            yield Case(fault, kind, 0, -1)
            for rank, count in ((0, 10), (1, 4)):
                for operation in range(every // 2, count, every):
                    yield Case(fault, kind, rank, operation)


QUICK = (
    Case("cut for good", "own", 0, 3),
    Case("cut longer than the deadline", "replicated", 1, 1),
    Case("cut for a moment", "own", 0, -1),
    Case("lossy", "replicated", 0, -1),
)


def run(chosen: Sequence[Case]) -> Result:
    """These cases, and hosts that do not share the disk. Raises NotAllowedError where namespaces cannot be made."""
    jobs.limit_threads()
    result = Result("Ranks on two hosts whose link fails")
    with result.timed(), scratch() as directory, two_hosts(directory / "wire.log") as hosts:
        work: list[tuple[str, str, Callable[[Path], Iterator[str]]]] = [
            (f"{case.fault}, {case.kind}", str(case), lambda place, case=case: try_case(case, place, hosts))
            for case in chosen
        ]
        for group in (False, True):
            name = f"hosts that do not share the disk, {'with' if group else 'without'} a process group"
            work.append((name, name, lambda place, group=group: unshared(place, hosts, group)))
        for kind, name, attempt in work:
            place = directory / "case"
            place.mkdir()
            try:
                problems = list(attempt(place))
            except (AssertionError, TimeoutError, LastGoodError, OSError) as error:
                problems = [f"{type(error).__name__}: {error}"]
            result.tried[kind] += 1
            result.failed += [f"{name}: {problem}" for problem in problems[:1]]
            shutil.rmtree(place, ignore_errors=True)
    return result
