"""Two jobs on one run, a job whose machine vanished, and run directories that are copied, moved and put back.

At every moment one job at most may commit. The other is told so with a sentence, or takes over when the first is really
gone; a job that was replaced does no harm when it wakes up.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lastgood import catalog, disk, generation, session
from lastgood.errors import LastGoodError, RunHeldError
from tests.faults import job as jobs
from tests.faults.crash import KEPT, committed
from tests.faults.job import Notes, read_notes
from tests.faults.powerloss import quiet
from tests.faults.processes import Ranks, end_all, scratch
from tests.faults.report import Result

BEAT_SECONDS = 0.05
STALE_SECONDS = 1.0
_FOREVER = 10**6
_REFUSED, _FAILED = 9, 8


def on_machine(name: str) -> None:
    """Let this process be on a machine of its own: other locks, another identity."""
    acquire = disk.FileLock.try_acquire.__func__
    disk.FileLock.try_acquire = classmethod(  # type: ignore[method-assign,assignment]
        lambda cls, path: acquire(cls, path.with_name(f"{path.name}-{name}"))
    )
    generation.machine_id = lambda: name


def start(run: Path, place: Path, until: int = _FOREVER, machine: str = "", world: int = 1, count: int = 1) -> Ranks:
    """Start a job, or `count` of one rank each that contend for the run."""

    def action(number: int) -> Callable[[], int]:
        def body() -> int:
            quiet()
            session.BEAT_SECONDS = BEAT_SECONDS
            if machine:
                on_machine(machine)
            out, rank = Notes(place, number), number if world > 1 else 0
            try:
                return jobs.live(
                    run, out, rank=rank, world=world, kind="replicated", until=until, keep=KEPT, stale=STALE_SECONDS
                )
            except RunHeldError as refusal:
                out.write("refused", error=str(refusal))
                return _REFUSED
            except LastGoodError as error:
                out.write("error", error=f"{type(error).__name__}: {error}")
                return _FAILED

        return body

    ranks = Ranks([action(number) for number in range(max(world, count))], place)
    ranks.limit = 100.0
    return ranks


def await_note(place: Path, what: str, count: int = 1, *, among: int = 1, seconds: float = 120.0) -> dict[str, Any]:
    """The `count`-th note of that kind that one of the processes writes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for number in range(among):
            found = [note for note in read_notes(place, number) if note["what"] == what]
            if len(found) >= count:
                return found[count - 1] | {"number": number}
        time.sleep(0.005)
    raise TimeoutError(f"{place.name}: no {count} notes {what!r}")


def restored(run: Path, place: Path, *, whole: bool = True) -> str | None:
    """Whether a new job continues from the newest manifest, with the right bits. Returns what is wrong."""
    there = committed(run)
    newest = there[-1][1] if there else 0
    ranks = start(run, place, until=1)
    codes = ranks.wait()
    notes = {note["what"]: note for note in read_notes(place, 0)}
    if "restored" not in notes:
        if whole:
            return f"nothing can be restored: {codes} {notes}\n{ranks.log()}"
        return None if "error" in notes else f"neither restored nor refused: {codes}\n{ranks.log()}"
    step = notes["restored"]["step"]
    if whole and step != newest:
        return f"restored step {step}; the newest was {newest}"
    if notes["restored"]["digest"] != jobs.reference("replicated", 0, step)[step]:
        return f"step {step} was restored with other bits"
    return None


# -- the cases: each tries something in a directory of its own, and returns what is wrong ----------------------------


def refused(place: Path, draw: random.Random) -> Iterator[str]:
    """A second job, and a third, of one rank and of two, while the first saves."""
    world = draw.choice([1, 2])
    first = start(place / "run", place / "first", world=world)
    await_note(place / "first", "committed", draw.randint(1, 6))
    second = start(place / "run", place / "second", count=2)
    codes = second.wait()
    before = read_notes(place / "first", 0)[-1].get("step", 0)
    if set(codes.values()) != {_REFUSED}:
        yield f"a second job was not refused: {codes}\n{second.log()}"
    for number in range(2):
        text = read_notes(place / "second", number)[-1].get("error", "")
        if "is held by process" not in text or "stop the other one" not in text:
            yield f"the refusal does not say who holds the run: {text}"
    await_note(place / "first", "committed", before + 3)
    first.kill()
    first.wait()
    if any(number != 1 for number, *_ in committed(place / "run")):
        yield "the second job has committed"


def contended(place: Path, draw: random.Random) -> Iterator[str]:
    """Four jobs want the run of one that has just been killed: exactly one gets it, again and again."""
    run, count = place / "run", 4
    for life in range(3):
        here = place / f"life-{life}"
        ranks = start(run, here, count=count)
        reach = draw.randint(1, 5)

        def end(ranks: Ranks = ranks, here: Path = here, reach: int = reach) -> None:
            if len(ranks.alive) == 1:  # The others have tried.
                notes = read_notes(here, ranks.alive[0])
                if sum(note["what"] == "committed" for note in notes) >= reach:
                    ranks.kill()

        codes = ranks.wait(tick=end)
        if sorted(codes.values()) != [-signal.SIGKILL] + [_REFUSED] * (count - 1):
            yield f"life {life}: not one holds the run and the others are refused: {codes}\n{ranks.log()}"
        if sum(any(note["what"] == "open" for note in read_notes(here, number)) for number in range(count)) != 1:
            yield f"life {life}: two held the run"
        numbers = {number for number, *_ in committed(run)}
        if not numbers <= set(range(1, life + 2)):
            yield f"life {life}: generations {numbers}"
    problem = restored(run, place / "last")
    if problem:
        yield problem


def vanished(place: Path, draw: random.Random) -> Iterator[str]:
    """The job's machine stands still; another one takes over; the first wakes up."""
    run = place / "run"
    first = start(run, place / "first", machine="A")
    await_note(place / "first", "committed", draw.randint(2, 6))
    time.sleep(draw.random() * 0.02)
    first.signal(signal.SIGSTOP)
    old = committed(run)
    second = start(run, place / "second", machine="B")
    taken = await_note(place / "second", "committed", KEPT + 1)["step"]
    before = {name for number, _, name in committed(run) if number == 1}

    def harm() -> None:
        if {name for number, _, name in committed(run) if number == 1} - before:
            first.kill()

    first.signal(signal.SIGCONT)
    codes = first.wait(tick=harm)
    if codes[0] not in (3, _FAILED):
        yield f"the replaced job ended with {codes}\n{first.log()}"
    after = {name for number, _, name in committed(run) if number == 1}
    if after - before:
        yield f"the replaced job has committed {sorted(after - before)}"
    await_note(place / "second", "committed", KEPT + 4)
    second.kill()
    second.wait()
    there = committed(run)
    if there[-1][0] != 2 or there[-1][1] < taken or len(there) < KEPT:
        yield f"{there} is left, and the second job had saved step {taken}"
    start_of_second = next(note["step"] for note in read_notes(place / "second", 0) if note["what"] == "restored")
    if start_of_second != old[-1][1]:
        yield f"the second job continued from {start_of_second}; the newest was {old[-1][1]}"
    problem = restored(run, place / "last")
    if problem:
        yield problem


def other_host(place: Path, draw: random.Random) -> Iterator[str]:
    """The hold of a job on another host: its heart beats, and then it does not."""
    run = place / "run"
    start(run, place / "first", until=3, machine="A").wait()
    taken = generation.generations(run)[-1]
    directory = run / "generations"
    (directory / f"{taken:08d}.end").unlink()
    record = json.loads((directory / f"{taken:08d}.json").read_text())
    (directory / f"{taken:08d}.json").write_text(json.dumps({**record, "host": "elsewhere"}))
    second = start(run, place / "second", until=4)
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        (directory / f"{taken:08d}.beat").write_text(str(beats))

    codes = second.wait(tick=beat)
    text = read_notes(place / "second", 0)[-1].get("error", "")
    if codes[0] != _REFUSED or "on elsewhere" not in text:
        yield f"a job that lives on another host was not respected: {codes} {text}\n{second.log()}"
    began = time.monotonic()
    third = start(run, place / "third", until=4)
    codes = third.wait()
    if codes[0] != 0 or time.monotonic() - began < STALE_SECONDS:
        yield f"the take-over came to {codes} after {time.monotonic() - began:.1f} s\n{third.log()}"
    del draw


def copied(place: Path, draw: random.Random) -> Iterator[str]:
    """Copies of a run that is in use: a file after the other, in any order."""
    run = place / "run"
    first = start(run, place / "first")
    await_note(place / "first", "committed", draw.randint(2, 5))
    for number in range(4):
        copy = place / f"copy-{number}"
        _copy_in_use(run, copy, backwards=number % 2 == 1)
        # What was deleted meanwhile may be missing; then an error is right, and other bits never are.
        problem = restored(copy, place / f"copied-{number}", whole=False)
        if problem:
            yield f"copy {number}: {problem}"
    seen = read_notes(place / "first", 0)[-1].get("step", 0)
    await_note(place / "first", "committed", seen + 2)
    first.kill()
    first.wait()
    problem = restored(run, place / "last")
    if problem:
        yield problem


def _copy_in_use(run: Path, copy: Path, *, backwards: bool = False) -> None:
    """Copy what is there: directories go while they are copied, as files do."""
    try:
        shutil.copytree(run, copy, copy_function=_copy, ignore=_reversed if backwards else None)
    except shutil.Error as error:
        if not all("No such file" in str(why) for _, _, why in error.args[0]):
            raise


def _copy(source: str, target: str) -> None:
    try:
        shutil.copyfile(source, target)
    except FileNotFoundError:
        pass  # It was deleted before it was its turn.


def _reversed(directory: str, names: list[str]) -> list[str]:
    names.reverse()
    return []


def moved(place: Path, draw: random.Random) -> Iterator[str]:
    """The run is moved away while a job saves to it."""
    run, there = place / "run", place / "elsewhere"
    first = start(run, place / "first")
    await_note(place / "first", "committed", draw.randint(2, 5))
    time.sleep(draw.random() * 0.02)
    run.rename(there)
    codes = first.wait()
    text = str(read_notes(place / "first", 0)[-1])
    if codes[0] not in (3, _FAILED) or not any(word in text for word in ("moved or deleted", "No such file")):
        yield f"the job whose run was moved ended with {codes}: {text}\n{first.log()}"
    if run.exists() and committed(run):
        yield "it committed into a new directory of the old name"
    problem = restored(there, place / "last")
    if problem:
        yield problem


def put_back(place: Path, draw: random.Random) -> Iterator[str]:
    """An older copy of the run takes its place while the job goes on: from this life, or from one before it."""
    run = place / "run"
    start(run, place / "zero", until=3).wait()
    if draw.random() < 0.5:
        shutil.copytree(run, place / "backup")
    first = start(run, place / "first")
    await_note(place / "first", "committed", draw.randint(2, 4))
    if not (place / "backup").exists():
        _copy_in_use(run, place / "backup")
    time.sleep(draw.random() * 0.02)
    run.rename(place / "away")
    (place / "backup").rename(run)
    time.sleep(0.3)
    first.kill()
    first.wait()
    for found in catalog.committed(run)[-1:]:
        if found.generation == 2:  # It is the job's own run of before, and it went on.
            catalog.check_full(found)
    for number, where in enumerate((run, place / "away")):
        problem = restored(where, place / f"last-{number}", whole=False)
        if problem:
            yield f"{where.name}: {problem}"


CASES: dict[str, Callable[[Path, random.Random], Iterator[str]]] = {
    "a second job is refused": refused,
    "four jobs want the run of a dead one": contended,
    "a machine stands still and wakes up": vanished,
    "a job on another host, alive and gone": other_host,
    "copied while in use": copied,
    "moved while in use": moved,
    "an older copy put in its place": put_back,
}


def run(*, count: int) -> Result:
    """Every case so many times, each time at other moments."""
    jobs.limit_threads()
    quiet()
    result = Result("Two jobs on one run; runs that are copied, moved and put back")
    with result.timed(), scratch() as directory:
        for name, case in CASES.items():
            for number in range(count):
                place = directory / "case"
                place.mkdir()
                try:
                    problems = list(case(place, random.Random(f"{name} {number}")))
                except (AssertionError, TimeoutError, LastGoodError, OSError) as error:
                    problems = [f"{type(error).__name__}: {error}"]
                end_all()
                result.tried[name] += 1
                result.failed += [f"{name}, number {number}: {problem}" for problem in problems[:1]]
                shutil.rmtree(place, ignore_errors=True)
    return result
