"""Thousands of saves by two ranks that are killed again and again, watched from outside while they run.

Nothing may grow in a process that lives long, nothing may be left on the disk, and whoever looks at the run at any
moment must find the checkpoints that the retention policy promises. After each kill the next life must continue from
the newest manifest, and the bits at the end must be those of a run that was never killed.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lastgood import catalog
from lastgood.errors import LastGoodError
from tests.faults import job as jobs
from tests.faults.crash import KEPT, committed, left_overs
from tests.faults.job import Notes, read_notes
from tests.faults.powerloss import quiet
from tests.faults.processes import Ranks, scratch
from tests.faults.report import Result

WORLD = 2
WARM = 30
"""Saves after which a process has allocated what it needs."""
SAMPLE = 10
"""Saves between two looks at a process."""
JUDGED = 6
"""Looks at the beginning and at the end of the life of a process that are compared."""
LOOK_SECONDS = 0.01
"""Between two looks at the run, so that the job gets its share of the machine."""
GROWTH_BYTES = 3 << 20
"""Memory that a process may have more at its end than when it was warm: the allocator's whims, not a leak."""
TABLE_BYTES = 8 << 20
"""At most so much of one step between two looks does not count. Python makes its table of interned strings anew when it
is full, in whichever thread adds the next: with torch imported 3.8 MB, or 7.5, at some save or at none."""


def usage() -> dict[str, int]:
    """What this process holds.

    Of its memory that which it wrote to. Pages of libraries come and go with the needs of other programs, and how much
    of a page is ours (PSS) depends on what the processes do that were forked with us.
    """
    status = Path("/proc/self/status").read_text()
    kilobytes = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", status, re.MULTILINE)}
    return {
        "memory": kilobytes["RssAnon"] + kilobytes["VmSwap"] << 10,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def written_to() -> dict[str, int]:
    """KiB of private memory by who manages it: where a growth is, when there is one."""
    found: dict[str, int] = {}
    kind = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            address, name = line.split()[0], "".join(line.split()[5:])
            # glibc begins the heap of a thread at a multiple of 64 MiB.
            of_thread = not name and int(address.partition("-")[0], 16) % (64 << 20) == 0
            kind = "heaps of threads" if of_thread else "other memory"
            if name:
                kind = name if name.startswith("[") else "libraries"
        elif line.startswith("Anonymous:"):
            found[kind] = found.get(kind, 0) + int(line.split()[1])
    return {kind: size for kind, size in found.items() if size}


def start(run: Path, place: Path, until: int, leak: Callable[[], None] = lambda: None) -> Ranks:
    """Start a life of the job. `leak` is called at each commit, to see that what it loses is noticed."""

    def action(rank: int) -> Callable[[], int]:
        def body() -> int:
            quiet()
            out, commits = Notes(place, rank), 0

            def sample(path: Path) -> None:
                nonlocal commits
                commits += 1
                leak()
                if commits >= WARM and commits % SAMPLE == 0:
                    out.write("sample", **usage(), where=written_to())

            return jobs.live(
                run, out, rank=rank, world=WORLD, kind="replicated", until=until, keep=KEPT, on_commit=sample
            )

        return body

    return Ranks([action(rank) for rank in range(WORLD)], place)


@dataclass
class Watcher:
    """Looks at a run from outside, again and again."""

    run: Path
    draw: random.Random
    problems: list[str] = field(default_factory=list)
    looks: int = 0
    read: int = 0
    """Checkpoints of which every byte was read while the job went on."""
    newest: tuple[int, int] = (0, 0)
    """The highest generation and step that were ever seen."""
    spare: int = KEPT + 1
    """How many checkpoints may be there: one more than are kept, between a commit and the deletion after it."""

    def look(self) -> None:
        """Whether what is there now is what is promised."""
        self.looks += 1
        there = self._scan()
        found = there[-1][:2] if there else (0, 0)
        if found < self.newest:
            self.problems.append(f"the newest was {self.newest}, and now it is {found}")
        self.newest = max(found, self.newest)
        if len(there) > self.spare:
            self.problems.append(f"{len(there)} checkpoints at once: {[name for *_, name in there]}")
        if found[1] > KEPT and len(there) < KEPT:
            self.problems.append(f"only {len(there)} checkpoints: {[name for *_, name in there]}")
        if there and self.draw.random() < 0.02:
            self._read(there[-1][2])

    def _scan(self) -> list[tuple[int, int, str]]:
        """Looking takes time, in which one checkpoint may come and another go: too few must be seen again."""
        for _ in range(5):
            there = committed(self.run)
            if len(there) >= KEPT:
                break
        return there

    def _read(self, name: str) -> None:
        entry = catalog.entry_of(self.run, name)
        assert entry is not None
        try:
            catalog.check_full(entry)
            self.read += 1
        except LastGoodError as error:
            if entry.is_committed():  # Else it was deleted while it was read.
                self.problems.append(f"read while the job runs: {error}")


@dataclass
class Soak:
    """The lives of one run."""

    directory: Path
    seed: int = 1
    saves: int = 0
    kills: int = 0
    lives: int = 0
    problems: list[str] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)
    """By what is measured, the largest growth in one process after it was warm."""

    def __post_init__(self) -> None:
        self.run = self.directory / "run"
        self._owed = 0
        self._draw = random.Random(self.seed)
        self.watcher = Watcher(self.run, random.Random(self.seed + 1))

    def life(self, until: int, kill_after: int | None, leak: Callable[[], None] = lambda: None) -> None:
        """One life, that ends at step `until`, or is killed some moment after so many saves."""
        place = self.directory / f"life-{self.lives}"
        self.lives += 1
        before = committed(self.run)
        expected = before[-1][1] if before else 0
        ranks = start(self.run, place, until, leak)
        ranks.limit = None if kill_after is None else 3600.0
        victims = self._draw.choice([(0,), (1,), (0, 1)])
        delay, due, looked = self._draw.random() * 0.03, 0.0, 0.0
        killed = False

        def watch() -> None:
            nonlocal due, killed, looked
            if time.monotonic() > looked + LOOK_SECONDS:
                self.watcher.look()
                looked = time.monotonic()
            done = self.watcher.newest[1] - expected
            if kill_after is None or killed or done < kill_after:
                return
            due = due or time.monotonic() + delay
            if time.monotonic() >= due:
                killed = True
                ranks.kill(*victims)

        codes = ranks.wait(tick=watch)
        self.watcher.look()
        commits = self.watcher.newest[1] - expected
        self.saves += commits
        # A life that is killed between a commit and the deletion after it leaves one more for the next.
        self._owed = int(killed) + (self._owed if commits < 2 else 0)
        self.watcher.spare = KEPT + 1 + self._owed
        self._judge(ranks, codes, expected, victims if killed else (), place)

    def _judge(self, ranks: Ranks, codes: dict[int, int], expected: int, victims: tuple[int, ...], place: Path) -> None:
        where = f"life {self.lives}"
        wanted = {rank: (-signal.SIGKILL,) if rank in victims else (0, 3) if victims else (0,) for rank in codes}
        self.kills += len(victims)
        if any(code not in wanted[rank] for rank, code in codes.items()):
            self.problems.append(f"{where}: exit codes {codes}\n{ranks.log()}")
        newest = self.watcher.newest[1]
        for rank in range(WORLD):
            notes = read_notes(place, rank)
            for note in notes:
                if note["what"] == "restored" and note["step"] != expected:
                    self.problems.append(f"{where}: rank {rank} continued from {note['step']} instead of {expected}")
                if note["what"] == "committed" and note["step"] > newest:
                    self.problems.append(f"{where}: step {note['step']} was reported, and the newest is {newest}")
            self._measure(where, [note for note in notes if note["what"] == "sample"])

    def _measure(self, where: str, samples: list[dict[str, Any]]) -> None:
        if len(samples) < 2 * JUDGED:
            return
        for name, allowed in (("memory", GROWTH_BYTES), ("descriptors", 0), ("threads", 0)):
            # The least of the last against the most of the first: what follows a save that is under way at the moment
            # holds a file more, which three looks in a row did see by chance in one life of two hundred.
            grown = min(note[name] for note in samples[-JUDGED:]) - max(note[name] for note in samples[:JUDGED])
            if name == "memory":
                step = max(after[name] - before[name] for before, after in itertools.pairwise(samples))
                grown -= min(max(step, 0), TABLE_BYTES, max(grown, 0))
            self.peaks[name] = max(grown, self.peaks.get(name, 0))
            if grown > allowed:
                problem = f"{where}: {name} grew by {grown} in {len(samples) * SAMPLE} saves"
                if name == "memory":
                    before, after = samples[0]["where"], samples[-1]["where"]
                    problem += f" (KiB at first: {before}, at last: {after})"
                self.problems.append(problem)

    def finish(self) -> None:
        """Judge what a job that ended well leaves behind."""
        problem = left_overs(self.run)
        if problem:
            self.problems.append(problem)
        place = self.directory / f"life-{self.lives - 1}"
        for rank in range(WORLD):
            ended = read_notes(place, rank)[-1]
            if ended.get("digest") != jobs.last_digest("replicated", rank, self.watcher.newest[1]):
                self.problems.append(f"rank {rank} ended in other bits than a run that was never killed")
        names = [path for path in self.run.rglob("*") if not path.name.endswith(".base")]
        # Two checkpoints of a directory and three files; the records of 17 lives in four files each; the run's own.
        if len(names) > 8 + 17 * 4 + 8:
            self.problems.append(f"{len(names)} files and directories in the run at the end")


def run(*, saves: int, seconds: float = 0.0, between: int = 60) -> Result:
    """So many saves, and for so long, with a kill after every `between` saves or so; the last fifth lives undisturbed.

    What a process holds is judged in every life that is longer than :data:`WARM` saves and enough for some looks.
    """
    jobs.limit_threads()
    quiet()
    result = Result(f"{saves} saves with random kills, {WORLD} ranks")
    with result.timed(), scratch() as directory:
        soak, draw = Soak(directory), random.Random(3)
        end = time.monotonic() + seconds
        while soak.saves < saves * 4 // 5 or time.monotonic() < end:
            reach = draw.randint(1, 2 * between)
            soak.life(10**9, reach)
            if soak.problems or soak.watcher.problems:
                break
        else:
            soak.life(soak.watcher.newest[1] + max(saves - soak.saves, saves // 5), None)
            soak.finish()
        result.tried["saves"] = soak.saves
        result.tried["ranks killed"] = soak.kills
        result.tried["lives"] = soak.lives
        result.tried["looks at the run from outside while it is used"] = soak.watcher.looks
        result.tried["checkpoints read whole meanwhile"] = soak.watcher.read
        result.failed += soak.problems + soak.watcher.problems
        for name, grown in soak.peaks.items():
            unit = f"{grown / 1024:.0f} KiB" if name == "memory" else str(grown)
            result.notes.append(f"largest growth of one process after its first {WARM} saves, {name}: {unit}")
    return result
