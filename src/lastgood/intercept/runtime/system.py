"""The file system as it was before anything was patched, with patience for programs that hold a file open."""

from __future__ import annotations

import _thread
import contextlib
import errno
import functools
import hashlib
import io
import os
import shutil
import socket
import stat as stat_module
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from .settings import PRIVATE

# Taken when this module is imported, before the patches: our own work must not run through them.
open_file = io.open
listdir = os.listdir
scandir = os.scandir
rename = os.rename
replace = os.replace
link = os.link
remove = os.remove
rmdir = os.rmdir
mkdir = os.mkdir
stat = os.stat
copyfile = shutil.copyfile
copymode = shutil.copymode
copystat = shutil.copystat
move = shutil.move
rmtree = shutil.rmtree
exit_program = sys.exit
leave = os._exit

WINDOWS = os.name == "nt"
_SHARING = (5, 32, 33)
# Windows: access denied, sharing violation, lock violation.
_threads: dict[str, threading.RLock] = {}  # type: ignore[valid-type, unused-ignore]
LOCK_DEADLINE = 60.0
"""Seconds to wait for another process that is putting a file in place."""


def _mode(path: str) -> int:
    try:
        return stat(path).st_mode
    except (OSError, ValueError):
        return 0


def exists(path: str) -> bool:
    """As os.path.exists, which asks the os.stat of the moment: the one that we put there sees more."""
    return _mode(path) != 0


def isfile(path: str) -> bool:
    return stat_module.S_ISREG(_mode(path))


def getsize(path: str) -> int:
    return stat(path).st_size


started = time.time()
"""When this process, or the one that it was forked from, began to save: seconds since 1970."""
temporary_count = 0


_held: set[int] = set()
# Descriptors of files without a name, until a thread has closed them.
_WORTHWHILE = 256 << 10
# Bytes of a file that takes longer to free than to start a thread.


def after_fork() -> None:
    _threads.clear()  # A lock that another thread of the parent held would never be released in the child.
    while _held:
        os.close(_held.pop())  # The child would keep their bytes on the disk as long as it lives.


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork)


def is_held(error: OSError) -> bool:
    """Whether another program has the file open, and may soon let go."""
    return getattr(error, "winerror", None) in _SHARING or error.errno == errno.ETXTBSY


def patiently(operation: Callable[[], Any], patience: float, on_retry: Callable[[], None]) -> Any:
    """Try again with growing pauses, for `patience` seconds, while the file is held by another program."""
    give_up = time.monotonic() + patience
    pause = 0.005
    while True:
        try:
            return operation()
        except OSError as error:
            if not is_held(error) or time.monotonic() + pause > give_up:
                raise
        on_retry()
        time.sleep(pause)
        pause = min(pause * 2, 0.5)


_UNKNOWN_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY)
# How file systems, network and FUSE ones above all, say that they do not know a way to sync.


def sync_file(descriptor: int) -> None:
    """Return when the bytes are on the disk."""
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


def sync_path(path: str) -> None:
    """Make a file durable that someone else wrote. Opened for writing, since Windows refuses to sync a reader."""
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    except OSError:
        if WINDOWS:
            return
        descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


def sync_dir(path: str) -> None:
    """Make the names in a directory durable, where the system has such a call."""
    if WINDOWS:
        return
    descriptor = os.open(path or ".", os.O_RDONLY)
    try:
        sync_file(descriptor)
    except OSError as error:
        if error.errno not in _UNKNOWN_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def freed_in_background(path: str) -> Iterator[None]:
    """Around what takes the file `path` its last name: a thread frees its bytes, which takes 40 ms for 200 MB.

    The file is held open meanwhile, and the last one to close it frees it.
    """
    descriptor = _hold(path)
    try:
        yield
    finally:
        if descriptor is not None:
            try:
                _thread.start_new_thread(_let_go, (descriptor,))
            except RuntimeError:  # No more threads, or the interpreter is ending.
                _let_go(descriptor)


def _hold(path: str) -> int | None:
    """A descriptor of the file, if it is large and this is its only name."""
    if WINDOWS:
        return None  # What is open there cannot be replaced.
    try:
        status = stat(path)
        if not stat_module.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size < _WORTHWHILE:
            return None
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    _held.add(descriptor)
    return descriptor


def _let_go(descriptor: int) -> None:
    _held.discard(descriptor)  # First: once it is closed, its number may be another file's.
    os.close(descriptor)


def make_dirs(path: str) -> None:
    """As os.makedirs, which would tell our own patches of it."""
    try:
        mkdir(path)
    except FileExistsError:
        pass
    except FileNotFoundError:
        make_dirs(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):
            mkdir(path)


def private(directory: str) -> str:
    """The hidden directory beside the files of `directory`, made if need be."""
    path = os.path.join(directory, PRIVATE)
    try:
        mkdir(path)
        if WINDOWS:
            import ctypes

            windll: Any = getattr(ctypes, "windll")  # noqa: B009 - mypy on Linux knows no windll
            windll.kernel32.SetFileAttributesW(path, 2)  # FILE_ATTRIBUTE_HIDDEN: the dot hides nothing there
    except FileExistsError:
        pass
    return path


def copy_owner(like: str, path: str) -> None:
    """Give a new file the permissions and the owner of the one that it will replace, if there is one."""
    try:
        status = stat(like)
    except OSError:
        return
    if WINDOWS:
        return  # All that os.chmod knows there is read-only, and such a file could not be replaced.
    with contextlib.suppress(OSError):  # Some network drives know no permissions, and only root gives files away.
        os.chmod(path, stat_module.S_IMODE(status.st_mode))
        made = stat(path)  # Of its directory's group on macOS, and in a setgid directory.
        if sys.platform != "win32" and (status.st_uid, status.st_gid) != (made.st_uid, made.st_gid):
            os.chown(path, status.st_uid, status.st_gid)


def temporary(target: str) -> str:
    """A name on the target's file system that no other process uses and no pattern of the program matches."""
    global temporary_count
    temporary_count += 1
    name = f"tmp-{host()}-{os.getpid()}-{temporary_count}-{os.urandom(4).hex()}"
    return os.path.join(private(os.path.dirname(target)), name)


def is_of_macos(name: str) -> bool:
    """Whether it is a file of macOS beside the program's: Finder's, or what a drive cannot hold within a file."""
    return name == ".DS_Store" or name.startswith("._")


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    if WINDOWS:
        import ctypes

        kernel: Any = getattr(ctypes, "windll").kernel32  # noqa: B009
        handle = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
        if not handle:
            return False
        code = ctypes.c_ulong()
        kernel.GetExitCodeProcess(handle, ctypes.byref(code))
        kernel.CloseHandle(handle)
        return code.value == 259  # STILL_ACTIVE
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # One that has ended, and that nobody has asked for its exit code yet, writes nothing any more.
    state = (_status(pid) or [_of_ps("stat", pid)])[0]
    return state[:1] not in ("Z", "X")


def birth(pid: int) -> str:
    """What tells a process from a later one with the same pid; empty where the system does not say it (Windows)."""
    try:
        with open_file("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return _status(pid)[19] + file.read().strip()
    except (OSError, IndexError):
        return _of_ps("lstart", pid)


def _status(pid: int) -> list[str]:
    """What Linux says of a process, from its state on; nothing elsewhere."""
    try:
        with open_file(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []


def _of_ps(what: str, pid: int) -> str:
    """What ps says of a process: macOS has no /proc. Empty where it says nothing."""
    if WINDOWS:
        return ""
    import subprocess

    variables = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}  # A start has one form, wherever and whenever it is asked.
    try:
        done = subprocess.run(
            ["ps", "-o", f"{what}=", "-p", str(pid)],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return " ".join(done.stdout.decode("ascii", "replace").split())


def host() -> str:
    """What tells this machine from others: its name; on macOS, where the network may change that, its number."""
    return (_hardware() if sys.platform == "darwin" else "") or socket.gethostname()


@functools.lru_cache
def _hardware() -> str:
    """The number that gethostuuid(2) of macOS gives, in hexadecimal digits; empty where it gives none."""
    import ctypes

    number = (ctypes.c_ubyte * 16)()
    seconds = (ctypes.c_long * 2)(1, 0)  # struct timespec
    try:
        failed = ctypes.CDLL(None).gethostuuid(number, seconds)
    except (OSError, AttributeError):
        return ""
    return "" if failed else bytes(number).hex()


def clear_leftovers(directory: str) -> None:
    """Delete the temporary files in `directory` that processes of this machine left when they were killed.

    A directory is one that was being deleted.
    """
    hidden = os.path.join(directory, PRIVATE)
    prefix = f"tmp-{host()}-"
    try:
        names = listdir(hidden)
    except OSError:
        return
    for name in names:
        pid = name[len(prefix) :].split("-")[0] if name.startswith(prefix) else ""
        if pid.isdigit() and int(pid) != os.getpid() and not is_alive(int(pid)):
            with contextlib.suppress(OSError):  # Another rank may have deleted it first.
                path = os.path.join(hidden, name)
                rmtree(path) if os.path.isdir(path) else remove(path)


@contextlib.contextmanager
def locked(*targets: str) -> Iterator[None]:
    """Only one process at a time does something with these files; in an order that is the same for all."""
    with contextlib.ExitStack() as stack:
        for path in sorted({_lock_path(target) for target in targets}):
            stack.enter_context(_locked(path))
        yield


def _lock_path(target: str) -> str:
    # Sixteen lock files for a directory: one for each target would litter where names carry the time.
    slot = hashlib.md5(os.path.basename(target).encode("utf-8", "surrogateescape")).hexdigest()[0]
    return os.path.join(private(os.path.dirname(target)), f"lock-{slot}")


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Only one process, and one of its threads, at a time. Held by the system: it ends with the process.

    Where the file system has no locks, or the other holds on past the deadline, we go on without: temporary names are
    unique, so that what results is one whole file even then.
    """
    thread_lock = _threads.setdefault(path, threading.RLock())
    with thread_lock:
        if getattr(_holding, "paths", None) is None:
            _holding.paths = set()
        if path in _holding.paths:
            yield
            return
        with open_file(path, "ab") as file:
            _acquire(file)
            _holding.paths.add(path)
            try:
                yield
            finally:
                _holding.paths.discard(path)


_holding = threading.local()


def _acquire(file: Any) -> None:
    deadline = time.monotonic() + LOCK_DEADLINE
    pause = 0.001
    while time.monotonic() < deadline:
        try:
            if WINDOWS:
                import msvcrt

                file.seek(0)
                lock: Any = msvcrt
                lock.locking(file.fileno(), lock.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                return
        time.sleep(pause)
        pause = min(pause * 2, 0.02)
