"""Every state in which a power cut may leave the disk, and the recovery from each; then one fsync less at a time."""

from __future__ import annotations

import logging
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from lastgood import Checkpointer, catalog, disk, generation
from lastgood.errors import LastGoodError
from lastgood.manifest import parse
from tests.faults import job as jobs
from tests.faults.job import Notes
from tests.faults.posix_model import Disk, Effect, Event, Tree
from tests.faults.processes import Ranks, scratch
from tests.faults.report import Result

_EFFECTS: dict[str, Effect] = {"append": "write", "overwrite": "truncate"}
WORLD = 2
RUN = "runs/voice"
"""The run, in the directory that stands for the whole disk; `runs` is there and durable at the start."""


class Recorder:
    """The observer that writes the history down, with the time of each operation on the clock that all ranks share."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.events: list[tuple[int, Event]] = []

    def __call__(self, operation: disk.Operation, when: str) -> None:
        # The directories above the disk are not part of the model.
        if when == "before" or operation.name == "read" or not operation.path.is_relative_to(self._root):
            return
        effect: Effect = _EFFECTS.get(operation.name, operation.name)  # type: ignore[arg-type]
        data = b"" if operation.data is None else bytes(operation.data)
        self._add(Event(effect, self._name(operation.path), self._name(operation.source), data, _site(operation.name)))

    def report(self, path: Path) -> None:
        self._add(Event("report", path.name))

    def _add(self, event: Event) -> None:
        self.events.append((time.monotonic_ns(), event))

    def _name(self, path: Path | None) -> str:
        return "" if path is None else str(path.relative_to(self._root))


def _site(operation: str) -> str:
    """The innermost line of code outside of disk.py that is responsible for an operation."""
    frame = sys._getframe(2)
    while frame.f_back is not None and Path(frame.f_code.co_filename).name in ("disk.py", "contextlib.py"):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}: {operation}"


def record(directory: Path) -> list[Event]:
    """The history of two lives of a job of two ranks: a new run with retention, then a roll-back and a new branch."""
    root = directory / "disk"
    (root / RUN).mkdir(parents=True)
    # Somebody made the run's directory, and was killed before its name was durable.
    history = [(0, Event("mkdir", RUN))]
    for life, (back_to, until) in enumerate([(None, 4), (2, 8)]):

        def action(rank: int, life: int = life, back_to: int | None = back_to, until: int = until) -> Callable[[], int]:
            def body() -> int:
                recorder = Recorder(root)
                disk.observer = recorder
                notes = Notes(directory / f"notes{life}", rank)
                code = jobs.live(
                    root / RUN,
                    notes,
                    rank=rank,
                    world=WORLD,
                    kind="replicated",
                    until=until,
                    keep=3,
                    back_to=back_to,
                    every=1 if back_to is None else 2,  # A step of the old branch lies between two of the new one.
                    on_commit=recorder.report,
                )
                (directory / f"history{life}-{rank}").write_bytes(pickle.dumps(recorder.events))
                return code

            return body

        ranks = Ranks([action(rank) for rank in range(WORLD)], directory / f"notes{life}")
        codes = ranks.wait()
        assert set(codes.values()) == {0}, f"{codes}\n{ranks.log()}"
        for rank in range(WORLD):
            history += pickle.loads((directory / f"history{life}-{rank}").read_bytes())
    return [event for _, event in sorted(history, key=lambda item: item[0])]


@dataclass
class Truth:
    """What the history promises up to some moment."""

    parents: dict[str, str | None]
    """By checkpoint, what it came from, as its manifest says."""
    reported: list[str] = field(default_factory=list)
    given_up: set[str] = field(default_factory=set)
    """Checkpoints whose deletion has begun."""

    @classmethod
    def of(cls, history: Sequence[Event]) -> Truth:
        parents = {}
        for event in history:
            if event.effect == "write" and event.path.endswith("manifest.json.tmp"):
                parents[Path(event.path).parent.name] = parse(event.data, event.path).parent
        return cls(parents)

    def hear(self, event: Event) -> None:
        if event.effect == "report" and event.path not in self.reported:
            self.reported.append(event.path)
        if event.effect == "remove" and event.path.endswith("/manifest.json"):
            self.given_up.add(Path(event.path).parent.name)

    def branch(self, name: str) -> list[str]:
        """A checkpoint and what it came from, newest first."""
        found = [name]
        while (parent := self.parents.get(found[-1])) is not None:
            found.append(parent)
        return found


def lay_down(tree: Tree, root: Path) -> None:
    """Make a state real."""
    for path in sorted(tree):
        data = tree[path]
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)


def judge(run: Path, truth: Truth) -> str | None:
    """What is wrong with a state, by reading alone."""
    there = catalog.committed(run)
    names = [entry.name for entry in there]
    lost = [name for name in truth.reported if name not in truth.given_up and name not in names]
    if lost:
        return f"{lost} had been reported as saved, and are gone"
    for entry in there:
        try:
            catalog.check_full(entry)
        except LastGoodError as error:
            return f"a manifest without its data: {error}"
    if there:
        branch = [entry.name for entry in catalog.lineage(there[-1], there)]
        expected = [name for name in truth.branch(names[-1]) if name in names]
        if branch != expected:
            return f"falling back from {names[-1]} would go to {branch[1:]} instead of {expected[1:]}"
    for number in generation.generations(run)[-1:]:
        if generation.record(run, number) is None:
            return f"generation {number} says nothing: the next job would wait {generation.STALE_SECONDS:.0f} s for it"
    return None


def judge_new_life(run: Path) -> str | None:
    """What goes wrong when a job continues from a state: restore, save one step, and look again."""
    before = catalog.committed(run)
    branch = [entry.name for entry in catalog.lineage(before[-1], before)] if before else []
    job = jobs.Job.build(0, "replicated")
    try:
        with Checkpointer(run, stale=0.001, rank=0, world_size=1, **job.objects) as ckpt:
            step = ckpt.restore()
            if step != (before[-1].step if before else 0):
                return f"restored step {step}; the newest was {before[-1].name if before else None}"
            saved = ckpt.save(step + 1, blocking=True).result().name
    except LastGoodError as error:
        return f"{type(error).__name__}: {error}"
    there = catalog.committed(run)
    if there[-1].name != saved:
        return f"{saved} was saved last, and {there[-1].name} counts as the newest"
    now = [entry.name for entry in catalog.lineage(there[-1], there)]
    if now != [saved, *branch][: len(now)] or len(now) < min(2, 1 + len(branch)):
        return f"falling back from the new {saved} would go to {now[1:]} instead of {branch}"
    return None


@dataclass
class Walk:
    """What a walk through the states came to."""

    cuts: int = 0
    states: int = 0
    continued: int = 0
    """States from which a new life was tried as well."""
    problems: list[str] = field(default_factory=list)
    good: set[bytes] = field(default_factory=set)
    """The states, by digest, of which nothing is wrong."""


def walk(
    history: Sequence[Event], directory: Path, *, lives: int, stop_early: bool = False, good: Set[bytes] = frozenset()
) -> Walk:
    """Cut the power after every operation, and judge every state.

    Args:
        lives: from each so many-th state a new life of the job is tried; 0 for none.
        good: states that another walk through this history, or part of it, found good: they are passed over.
    """
    truth, model, outcome = Truth.of(history), Disk(), Walk()
    model.play(Event("mkdir", str(Path(RUN).parent)))
    model.play(Event("sync_dir", "."))
    known: set[bytes] = set()
    for number, event in enumerate(history):
        model.play(event)
        truth.hear(event)
        outcome.cuts += 1
        for tree in model.states(seed=number):
            key = _key(tree, truth)
            if key in known or key in good:
                continue
            known.add(key)
            outcome.states += 1
            root = directory / "state"
            root.mkdir()
            try:
                lay_down(tree, root)
                problem = judge(root / RUN, truth)
                if problem is None and lives and outcome.states % lives == 0:
                    outcome.continued += 1
                    problem = judge_new_life(root / RUN)
            finally:
                shutil.rmtree(root)
            if problem is None:
                outcome.good.add(key)
            else:
                problem = problem.replace(f"{root}/", "")
                outcome.problems.append(f"power cut after operation {number} ({event.effect} {event.path}): {problem}")
                if stop_early:
                    return outcome
    return outcome


def _key(tree: Tree, truth: Truth) -> bytes:
    parts = [repr((truth.reported, sorted(truth.given_up))).encode()]
    for path in sorted(tree):
        if not path.endswith((".beat", "events.jsonl")):
            parts += path.encode(), tree[path] or b""
    return xxhash.xxh3_128_digest(b"\0".join(parts))


def sites(history: Sequence[Event]) -> list[str]:
    """The lines of code that sync something, in the order in which they first do."""
    return list(dict.fromkeys(event.site for event in history if event.effect in ("sync", "sync_dir")))


def without(history: Sequence[Event], site: str) -> list[Event]:
    """The history of a program that lacks one line with a sync."""
    return [event for event in history if event.site != site]


def missed(history: Sequence[Event], directory: Path) -> Iterator[tuple[str, str | None]]:
    """For each line that syncs: what goes wrong without it, or None where nothing does."""
    for site in sites(history):
        shorter = without(history, site)
        outcome = walk(shorter, directory, lives=0, stop_early=True)
        if not outcome.problems:
            outcome = walk(shorter, directory, lives=40, stop_early=True)
        yield site, outcome.problems[0] if outcome.problems else None


def quiet() -> None:
    """Thousands of restores would each say so."""
    logging.getLogger("lastgood").setLevel(logging.CRITICAL)
    logging.getLogger("lastgood").addHandler(logging.NullHandler())


def run(*, full: bool) -> Result:
    """Judge every state; `full` also lets a new life begin from each, and leaves out every sync in turn."""
    jobs.limit_threads()
    quiet()
    result = Result("Every state of the disk after a power cut")
    with result.timed(), scratch() as directory:
        history = record(directory)
        found = walk(history, directory, lives=1 if full else 10)
        result.tried["moments of the power cut"] = found.cuts
        result.tried["states of the disk"] = found.states
        result.tried["new lives begun from a state"] = found.continued
        result.failed += found.problems
        if full:
            for site, problem in missed(history, directory):
                result.tried["lines with a sync left out"] += 1
                if problem is None:
                    result.failed.append(f"without `{site}` nothing is lost: it is redundant, or the model misses it")
                else:
                    result.notes.append(f"without `{site}`: {problem}")
    return result
