"""What was saved, beside it: for each file its versions, with size, checksum, time, rank and program.

``DIR/.lastgood/NAME.jsonl`` belongs to ``DIR/NAME``; its last whole line counts. It is written before the file is put
in place, so that a file is good when it is any of the versions in the journal: a crash between the two leaves the file
one entry behind.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from . import system
from .settings import PRIVATE

SUFFIX = ".jsonl"
KEEP_ENTRIES = 8
NO_CHECKSUM = -1
# Of a file that was there before us, or that its program has not written all of yet: its size is all that is known.
_TAIL = 1 << 13
# Bytes at the end of a journal in which its last line mostly lies.
_COMPACT = 1 << 16
# Bytes of a journal after which its old lines are dropped.


@dataclass
class Version:
    """One version of a saved file."""

    size: int
    """Bytes."""
    crc32: int
    """Of the bytes from `begins` on, as zlib computes it, or `NO_CHECKSUM`."""
    time: float
    """Seconds since 1970, when it was put in place."""
    rank: int = -1
    """-1: unknown."""
    round: int = 0
    """How often the process had saved this path."""
    run: str = ""
    program: str = ""
    inode: int = -1
    """Of the file: it tells a version that is in place from one that was cut off before."""
    begins: int = 0
    """0: the checksum is that of the whole file. Otherwise it is that of a zip's directory, which begins here and
    holds the checksums that torch computed of everything before."""
    kept: str = ""
    """The name of a hard link in ``.lastgood/history`` that holds this version."""
    save: int = 0
    """Of a file that is saved together with others: the number of the save, which these have too (see `groups`)."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    path: str
    damage: str
    """A sentence; empty when the file is good."""


def _journal(target: str) -> str:
    return os.path.join(os.path.dirname(target), PRIVATE, os.path.basename(target) + SUFFIX)


def read(target: str) -> list[Version]:
    """The versions of a file, oldest first; none where there is no journal, or it does not make sense."""
    try:
        with system.open_file(_journal(target), "rb", buffering=0) as file:
            begin = max(0, file.seek(0, os.SEEK_END) - _TAIL)
            while True:
                file.seek(begin)
                for line in reversed(file.read().splitlines()):
                    try:
                        return [Version(**entry) for entry in json.loads(line)]
                    except (ValueError, TypeError):
                        continue  # A crash cut this line off, or it begins before what was read.
                if begin == 0:
                    return []
                begin = 0
    except OSError:
        return []


def lying(target: str, versions: list[Version] | None = None) -> Version | None:
    """The version that lies in its place; None where nothing does, or what somebody else has put there.

    It is not always the newest: a save may have been cut off before its file was in place.
    """
    try:
        status = os.stat(target)
    except FileNotFoundError:
        return None
    found = read(target) if versions is None else versions
    there = [version for version in found if (version.inode, version.size) == (status.st_ino, status.st_size)]
    return there[-1] if there else None


def unknown(target: str) -> Version:
    """An entry for a file of which only this is known, that it lies there."""
    status = os.stat(target)
    return Version(status.st_size, NO_CHECKSUM, status.st_mtime, inode=status.st_ino)


def write(target: str, versions: list[Version]) -> None:
    """Set the versions of a file. Not synced: a journal that a power cut took is a file without a journal.

    A line is added, and the journal is not replaced: a rename over a file makes some file systems flush it, which
    takes longer than saving a small model.

    Raises:
        OSError: not all of it could be written. The file must not be put in place then, for a pair could not be undone.
    """
    path = _journal(target)
    line = json.dumps([version.__dict__ for version in versions]).encode() + b"\n"
    with system.open_file(path, "ab") as file:
        if file.tell() == 0 or file.tell() < _COMPACT:
            # On a line of its own, wherever a crash left the one before.
            file.write(b"\n" + line if file.tell() else line)
            return
    temporary = system.temporary(target)
    with system.open_file(temporary, "wb") as file:
        file.write(line)
    system.patiently(lambda: system.replace(temporary, path), 2.0, lambda: None)


def forget(target: str) -> None:
    """Drop the journal of a file that was moved away or deleted."""
    if system.exists(_journal(target)):
        system.remove(_journal(target))


def history_path(target: str, name: str) -> str:
    return os.path.join(os.path.dirname(target), PRIVATE, "history", name)


def checksum(path: str, begins: int = 0) -> tuple[int, int]:
    """Size in bytes of a file, and the CRC-32 of what comes from `begins` on."""
    crc = 0
    size = begins
    with system.open_file(path, "rb", buffering=0) as file:
        file.seek(begins)
        while True:
            block = file.read(1 << 22)
            if not block:
                return size, crc
            crc = zlib.crc32(block, crc)
            size += len(block)


def check(target: str, versions: list[Version]) -> str:
    """What is wrong with a file, in a sentence without its name; empty when it is good or nothing is known of it."""
    if not versions:
        return ""
    sizes = {version.size for version in versions}
    try:
        size = system.getsize(target)
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it cannot be read: {error}"
    try:
        if size in sizes and any(_fits(target, version) for version in versions if version.size == size):
            return ""
    except OSError as error:
        return f"it cannot be read: {error}"
    if _is_whole(target):
        return ""  # Another program, outside of `lastgood run`, has written it since.
    last = versions[-1]
    if size != last.size:
        return f"it has {size} bytes, not the {last.size} that were saved"
    return "its bytes have changed since it was saved (checksum)"


def _fits(path: str, version: Version) -> bool:
    if version.crc32 == NO_CHECKSUM:
        return True
    if checksum(path, version.begins)[1] != version.crc32:
        return False
    return not version.begins or _is_whole(path)


def zip_directory(path: str) -> int:
    """Where the directory of a zip file begins; 0 where that cannot be told, or not all before it has a checksum."""
    try:
        with system.open_file(path, "rb") as file, zipfile.ZipFile(file) as archive:
            if all(member.CRC or not member.file_size for member in archive.infolist()):
                return archive.start_dir
    except (OSError, ValueError, zipfile.BadZipFile):
        pass  # Not a zip: its whole content is checksummed.
    return 0


def _is_whole(path: str) -> bool:
    """Whether a file that is not what was saved is nevertheless whole, as far as its format shows that."""
    try:
        with system.open_file(path, "rb") as file:
            begin = file.read(8)
            if path.endswith(".safetensors"):
                (length,) = struct.unpack("<Q", begin)
                header = json.loads(file.read(length)) if length < 1 << 28 else {}
                ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
                # The format has no checksum: right in length and still not what was saved means changed bytes, unless
                # another program wrote it, which the time of change shows.
                return bool(ends) and 8 + length + max(ends) == system.getsize(path) and _changed_later(path)
            if begin[:2] != b"PK" and not zipfile.is_zipfile(file):
                if path.endswith(".json"):
                    file.seek(0)
                    json.loads(file.read())
                # Pickles, YAML, torch's old format: as above. Empty, or with zeros at its beginning, is what a crash of
                # the system leaves of a file that was not synced.
                return bool(begin[:4].strip(b"\0")) and _changed_later(path)
            with zipfile.ZipFile(file) as archive:
                if not any(member.CRC for member in archive.infolist()):
                    return _changed_later(path)  # torch.serialization.set_crc32_options(False): as above.
                return archive.testzip() is None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
    ):
        return False


def _changed_later(path: str) -> bool:
    versions = read(path)
    return bool(versions) and os.stat(path).st_mtime > versions[-1].time + 2


def family(name: str) -> str:
    """A name without its numbers: ``G_500.pth`` and ``G_600.pth`` are one family."""
    return re.sub(r"\d+", "#", name)


def siblings(target: str) -> list[str]:
    """The names of the other saved files in its directory that have the same name but for the numbers."""
    directory, own = os.path.split(target)
    hidden = os.path.join(directory, PRIVATE)
    names = [
        entry[: -len(SUFFIX)]
        for entry in (system.listdir(hidden) if os.path.isdir(hidden) else [])
        if entry.endswith(SUFFIX)
    ]
    return [name for name in names if name != own and family(name) == family(own)]


def path_of_save(target: str, save: int) -> str | None:
    """Where the version of a file of a group lies, intact, that is of the save of this number; None: nowhere."""
    for version in read(target):
        if version.save != save:
            continue
        for path in (target, *([history_path(target, version.kept)] if version.kept else [])):
            # Not check(): for that a file is good that is whole, whatever its version.
            if system.isfile(path) and system.getsize(path) == version.size and _fits(path, version):
                return path
    return None


def names_rank(path: str, rank: int) -> bool:
    """Whether a path has the number of a rank in it, as files have that are a rank's own."""
    directory, name = os.path.split(path)
    if re.search(rf"(?<!\d)0*{rank}(?!\d)", name):
        return True
    # The number alone is not enough here: checkpoint-1 is everybody's.
    near = os.sep.join(directory.split(os.sep)[-3:])
    return re.search(rf"(rank|proc|process|worker|shard)[-_.=]?0*{rank}(?!\d)", near, re.IGNORECASE) is not None


def intact_versions(target: str) -> Iterator[tuple[str, Version]]:
    """Paths that can stand in for a damaged file, newest first: its earlier versions, then its siblings."""
    directory = os.path.dirname(target)
    versions = read(target)
    rank = versions[-1].rank if versions else -1
    candidates = [(v.time, history_path(target, v.kept), v) for v in versions if v.kept]
    for name in siblings(target):
        sibling = os.path.join(directory, name)
        # Where the number in a name is its rank's, the file of another rank is another part of the same step.
        candidates += [
            (v.time, sibling, v)
            for v in read(sibling)[-1:]
            if v.rank == rank or -1 in (v.rank, rank) or not names_rank(target, rank)
        ]
    for _, path, version in sorted(candidates, key=lambda candidate: candidate[0], reverse=True):
        if system.isfile(path) and not check(path, [version]):
            yield path, version


def verify(directory: str) -> list[Finding]:
    """Check every file below `directory` that `lastgood run` saved, and its kept versions, against the journal."""
    findings = []
    for here, directories, _ in os.walk(directory):
        if PRIVATE not in directories:
            continue
        directories.remove(PRIVATE)
        for entry in sorted(system.listdir(os.path.join(here, PRIVATE))):
            if not entry.endswith(SUFFIX) or system.is_of_macos(entry):
                continue
            target = os.path.join(here, entry[: -len(SUFFIX)])
            versions = read(target)
            if system.exists(target):  # A file that its program deleted is no damage.
                findings.append(Finding(target, check(target, versions)))
            for version in versions:
                kept = history_path(target, version.kept)
                if version.kept and system.exists(kept):  # The oldest is deleted before that is written down.
                    findings.append(Finding(kept, check(kept, [version])))
    return findings
