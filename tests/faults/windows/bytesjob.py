"""A job of one or two ranks at the level of bytes, without torch: it starts in a fraction of a second.

usage: bytesjob.py RUN NOTES RANK WORLD UNTIL [NUMBER MOMENT]     one rank of a job, killed at a disk operation
       bytesjob.py file TARGET NOTES [NUMBER MOMENT]              single files: a new one, then its replacement

The state is made of bytes that follow from the step; all else is lastgood's own: taking the run, the meeting of the
ranks, the commit in two phases, retention, the event log, giving the run back.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[3]))
from lastgood import catalog, disk
from lastgood.errors import LastGoodError
from lastgood.files import replace_file
from lastgood.handle import SaveHandle
from lastgood.manifest import ShardRecord
from lastgood.part import Request
from lastgood.plan import Layout
from lastgood.retain import Keep
from lastgood.saver import Saver
from lastgood.session import Session
from lastgood.shard import Piece
from lastgood.world import World
from tests.faults.killer import Killer, Moment

SECONDS = 60.0
KEPT = 2
HALF = 8192
"""Bytes of the tensor that each of two ranks writes."""


def content(step: int) -> bytes:
    """The tensor after a step."""
    return bytes((step * 7 + at) % 251 for at in range(2 * HALF))


class Bytes:
    """A host buffer that is full from the start."""

    def __init__(self, data: bytes) -> None:
        self.view = memoryview(data)

    def await_bytes(self, end: int, *, patient: bool = False) -> None:
        assert end <= len(self.view)

    def confirm(self) -> None:
        """It never changes."""


def lay_out(rank: int, writers: tuple[int, ...]) -> Layout:
    """Each writer has an equal part of the tensor, in the order of the writers."""
    size = 2 * HALF // len(writers)
    shares = {
        writer: [Piece("w", "w", "U8", (index * size,), (size,), (2 * HALF,), index * size)]
        for index, writer in enumerate(writers)
    }
    others = {writer: pieces for writer, pieces in shares.items() if writer != 0} if rank == 0 else {}
    return Layout(rank, shares[rank], [], [], others, 2 * HALF, writers)


class Notes:
    """What a rank says to the judge: a line is one system call, so a killed process has said it or has not."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._file = os.open(path, flags)

    def write(self, what: str, **fields: Any) -> None:
        os.write(self._file, (json.dumps({"what": what, **fields}) + "\n").encode())


def read_notes(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def restored(run: Path) -> int:
    """The step of the newest checkpoint, of which every byte is checked."""
    entry = catalog.newest(run)
    if entry is None:
        return 0
    manifest = catalog.check_full(entry)
    data = bytearray(2 * HALF)
    for chunk in manifest.tensors["w"].chunks:
        record: ShardRecord = manifest.shards[chunk.shard]
        part = (entry.path / record.file).read_bytes()[chunk.begin : chunk.end]
        data[chunk.offsets[0] : chunk.offsets[0] + chunk.shape[0]] = part
    assert bytes(data) == content(entry.step), f"{entry.path} holds other bytes than step {entry.step} had"
    return entry.step


def live(run: Path, notes: Notes, rank: int, world: int, until: int) -> int:
    """One life of one rank: take the run, go on from the newest checkpoint, save every step. Returns the exit code."""
    place = World(rank, world, one_host=True)
    session = Session(run, place, SECONDS, None, None, stale=0.2)
    saver = Saver(
        run, place, session, keep=Keep(last=KEPT), writers=range(world), mirror=None, group=None, tensorboard=None
    )
    try:
        notes.write("open")
        if session.holder is not None:
            start = restored(run)
            newest = catalog.newest(run)
            session.holder.set_base(newest.name if newest else None)
            saver.parent = newest.name if newest else None
            session.channel.post("start-at", start)
        else:
            start = session.channel.receive("start-at", time.monotonic() + SECONDS)
        notes.write("restored", step=start)
        for step in range(start + 1, until + 1):
            handle = SaveHandle(step)
            saver.start(request(step, rank, saver), handle).result(SECONDS)
            notes.write(handle.state, step=step, error=str(handle.error))
            alone = len(session.channel.connected) != world - 1 and step < until
            if handle.state != "committed" or alone:
                return 3  # As under a launcher, the job ends when a rank is gone.
        session.leave()
    finally:
        saver.close(SECONDS)
        session.close()
    notes.write("end", step=until)
    return 0


def request(step: int, rank: int, saver: Saver) -> Request:
    return Request(
        step=step,
        tries=0,
        objects={},
        kinds={},
        encode_random=lambda: {"rank": rank, "step": step},
        metrics={},
        program={},
        versions={},
        parent=saver.parent,
        state=cast(Any, SimpleNamespace(tensors={})),
        layout=lay_out(rank, saver.writers),
        buffer=cast(Any, Bytes(content(step))),
        deadline=SECONDS,
    )


def file_content(number: int) -> bytes:
    return content(number) * 3


def replace_twice(target: Path, notes: Notes) -> int:
    for number in (1, 2):
        replace_file(target, lambda file, number=number: file.write(file_content(number)) and None)  # type: ignore[misc]
        notes.write("committed", step=number)
    return 0


def main(arguments: list[str]) -> int:
    assert "torch" not in sys.modules
    single = arguments[0] == "file"
    count = 3 if single else 5
    killer = Killer(int(arguments[count]), cast(Moment, arguments[count + 1])) if arguments[count:] else Killer()
    disk.observer = killer
    notes = Notes(Path(arguments[2] if single else arguments[1]))
    try:
        if single:
            code = replace_twice(Path(arguments[1]), notes)
        else:
            rank, world, until = map(int, arguments[2:5])
            code = live(Path(arguments[0]), notes, rank, world, until)
    except LastGoodError as error:
        notes.write("gave up", error=str(error))
        code = 4
    notes.write("operations", seen=killer.seen, done=sorted(killer.done))
    assert "torch" not in sys.modules
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
