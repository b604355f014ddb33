"""A second place for checkpoints: another disk, or a network share, which may be away for a while.

It receives committed checkpoints in the background under the same protocol: shards first, read back and checked
against their checksums, the manifest last. Nothing that happens to it stops the training.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lastgood import catalog, disk, generation
from lastgood.catalog import Entry
from lastgood.errors import DamagedError, LastGoodError
from lastgood.files import replace_file
from lastgood.generation import Holder
from lastgood.manifest import NAME, parse
from lastgood.program import Events
from lastgood.retain import Keep, choose, known_of

_log = logging.getLogger("lastgood")
_BLOCK = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Mirror:
    """Where copies go, and which."""

    path: str | Path
    """The directory. It is laid out like a run, and `restore` and all commands read it as one."""
    every: int = 1
    """Copy only steps that are multiples of this, and always the newest one when the job closes."""
    keep: Keep | None = None
    """Which copies stay; by default those that the run itself would keep."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise LastGoodError("Mirror(every=...) is a number of steps: at least 1")


class Copier:
    """Copies to the mirror in a thread of its own, so that a slow share never delays a save."""

    def __init__(self, run: Path, mirror: Mirror, keep: Keep, holder: Holder, events: Events) -> None:
        self._run, self._to = run, Path(mirror.path)
        self._mirror, self._keep = mirror, mirror.keep or keep
        self._holder, self._events = holder, events
        self._wake = threading.Event()
        self._closing = self._finished = False
        self._away = False
        self._damaged: set[str] = set()
        """Checkpoints of the run that cannot be copied."""
        self._thread = threading.Thread(target=self._work, name="lastgood-mirror", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """There may be something to copy."""
        self._wake.set()

    def close(self, seconds: float) -> bool:
        """Copy what is left, for at most `seconds`. Returns whether the mirror is up to date."""
        self._closing = True
        self.notify()
        self._thread.join(seconds)
        return self._finished and not self._away

    def _work(self) -> None:
        pause = 1.0
        while True:
            # While the mirror is away it is tried again by itself, with growing pauses.
            self._wake.wait(pause if self._away else None)
            self._wake.clear()
            closing = self._closing
            try:
                self._catch_up(everything=closing)
                if self._away:
                    _log.info("the mirror %s is back and up to date", self._to)
                self._away, pause = False, 1.0
            except (OSError, LastGoodError) as error:
                if not self._away:
                    _log.warning(
                        "the mirror %s is behind: %s. Training goes on; it is caught up later.", self._to, error
                    )
                    self._events.write("mirror-behind", why=str(error))
                self._away, pause = True, min(pause * 2, 60.0)
            if closing:
                self._finished = True
                return

    def _catch_up(self, *, everything: bool) -> None:
        disk.make_dirs(self._to)
        here = catalog.committed(self._run)
        there = {entry.name for entry in catalog.committed(self._to)}
        wanted = [e for e in here if e.step % self._mirror.every == 0 or (everything and e == here[-1])]
        # The newest first: if the run's disk dies now, it is the one that is needed.
        behind: DamagedError | None = None
        for entry in reversed(wanted):
            if entry.name in there or entry.name in self._damaged or self._is_done_for(entry, here):
                continue
            try:
                self._copy(entry)
            except DamagedError as error:
                if not self._is_lost(entry):
                    behind = error
        self._copy_bases()
        self._clear()
        self._retain()
        if behind is not None:
            raise behind

    def _is_lost(self, entry: Entry) -> bool:
        """Whether it is the run's own checkpoint that is gone or damaged, and not the copy. Damage is said once."""
        try:
            catalog.check_full(entry)
        except DamagedError as error:
            if entry.is_committed():  # Retention deletes the manifest first.
                self._damaged.add(entry.name)
                self._events.report("skip", entry, f"it is not copied to the mirror {self._to}: {error}")
            return True
        return False

    def _is_done_for(self, entry: Entry, here: list[Entry]) -> bool:
        """Whether the mirror's retention would delete it at once."""
        names = {e.name for e in here} | {e.name for e in catalog.committed(self._to)}
        known = sorted(e for e in (catalog.entry_of(self._to, name) for name in names) if e is not None)
        branch = [e.name for e in catalog.lineage(known[-1], known, self._run)]
        keep = self._keep
        return keep.best == 0 and keep.every is None and entry.name not in branch[: max(keep.last, 1)]

    def _copy(self, entry: Entry) -> None:
        began = time.monotonic()
        manifest = catalog.check_quick(entry)
        target = Entry(entry.generation, entry.step, entry.attempt, entry.name, self._to)
        if disk.exists(target.path):
            self._holder.check()
            if target.is_committed():
                return  # The job before this one had more time than we thought.
            # A copy that was broken off: without a manifest it is no checkpoint.
            catalog.delete(target)
        disk.make_dir(target.path)
        for record in manifest.shards:
            _copy_file(entry.path / record.file, target.path / record.file)
        data = b"".join(bytes(block) for block in _read(entry.path / NAME))
        temporary = target.path / (NAME + ".tmp")
        with disk.NewFile(temporary) as file:
            file.write(data)
            file.sync()
        disk.sync_dir(target.path)
        disk.sync_dir(self._to)
        # What arrived is read back and compared with the checksums of the original before it counts.
        self._check_arrived(target, manifest.attempt, data)
        self._holder.check()
        disk.replace(temporary, target.path / NAME)
        disk.sync_dir(target.path)
        self._events.write(
            "mirror", checkpoint=entry.name, bytes=manifest.tensor_bytes, seconds=time.monotonic() - began
        )
        _log.info("mirrored %s to %s", entry.name, self._to)

    @staticmethod
    def _check_arrived(target: Entry, attempt: str, data: bytes) -> None:
        copied = parse(data, str(target.path))
        if copied.attempt != attempt:
            raise DamagedError(f"{target.name} changed while it was copied")
        catalog.check_shards(target, copied)

    def _copy_bases(self) -> None:
        for number in generation.generations(self._run):
            note = generation.base(self._run, number)
            if note is not None and generation.base(self._to, number) is None:
                directory = self._to / "generations"
                disk.make_dirs(directory)
                replace_file(directory / f"{number:08d}.base", lambda file, note=note: _write(file, note))  # type: ignore[misc]

    def _clear(self) -> None:
        """Delete what is left of copies that were broken off, of which nobody knows whether they will be made again."""
        for entry in catalog.entries(self._to):
            if not entry.is_committed():
                self._holder.check()
                catalog.delete(entry)

    def _retain(self) -> None:
        known = [known_of(entry) for entry in catalog.committed(self._to)]
        if not known:
            return
        branch = [e.name for e in catalog.lineage(known[-1].entry, [k.entry for k in known], self._run)]
        for k in choose(known, branch, self._keep):
            self._holder.check()
            catalog.delete(k.entry)
            self._events.report("delete", k.entry, f"the retention policy, in the mirror {self._to}")


def _write(file: object, text: str) -> None:
    file.write(text.encode())  # type: ignore[attr-defined]


def _copy_file(source: Path, target: Path) -> None:
    with disk.NewFile(target) as new:
        for block in _read(source):
            new.write(block)
        new.sync()


def _read(source: Path) -> Iterator[memoryview]:
    """The bytes of a file of the run. Raises DamagedError: an OSError is always the mirror's."""
    block = memoryview(bytearray(_BLOCK))
    at = 0
    try:
        with disk.open_read(source) as file:
            while got := disk.read_into(file, at, block):
                yield block[:got]
                at += got
    except OSError as error:
        raise DamagedError(f"{source} cannot be read: {error}") from error
