"""The only module that opens, syncs, renames or deletes, with its parts :mod:`direct_io` and :mod:`disk_windows`.

Everything that lastgood does to a file system goes through the functions below, so that a test can stand at this one
door: :data:`observer` is called before and after each operation, and may record it, delay it, raise from it, or kill
the process. What differs between operating systems is decided here, once, at import.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from lastgood import direct_io, disk_windows

WINDOWS = os.name == "nt"
_T = TypeVar("_T")

PATIENCE = 10.0
"""Seconds for which an operation that the system refuses because another program has the file open is tried again."""

OPEN_PATIENCE = 1.0
"""Seconds, likewise, where "access denied" to an open may also mean that this user has no right to the file."""


@dataclass(frozen=True)
class Operation:
    """One operation on the file system, as :data:`observer` sees it."""

    name: str
    """create, write, sync, replace, link, remove, mkdir, rmdir, sync_dir, append, overwrite, read"""
    path: Path
    """What is operated on; for replace and link the new name."""
    source: Path | None = None
    """For replace and link: the name that exists."""
    data: memoryview | None = None
    """For write, append, overwrite: the bytes."""
    file: direct_io.Writer | None = None
    """For write: the open file, so that a test can write a part and die."""


observer: Callable[[Operation, Literal["before", "after"]], None] | None = None
"""Set by tests. May raise, in "before" to refuse an operation, in "after" to report a failure of one that happened."""


@contextlib.contextmanager
def _observed(
    name: str,
    path: Path,
    *,
    source: Path | None = None,
    data: memoryview | None = None,
    file: direct_io.Writer | None = None,
) -> Iterator[None]:
    watch = observer
    if watch is None:
        yield
        return
    operation = Operation(name, path, source, data, file)
    watch(operation, "before")
    yield
    watch(operation, "after")


def native(path: Path) -> str:
    """The path as the system call wants it: on Windows, long absolute paths need the ``\\\\?\\`` form."""
    text = str(path)
    if not WINDOWS or len(text) < 240 or text.startswith("\\\\?\\"):
        return text
    text = os.path.abspath(text)
    return "\\\\?\\UNC\\" + text[2:] if text.startswith("\\\\") else "\\\\?\\" + text


def absolute(path: str | os.PathLike[str]) -> Path:
    """The absolute path; on Windows without trailing dots and blanks, which the system drops from a last name only."""
    return Path(os.path.abspath(path)) if WINDOWS else Path(path).absolute()


def is_held(error: OSError) -> bool:
    """Whether the system refused because another program has the file open (Windows sharing violations)."""
    return getattr(error, "winerror", None) in disk_windows.SHARING


def _patiently(operation: Callable[[], _T], patience: float | None, passes: Callable[[OSError], bool] = is_held) -> _T:
    """Try `operation` again, with growing pauses, for as long as its error `passes`."""
    give_up = time.monotonic() + (PATIENCE if patience is None else patience)
    pause = 0.005
    while True:
        try:
            return operation()
        except OSError as error:
            if not passes(error) or time.monotonic() + pause > give_up:
                raise
        time.sleep(pause)
        pause = min(pause * 2, 0.5)


_WRITE_BYTES = 16 << 20
# Large enough for a disk to reach its speed, small enough that a Ctrl-C gets through and the next part can be prepared.


class NewFile(io.RawIOBase):
    """A file that did not exist, written from front to back.

    Args:
        path: its name.
        direct: write past the page cache where the file system takes that and the data are aligned to pages:
            faster for large data, and the cache stays with those who need it.

    Raises FileExistsError when the name is taken. Leaving the context closes the file; it does not sync it.
    """

    def __init__(self, path: Path, *, direct: bool = False) -> None:
        self.path = path
        with _observed("create", path):
            # Unbuffered: each write is one system call, and a failing one is reported by the call that made it.
            self._file = direct_io.Writer(native(path), direct)
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """Write all of `data`; a short write is continued."""
        view = memoryview(data).cast("B")
        with _observed("write", self.path, data=view, file=self._file):
            rest = view
            while rest:
                written = self._file.write(rest[:_WRITE_BYTES])
                if not written:
                    raise OSError(errno.EIO, "the disk took no bytes and gave no reason", str(self.path))
                rest = rest[written:]
        self.size += len(view)
        return len(view)

    def sync(self) -> None:
        """Return when the bytes are on the disk."""
        with _observed("sync", self.path):
            _sync_descriptor(self._file.fileno())

    def close(self) -> None:
        file: direct_io.Writer | None = getattr(self, "_file", None)  # Absent where the name was taken.
        if file is not None:
            file.close()
        super().close()


_UNKNOWN_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY)
# How file systems, network and FUSE ones above all, say that they do not know a way to sync.


def _sync_descriptor(descriptor: int) -> None:
    if sys.platform == "darwin":
        import fcntl

        try:
            # Apple's fsync does not empty the cache of the drive; this does, where the file system knows it.
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in _UNKNOWN_SYNC:
                raise
    os.fsync(descriptor)


def sync_file(path: Path) -> None:
    """Make the content of a file durable that another library has written and closed."""
    with _observed("sync", path):
        # Windows syncs only what is open for writing.
        descriptor = os.open(native(path), os.O_RDWR if WINDOWS else os.O_RDONLY)
        try:
            _sync_descriptor(descriptor)
        finally:
            os.close(descriptor)


def sync_dir(path: Path) -> bool:
    """Make the names in a directory durable. Returns whether the file system knows how to.

    Windows has no such call: there, the file system's journal does it.
    """
    with _observed("sync_dir", path):
        if WINDOWS:
            return False
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _sync_descriptor(descriptor)
        except OSError as error:
            # Some network and FUSE file systems do not know fsync of a directory; `doctor` says so.
            if error.errno not in _UNKNOWN_SYNC:
                raise
            return False
        finally:
            os.close(descriptor)
    return True


def replace(source: Path, target: Path, *, patience: float | None = None) -> None:
    """Give `source` the name `target`, atomically, taking the place of what had it."""

    def once() -> None:
        with _observed("replace", target, source=source):
            os.replace(native(source), native(target))

    _patiently(once, patience, lambda error: is_held(error) and _may_pass(target))


def _may_pass(path: Path) -> bool:
    """Raise with the reason where Windows will refuse this name for as long as it is as it is."""
    reason = disk_windows.refusal(native(path))
    if reason is not None:
        raise PermissionError(errno.EACCES, reason, str(path))
    return True


def link(source: Path, target: Path) -> None:
    """Give the file `source` the second name `target`. Raises OSError where the file system has no hard links."""
    with _observed("link", target, source=source):
        os.link(native(source), native(target))


def remove(path: Path, *, missing_ok: bool = False, patience: float | None = None) -> None:
    """Delete one file."""

    def once() -> None:
        with _observed("remove", path):
            os.unlink(native(path))

    try:
        _patiently(once, patience, lambda error: is_held(error) and _may_pass(path))
    except FileNotFoundError:
        if not missing_ok:
            raise


def make_dir(path: Path) -> None:
    """Make a directory that did not exist. Raises FileExistsError when the name is taken."""
    with _observed("mkdir", path):
        os.mkdir(native(path))


def make_dirs(path: Path) -> None:
    """Make a directory and its parents, where they do not exist, and make their names durable."""
    missing = []
    here = path
    while not is_dir(here):
        missing.append(here)
        if here.parent == here:
            break
        here = here.parent
    for directory in reversed(missing):
        try:
            make_dir(directory)
        except FileExistsError:
            if not is_dir(directory):
                raise
        sync_dir(directory.parent)


def sync_names(path: Path) -> None:
    """Make the name of a directory durable, and those of the directories above it on the same file system.

    Whoever made them (a user, a job that was killed) may not have. As far as this user may read them.
    """
    for parent in path.parents:
        try:
            sync_dir(parent)
        except OSError as error:
            # On a file system that is mounted read-only, as the root of macOS is, no name can be new.
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return
        if os.path.ismount(parent):
            return


def make_private_dir(path: Path) -> None:
    """Make a directory in a place that others can write to, for this user alone.

    Raises PermissionError when the name is taken by something that another user made: it is not to be trusted.
    """
    with contextlib.suppress(FileExistsError):
        make_dir(path)
        if not WINDOWS:
            os.chmod(path, 0o700)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode) or (not WINDOWS and status.st_uid != os.getuid()):
        raise PermissionError(errno.EACCES, "this name was taken by another user", str(path))


def remove_dir(path: Path, *, patience: float | None = None) -> None:
    """Delete one empty directory."""

    def once() -> None:
        with _observed("rmdir", path):
            os.rmdir(native(path))

    def passes(error: OSError) -> bool:
        return is_held(error) or getattr(error, "winerror", None) == disk_windows.DIR_NOT_EMPTY

    _patiently(once, patience, passes)


def append_line(path: Path, line: str, *, patience: float = OPEN_PATIENCE) -> None:
    """Add one line to a log, in one write. It is not synced: a log line is no promise."""
    data = memoryview((line + "\n").encode())

    def once() -> None:
        with _observed("append", path, data=data), _open(path, "append") as file:
            file.write(data)

    _patiently(once, patience)


def overwrite(path: Path, data: bytes, *, patience: float = OPEN_PATIENCE) -> None:
    """Replace the content of a small file in place, neither atomically nor durably: for heartbeats and rounds."""

    def once() -> None:
        with _observed("overwrite", path, data=memoryview(data)), _open(path, "write") as file:
            file.write(data)
            if WINDOWS:
                file.truncate()

    _patiently(once, patience)


def open_read(path: Path, *, patience: float | None = None) -> BinaryIO:
    """Open a file for unbuffered reading. On Windows others may rename and delete it meanwhile."""
    began = time.monotonic()

    def once() -> BinaryIO:
        with _observed("read", path):
            return _open(path, "read")

    def passes(error: OSError) -> bool:
        # Access is denied in the moment of a replacement too, or to a directory, or for good.
        code = getattr(error, "winerror", None)
        return is_held(error) and (code != 5 or (time.monotonic() < began + OPEN_PATIENCE and not is_dir(path)))

    return _patiently(once, patience, passes)


def _open(path: Path, way: Literal["read", "append", "write"]) -> BinaryIO:
    mode = {"read": "rb", "append": "ab", "write": "wb"}[way]
    if WINDOWS:
        return open(disk_windows.open_shared(native(path), way), mode, buffering=0)  # type: ignore[return-value]
    return open(path, mode, buffering=0, opener=_open_regular)  # type: ignore[return-value, unused-ignore]


def _open_regular(path: str, flags: int) -> int:
    """A descriptor of a regular file. A pipe in its place would be waited for, and a device has no end."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "this is no regular file", path)
    return descriptor


def read_bytes(path: Path, *, limit: int) -> bytes:
    """The whole content of a file of at most `limit` bytes; a larger one raises ValueError before it is read."""
    with open_read(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path} has {size} bytes, more than the {limit} that such a file may have")
        return file.read()


def read_into(file: BinaryIO, offset: int, buffer: memoryview) -> int:
    """Fill `buffer` from `offset` on; returns how many bytes there were. Threads may share a file on POSIX."""
    done = 0
    while done < len(buffer):
        part = buffer[done : done + (1 << 28)]
        if WINDOWS:
            file.seek(offset + done)
            count: Any = file.readinto(part)  # type: ignore[attr-defined]
        else:
            count = direct_io.read_at(file.fileno(), part, offset + done)
        if not count:
            break
        done += count
    return done


def drop_cache(file: BinaryIO) -> None:
    """Ask the system to forget what it has cached of a synced file, so that reading it reads the disk."""
    direct_io.drop_cache(file.fileno())


def file_size(path: Path) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    return os.stat(native(path)).st_size


def machine_guid() -> str:
    """What tells this installation of Windows from others. Raises OSError on other systems."""
    return disk_windows.machine_guid()


def identity(path: Path) -> tuple[int, int]:
    """What two names of one file have in common, and no other file has. Raises FileNotFoundError."""
    status = os.stat(native(path))
    return status.st_dev, status.st_ino


def exists(path: Path) -> bool:
    return os.path.lexists(native(path))


def is_dir(path: Path) -> bool:
    return os.path.isdir(native(path))


def is_file(path: Path) -> bool:
    return os.path.isfile(native(path))


def real_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path with links resolved, as far as the system can: Windows cannot for every long path."""
    try:
        return Path(os.path.realpath(path))
    except OSError:
        return Path(os.path.abspath(path))


def names(path: Path) -> list[str]:
    """The names in a directory, sorted; empty where there is none."""
    try:
        return sorted(os.listdir(native(path)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write to the file system of `path`."""
    return shutil.disk_usage(native(path)).free


def free_files(path: Path) -> int | None:
    """How many more files this user can make there; None where the file system sets no number."""
    if WINDOWS:
        return None
    status = os.statvfs(path)
    return status.f_favail if status.f_files else None


def give_to_group(path: Path, group: int) -> None:
    """Let a group read and write what was made: for clusters where colleagues share a run directory."""
    if WINDOWS:
        return
    status = os.stat(path)
    wanted = 0o070 if stat.S_ISDIR(status.st_mode) else 0o060
    # What a colleague has made is the group's already, and only its owner may change that.
    if status.st_gid != group:
        os.chown(path, -1, group)
    if status.st_mode & wanted != wanted:
        os.chmod(path, stat.S_IMODE(status.st_mode) | wanted)


class FileLock:
    """An exclusive lock that the operating system holds for this process, and drops when the process ends.

    It is a record lock: a forked child does not inherit it, and the same process can take it again. It is lost when
    the process closes *any* descriptor of the file, so the file serves as a lock and for nothing else.
    """

    def __init__(self, path: Path) -> None:
        # Windows locks no file that was opened for appending only.
        self._file = _patiently(lambda: _open(path, "write" if WINDOWS else "append"), OPEN_PATIENCE)

    @classmethod
    def try_acquire(cls, path: Path) -> FileLock | None:
        """The lock, or None when another process of this machine has it."""
        lock = cls(path)
        try:
            if WINDOWS:
                import msvcrt

                lock._file.seek(0)
                msvcrt.locking(lock._file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
            else:
                import fcntl

                fcntl.lockf(lock._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock._file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                return None
            raise
        return lock

    def release(self) -> None:
        self._file.close()
