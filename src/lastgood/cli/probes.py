"""Tries of what checkpoints need from a file system. Each is one sentence of result, with what to do about it."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lastgood import disk
from lastgood.cli.filesystem import mount_of, risk_of, synchronised_folder
from lastgood.cli.i18n import _
from lastgood.cli.output import size
from lastgood.errors import LastGoodError
from lastgood.files import replace_file

_ROUNDS = 20
_SLOW_SYNC = 0.1
"""Seconds of one small sync above which saves of many small files suffer."""
_LOW_SPACE = 5 << 30
_BLOCK = 4 << 20
_LOCK_SCRIPT = (
    "import sys, pathlib; from lastgood.disk import FileLock; "
    "lock = FileLock.try_acquire(pathlib.Path(sys.argv[1])); print('free' if lock else 'held')"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What one try came to."""

    name: str
    level: str
    """ok, note, risk (may go wrong), broken (a promise cannot be kept)"""
    text: str


def examine(directory: Path, speed_bytes: int) -> Iterator[Finding]:
    """Try everything in a new directory inside of `directory`, and leave nothing behind.

    Args:
        speed_bytes: how much is written to measure the speed.

    Raises:
        OSError: nothing can be written there at all.
    """
    yield from _kind(directory)
    place = directory / f".lastgood-doctor-{os.getpid()}-{time.monotonic_ns()}"
    disk.make_dir(place)
    try:
        for name, probe in _PROBES.items():
            try:
                yield from probe(place)
            except (OSError, LastGoodError) as error:
                yield Finding(name, "broken", _("the try of {name} failed: {error}", name=name, error=error))
        yield from _space(place)
        yield from _speed(place, speed_bytes)
    finally:
        _clear(place)


def _clear(place: Path) -> None:
    for name in disk.names(place):
        path = place / name
        if path.is_dir() and not path.is_symlink():
            _clear(path)
        else:
            disk.remove(path)
    disk.remove_dir(place)


def _write(path: Path, data: bytes, *, sync: bool = False) -> None:
    with disk.NewFile(path) as file:
        file.write(data)
        if sync:
            file.sync()


def _kind(directory: Path) -> Iterator[Finding]:
    mount = mount_of(directory)
    if mount is None:
        yield Finding("type", "note", _("the system does not say what kind of file system this is"))
    elif (risk := risk_of(mount)) is not None:
        yield Finding("type", *risk)
    else:
        text = _("{type} on {point}: no known weakness", type=mount.type, point=mount.point)
        yield Finding("type", "ok", text)
    folder = synchronised_folder(directory)
    if folder is not None:
        text = _(
            "{folder} is copied to a cloud by a program that opens new files at once: saves wait for it, and every "
            "checkpoint is uploaded. Put runs outside of it.",
            folder=folder,
        )
        yield Finding("cloud", "risk", text)


def _exclusive(place: Path) -> Iterator[Finding]:
    _write(place / "exclusive", b"1")
    try:
        _write(place / "exclusive", b"2")
    except FileExistsError:
        yield Finding("exclusive create", "ok", _("a name can be taken by one process only"))
        return
    text = _("two can take the same name: two jobs could use one run. Use another file system.")
    yield Finding("exclusive create", "broken", text)


def _replace(place: Path) -> Iterator[Finding]:
    """Replace a file over and over while another thread reads it: it must be one of the versions, whole."""
    target = place / "replaced"
    versions = [bytes([65 + i]) * 5000 for i in range(_ROUNDS)]
    _write(target, versions[0])
    torn: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                with contextlib.suppress(PermissionError):  # Windows, in the moment of the replacement.
                    if disk.read_bytes(target, limit=1 << 20) not in versions:
                        torn.append("torn")
            except FileNotFoundError:
                torn.append("missing")
            # A reader that never lets go would be a finding of its own: Windows replaces no file that is open.
            time.sleep(0.005)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for version in versions[1:]:
            replace_file(target, _writer(version))
    finally:
        done.set()
        reader.join()
    if torn:
        text = _("a file that is replaced is {what} for a moment: a crash then loses it. Use another file system.")
        yield Finding("atomic replace", "broken", text.format(what=", ".join(sorted(set(torn)))))
    else:
        yield Finding("atomic replace", "ok", _("a file is replaced at once: readers see the old or the new one"))


def _writer(data: bytes) -> Callable[[object], None]:
    return lambda file: file.write(data)  # type: ignore[attr-defined]


def _sync(place: Path) -> Iterator[Finding]:
    times = []
    for index in range(5):
        with disk.NewFile(place / f"sync-{index}") as file:
            file.write(b"x" * 4096)
            began = time.perf_counter()
            file.sync()
            times.append(time.perf_counter() - began)
    cost = statistics.median(times)
    if cost > _SLOW_SYNC:
        text = _("a sync takes {ms:.0f} ms: every save pays that several times. A faster disk makes saves shorter.")
        yield Finding("sync", "risk", text.format(ms=cost * 1e3))
    else:
        yield Finding("sync", "ok", _("a sync takes {ms:.2f} ms", ms=cost * 1e3))
    if disk.sync_dir(place):
        yield Finding("sync of directories", "ok", _("names are made durable too"))
    elif disk.WINDOWS:
        text = _("Windows has no sync of directories; the journal of NTFS keeps names in order")
        yield Finding("sync of directories", "ok", text)
    else:
        text = _(
            "this file system cannot sync a directory: after a power failure the newest checkpoint may be missing, "
            "and the one before it is used. Use another file system where that matters."
        )
        yield Finding("sync of directories", "risk", text)


def _links(place: Path) -> Iterator[Finding]:
    _write(place / "linked", b"1")
    try:
        disk.link(place / "linked", place / "link")
    except OSError:
        text = _("there are no hard links: `lastgood run` cannot keep earlier versions of files without copying them")
        yield Finding("hard links", "note", text)
        return
    yield Finding("hard links", "ok", _("hard links work"))


def _locks(place: Path) -> Iterator[Finding]:
    path = place / "lock"
    lock = disk.FileLock.try_acquire(path)
    if lock is None:
        yield Finding("locks", "broken", _("a new file is locked already"))
        return
    try:
        taken = _other_process(path)
    finally:
        lock.release()
    if taken == "held" and _other_process(path) == "free":
        yield Finding("locks", "ok", _("a lock keeps another process of this machine out, and is dropped"))
    else:
        text = _(
            "locks do not work between processes ({answer}): two jobs on one machine are told apart only by their "
            "heartbeat, which takes a minute. Use another file system, or mount it with locks."
        )
        yield Finding("locks", "broken", text.format(answer=taken))


def _other_process(path: Path) -> str:
    command = [sys.executable, "-c", _LOCK_SCRIPT, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def _held(place: Path) -> Iterator[Finding]:
    """A virus scanner or an indexer opens a file as soon as it was closed: then it cannot be replaced for a moment."""
    held = 0
    longest = 0.0
    for index in range(_ROUNDS):
        path = place / f"fresh-{index}.pth"
        _write(path, b"x" * 65536)
        began = time.perf_counter()
        try:
            disk.replace(path, place / "fresh.pth", patience=0)
        except PermissionError:
            held += 1
            disk.replace(path, place / "fresh.pth")
            longest = max(longest, time.perf_counter() - began)
    if held:
        text = _(
            "another program holds {held} of {count} new files for up to {ms:.0f} ms (a virus scanner or an "
            "indexer): saves wait for it. Exclude this directory there."
        )
        yield Finding("new files", "risk", text.format(held=held, count=_ROUNDS, ms=longest * 1e3))
    else:
        yield Finding("new files", "ok", _("no program holds new files"))


def _cases(place: Path) -> Iterator[Finding]:
    _write(place / "Case", b"1")
    if disk.exists(place / "case"):
        text = _("upper and lower case are the same here: G_1.pth and g_1.pth are one file")
    else:
        text = _("upper and lower case are different names")
    yield Finding("case", "ok", text)


def _long_names(place: Path) -> Iterator[Finding]:
    folder = place
    try:
        while len(str(folder)) < 300:
            folder = folder / ("d" * 60)
            disk.make_dir(folder)
        _write(folder / ("f" * 100), b"1")
    except OSError as error:
        text = _("paths of more than 260 characters are refused ({error}): keep run directories short")
        yield Finding("long paths", "note", text.format(error=error.strerror or error))
        return
    yield Finding("long paths", "ok", _("paths of more than 260 characters work"))


def _space(place: Path) -> Iterator[Finding]:
    free = disk.free_bytes(place)
    if free < _LOW_SPACE:
        text = _("{size} are free: a save that does not fit is refused. Free some space, or keep fewer checkpoints.")
        yield Finding("space", "risk", text.format(size=size(free)))
    else:
        yield Finding("space", "ok", _("{size} are free for this user", size=size(free)))
    files = disk.free_files(place)
    if files is not None and files < 1000:
        text = _("only {files} more files can be made here (inodes): delete small files")
        yield Finding("files", "risk", text.format(files=files))
    if (over := _over_quota()) is not None:
        yield Finding("quota", "risk", _("a quota is used up: {text}. Saves will be refused.", text=over))


def _over_quota() -> str | None:
    """What ``quota`` says where a limit is reached. With -q it says nothing else."""
    try:
        done = subprocess.run(["quota", "-q"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None  # Not installed, or a server that does not answer: free space is all there is to go by.
    return " ".join(done.stdout.split()) or None


def _speed(place: Path, count: int) -> Iterator[Finding]:
    block = os.urandom(min(_BLOCK, count))
    began = time.perf_counter()
    try:
        with disk.NewFile(place / "speed") as file:
            while file.size < count:
                file.write(block)
            file.sync()
            written = file.size
    except OSError as error:
        yield Finding("speed", "broken", _("{size} could not be written: {error}", size=size(count), error=error))
        return
    seconds = time.perf_counter() - began
    text = _("{size} written and synced in {seconds:.2f} s: {speed}/s")
    yield Finding("speed", "ok", text.format(size=size(written), seconds=seconds, speed=size(written / seconds)))


_PROBES: dict[str, Callable[[Path], Iterator[Finding]]] = {
    "exclusive create": _exclusive,
    "atomic replace": _replace,
    "sync": _sync,
    "hard links": _links,
    "locks": _locks,
    "new files": _held,
    "case": _cases,
    "long paths": _long_names,
}
