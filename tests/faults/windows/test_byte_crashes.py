"""Killed at every disk operation, at the level of bytes: processes without torch start fast enough for all of them.

There is no fork on Windows. Every point is a process of its own there, which the system ends as it ends any.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lastgood import catalog
from lastgood.files import replace_file

sys.path.insert(0, str(Path(__file__).parent))
import bytesjob
from bytesjob import Notes, read_notes

pytestmark = [
    pytest.mark.skipif(os.name != "nt" and "LASTGOOD_ROUNDS" not in os.environ, reason="needs Windows"),
    pytest.mark.timeout(900),
]
PROGRAM = Path(__file__).with_name("bytesjob.py")
WORKERS = 3
SECONDS = 120
OLD, UNTIL, END = 3, {"new": 2, "old": 5}, 6
"""Steps at which the first life of an old run ends, the killed life, and the last one."""
Point = tuple[int, str, str]
"""Number of the operation, its name, and the moment."""


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, output


def points_of(notes: Path) -> list[Point]:
    """Every moment that is another state of the disk: before each operation, in the middle of each write, and the end.

    After one operation is before the next.
    """
    (last,) = (note for note in read_notes(notes) if note["what"] == "operations")
    points: list[Point] = []
    for number, operation in enumerate(last["seen"]):
        points.append((number, operation, "before"))
        if operation.startswith(("write", "append")):
            points.append((number, operation, "torn"))
    final = max(last["done"])
    return [*points, (final, last["seen"][final], "after")]


def committed(run: Path) -> list[tuple[int, int, str]]:
    """Generation, step and name of every directory that holds a manifest, from old to new."""
    return [(entry.generation, entry.step, entry.name) for entry in catalog.entries(run) if entry.is_committed()]


def try_point(place: Path, template: Path | None, until: int, world: int, victim: int, point: Point) -> str | None:
    """Kill one rank at a point, let a new life go on, and judge. Returns what is wrong, or None."""
    run, (number, _, moment) = place / "run", point
    place.mkdir()
    if template is not None:
        shutil.copytree(template, run)
    processes = [
        start(run, place / f"first-{rank}", rank, world, until, *((number, moment) if rank == victim else ()))
        for rank in range(world)
    ]
    code, output = end(processes[victim])
    for rank, process in enumerate(processes):
        if rank == victim:
            continue
        if not any(note["what"] == "restored" for note in read_notes(place / f"first-{rank}")):
            process.kill()  # It looks for a rank 0 that will never come. A launcher ends it.
        output += end(process)[1]
    if code == 0 or "Traceback" in output:
        return f"the point was not reached, or something broke: {code} {output}"
    newest = max(committed(run), default=(0, 0, ""))[1]
    for rank in range(world):
        for note in read_notes(place / f"first-{rank}"):
            if note["what"] == "committed" and note["step"] > newest:
                return f"rank {rank} was told that step {note['step']} is saved; the newest is {newest}"
    return live_on(place, world, newest)


def live_on(place: Path, world: int, newest: int) -> str | None:
    """The next life of the job, with a thread for each rank."""
    run, codes = place / "run", {}

    def one(rank: int) -> None:
        codes[rank] = bytesjob.live(run, Notes(place / f"second-{rank}"), rank, world, END)

    ranks = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(SECONDS)
    if codes != dict.fromkeys(range(world), 0):
        return f"the next life ended with {codes}: {read_notes(place / 'second-0')}"
    for rank in range(world):
        (start,) = (note["step"] for note in read_notes(place / f"second-{rank}") if note["what"] == "restored")
        if start != newest:
            return f"rank {rank} went on from step {start}; the newest was {newest}"
    if bytesjob.restored(run) != END:
        return "the last checkpoint is another one"
    names = {name for _, _, name in committed(run)}
    wrong = [path.name for path in run.glob("step-*") if path.name not in names]
    wrong += [path.name for path in run.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".lastgood")]
    if wrong or len(names) > bytesjob.KEPT:
        return f"left behind: {wrong}, kept: {sorted(names)}"
    return None


def problems(tries: Sequence[tuple[Point, Path]], attempt: object) -> dict[Point, str]:
    assert callable(attempt)
    with ThreadPoolExecutor(WORKERS) as pool:
        found = list(pool.map(lambda one: attempt(*one), tries))
    return {point: problem for (point, _), problem in zip(tries, found, strict=True) if problem is not None}


FULL = "LASTGOOD_ROUNDS" in os.environ
CASES = [(1, 0, "new", 8), (1, 0, "old", 1), (2, 0, "old", 12), (2, 1, "old", 1)]
"""World, victim, scenario; one rank with history has every operation, of the longest two every so many are enough."""
CASES_IN_FULL = [(world, victim, scenario, 1) for world, victim in ((1, 0), (2, 0), (2, 1)) for scenario in UNTIL]


@pytest.mark.parametrize(("world", "victim", "scenario", "stride"), CASES_IN_FULL if FULL else CASES)
def test_a_rank_killed_at_any_operation_costs_no_checkpoint(
    tmp_path: Path, world: int, victim: int, scenario: str, stride: int
) -> None:
    template, until = None, UNTIL[scenario]

    def unharmed(run: Path, name: str, until: int) -> None:
        ended = [end(one) for one in [start(run, tmp_path / f"{name}-{r}", r, world, until) for r in range(world)]]
        assert [code for code, _ in ended] == [0] * world, ended

    (tmp_path / "count").mkdir()
    run = tmp_path / "count" / "run"  # As deep as the others: every directory above it is synced.
    if scenario == "old":
        template = tmp_path / "template"
        unharmed(template, "template", OLD)
        assert [step for _, step, _ in committed(template)] == [OLD - 1, OLD]
        dead = template / f"step-{OLD + 1:08d}"
        dead.mkdir()
        (dead / "00000.safetensors").write_bytes(b"half a sh")
        shutil.copytree(template, run)
    unharmed(run, "count", until)
    points = points_of(tmp_path / f"count-{victim}")
    assert len(points) > 10
    points = points[::stride]
    began = time.monotonic()
    wrong = problems(
        [(point, tmp_path / f"{point[0]}-{point[2]}") for point in points],
        lambda point, place: try_point(place, template, until, world, victim, point),
    )
    print(f"{len(points)} points in {time.monotonic() - began:.0f} s")
    assert not wrong, "\n".join(f"{point}: {problem}" for point, problem in wrong.items())


def test_a_single_file_killed_at_any_operation_is_whole(tmp_path: Path) -> None:
    assert end(start("file", tmp_path / "模型.pth", tmp_path / "count"))[0] == 0
    points = points_of(tmp_path / "count")
    assert len(points) > 10

    def attempt(point: Point, place: Path) -> str | None:
        place.mkdir()
        target, notes = place / "模型.pth", place / "notes"
        code, output = end(start("file", target, notes, point[0], point[2]))
        if code == 0 or "Traceback" in output:
            return f"the point was not reached, or something broke: {code} {output}"
        told = max((note["step"] for note in read_notes(notes)), default=0)
        there = target.read_bytes() if target.exists() else b""
        allowed = [b"" if number == 0 else bytesjob.file_content(number) for number in (told, told + 1)]
        if there not in allowed:
            return f"{len(there)} bytes, which are not those of file {told} or {told + 1}"
        replace_file(target, lambda file: file.write(b"next") and None)
        return None if target.read_bytes() == b"next" else "the next save did not get through"

    wrong = problems([(point, tmp_path / f"{point[0]}-{point[2]}") for point in points], attempt)
    assert not wrong, "\n".join(f"{point}: {problem}" for point, problem in wrong.items())
