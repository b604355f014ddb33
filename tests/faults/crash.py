"""SIGKILL before and after every disk operation of a job's life, and in the middle of every write.

A life of the job restores, saves two steps (with retention) and closes; one rank of it is killed at one point. Then a
new life restores and trains to the end. The judge knows nothing of lastgood but where a manifest lies: the new life
must continue from the newest one, and end in the same bits as a run that was never killed.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lastgood import disk
from tests.faults import job as jobs
from tests.faults.job import Kind, Notes, read_notes
from tests.faults.killer import Killer, Moment
from tests.faults.processes import Ranks, scratch
from tests.faults.report import Result

MOMENTS: tuple[Moment, ...] = ("before", "torn", "after")
Scenario = Literal["new", "old"]
"""Whether the run that is killed is empty, or holds checkpoints, history and the left-over of a dead save."""
UNTIL = {"new": 2, "old": 6}
"""The step after which the killed life would end."""
END = 9
"""The step at which the final bits are compared: after every life that is killed."""
LINKED = 2
"""So many steps more, where files are shared by hard link: that begins with the third save of a life."""
KEPT = 2
_STEP = re.compile(r"step-(\d+)(?:\.g(\d+)(?:\.(\d+))?)?")


@dataclass(frozen=True)
class Point:
    """Where a life is ended."""

    world: int
    victim: int
    kind: Kind
    scenario: Scenario
    number: int
    """Of the victim's disk operations, from 0."""
    operation: str
    moment: Moment

    def __str__(self) -> str:
        return (
            f"{self.world} rank(s), {self.kind}, {self.scenario} run: rank {self.victim} killed {self.moment} "
            f"operation {self.number} ({self.operation})"
        )


def committed(run: Path) -> list[tuple[int, int, str]]:
    """Generation, step and name of every directory that holds a manifest, from old to new."""
    found = []
    for path in run.glob("step-*/manifest.json"):
        match = _STEP.fullmatch(path.parent.name)
        assert match is not None, path
        found.append((int(match[2] or 1), int(match[1]), path.parent.name))
    return sorted(found)


def start(run: Path, notes: Path, world: int, kind: Kind, until: int, killers: dict[int, Killer]) -> Ranks:
    """Start one life of the job."""

    def action(rank: int) -> Callable[[], int]:
        def body() -> int:
            disk.observer = killers.get(rank)
            out = Notes(notes, rank)
            code = jobs.live(run, out, rank=rank, world=world, kind=kind, until=until, keep=KEPT)
            if rank in killers:
                out.write("operations", seen=killers[rank].seen, done=sorted(killers[rank].done))
            return code

        return body

    return Ranks([action(rank) for rank in range(world)], notes)


def make_template(directory: Path, world: int, kind: Kind) -> None:
    """A run with history: steps 1 to 4 were saved, 3 and 4 are kept, and a save of step 5 died half-way."""
    run = directory / "run"
    codes = start(run, directory / "notes", world, kind, 4, {}).wait()
    assert set(codes.values()) == {0}, codes
    dead = run / "step-00000005"
    dead.mkdir()
    shutil.copy(run / "step-00000004" / "00000.safetensors", dead)
    (dead / "manifest.json.tmp").write_bytes((run / "step-00000004" / "manifest.json").read_bytes()[:100])


@dataclass
class Campaign:
    """All points of one world, kind and scenario."""

    world: int
    kind: Kind
    scenario: Scenario
    directory: Path
    expected: dict[int, dict[int, str]] = field(default_factory=dict)
    """By rank and step, the digest of a run that was never killed."""

    @property
    def until(self) -> int:
        """The step after which the killed life would end."""
        return UNTIL[self.scenario] + (LINKED if self.kind == "frozen" else 0)

    def prepare(self) -> None:
        self.directory.mkdir()
        self.expected = {rank: jobs.reference(self.kind, rank, END) for rank in range(self.world)}
        if self.scenario == "old":
            make_template(self.directory / "template", self.world, self.kind)

    def points(self, victims: Sequence[int]) -> Iterator[Point]:
        """Every point of every victim, from a life that is not killed."""
        place = self._place("count")
        killers = {rank: Killer() for rank in range(self.world)}
        ranks = start(place / "run", place / "first", self.world, self.kind, self.until, killers)
        codes = ranks.wait()
        assert set(codes.values()) == {0}, f"the life that counts the operations failed: {codes}\n{ranks.log()}"
        for victim in victims:
            last = read_notes(place / "first", victim)[-1]
            for number, operation in enumerate(last["seen"]):
                for moment in MOMENTS:
                    if moment == "torn" and not operation.startswith(("write", "append")):
                        continue
                    if moment == "after" and number not in last["done"]:
                        continue  # It was refused, such as the removal of what is not there.
                    yield Point(self.world, victim, self.kind, self.scenario, number, operation, moment)

    def _place(self, name: str) -> Path:
        place = self.directory / name
        if self.scenario == "old":
            shutil.copytree(self.directory / "template" / "run", place / "run")
        place.mkdir(exist_ok=True)
        return place

    def try_point(self, point: Point) -> str | None:
        """Kill, resume, judge. Returns what is wrong, or None."""
        place = self._place(f"{point.victim}-{point.number}-{point.moment}")
        try:
            return self._judge(point, place)
        except (AssertionError, TimeoutError) as error:
            return str(error)
        finally:
            shutil.rmtree(place)

    def _judge(self, point: Point, place: Path) -> str | None:
        run = place / "run"
        killers = {point.victim: Killer(point.number, point.moment)}
        first = start(run, place / "first", self.world, self.kind, self.until, killers)

        def after_death(rank: int) -> None:
            # A rank that is still looking for a rank 0 that will never come is ended, as a launcher would.
            opened = [r for r in first.alive if read_notes(place / "first", r)]
            lost = [r for r in first.alive if r not in opened]
            if lost:
                first.kill(*lost)

        codes = first.wait(after_death)
        if codes[point.victim] != -signal.SIGKILL:
            return f"the point was not reached: {codes}\n{first.log()}"
        there = committed(run)
        newest = there[-1][1] if there else 0
        for rank in range(self.world):
            for note in read_notes(place / "first", rank):
                if note["what"] == "committed" and note["step"] > newest:
                    return f"rank {rank} was told that step {note['step']} is saved; the newest is {newest}"
        second = start(run, place / "second", self.world, self.kind, END, {})
        codes = second.wait()
        if set(codes.values()) != {0}:
            return f"the next life failed: {codes}\n{second.log()}"
        for rank in range(self.world):
            notes = {note["what"]: note for note in read_notes(place / "second", rank)}
            if notes["restored"]["step"] != newest:
                return f"rank {rank} continued from step {notes['restored']['step']}; the newest was {newest}"
            if notes["restored"]["digest"] != self.expected[rank][newest]:
                return f"rank {rank} restored other bits than step {newest} had\n{second.log()}"
            if notes["end"]["digest"] != self.expected[rank][END]:
                return f"rank {rank} ended in other bits than a run that was never killed"
        return left_overs(run)


def left_overs(run: Path) -> str | None:
    """What a finished job should not leave behind."""
    names = {entry[2] for entry in committed(run)}
    wrong = [path for path in run.glob("step-*") if path.name not in names]
    wrong += [path for path in run.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".lastgood")]
    if wrong:
        return f"left behind: {[str(path.relative_to(run)) for path in wrong]}"
    if len(names) > KEPT:
        return f"more is kept than the policy wants: {sorted(names)}"
    return None


def run_points(campaign: Campaign, points: Sequence[Point], workers: int) -> Iterator[tuple[Point, str | None]]:
    """Try all points, in several processes."""
    lists = [points[index::workers] for index in range(workers)]
    results = campaign.directory / "results"

    def work(mine: Sequence[Point]) -> Callable[[], int]:
        def body() -> int:
            notes = Notes(results, os.getpid())
            for point in mine:
                notes.write("result", index=points.index(point), problem=campaign.try_point(point))
            return 0

        return body

    group = Ranks([work(mine) for mine in lists], campaign.directory / "workers")
    group.limit = None
    codes = group.wait()
    assert set(codes.values()) == {0}, f"{codes}\n{group.log()}"
    found = {}
    for path in results.glob("*.jsonl"):
        for note in read_notes(results, int(path.stem)):
            found[note["index"]] = note["problem"]
    assert len(found) == len(points)
    shutil.rmtree(results)
    return zip(points, (found[index] for index in range(len(points))), strict=True)


def run(
    worlds: Sequence[int],
    *,
    kinds: Sequence[Kind],
    scenarios: Sequence[Scenario] = ("old", "new"),
    victims: Sequence[int] | None = None,
    workers: int = 3,
) -> Result:
    """Every point of every combination."""
    jobs.limit_threads()
    result = Result(f"Killed at every disk operation, {' and '.join(map(str, worlds))} rank(s)")
    with result.timed(), scratch() as directory:
        for number, (world, kind, scenario) in enumerate(itertools.product(worlds, kinds, scenarios)):
            if world == 1 and kind == "differing":
                continue  # One rank differs from none.
            campaign = Campaign(world, kind, scenario, directory / str(number))
            campaign.prepare()
            chosen = [rank for rank in range(world) if victims is None or rank in victims]
            points = list(campaign.points(chosen))
            for point, problem in run_points(campaign, points, workers):
                result.tried[f"{world} rank(s), {kind}, {scenario}, rank {point.victim} killed"] += 1
                if problem is not None:
                    result.failed.append(f"{point}: {problem}")
            shutil.rmtree(campaign.directory)
    return result
