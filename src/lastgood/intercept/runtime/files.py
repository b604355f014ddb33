"""`open` for writing, and which paths are of interest."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import pathlib
import stat as stat_module
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from . import system
from .saving import Raw, Saver
from .settings import PRIVATE, SIDE_FILES

CHECKPOINTS = (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".pth.tar", ".pt.tar", ".distcp")
SHARDS = (".distcp", ".metadata")
"""What torch.distributed.checkpoint writes, and reads through `open`: nothing else of it passes here."""

_PATH_OPENER = getattr(pathlib.Path, "_opener", None)
"""Until Python 3.9, pathlib opens files through this, which does what `open` does by itself."""

_saver: Saver
_check: Callable[[Any], Any]


def use(saver: Saver, check: Callable[[Any], Any]) -> None:
    """Bind the functions of this module to the saver of this process, and to what refuses a damaged file."""
    global _saver, _check
    _saver, _check = saver, check


def absolute(path: Any) -> str | None:
    """The one name of a file by which we know it: links in its directory are followed, a link itself is not.

    None for bytes and descriptors, which we leave alone.
    """
    try:
        name = os.fspath(path)
    except TypeError:
        return None
    if not isinstance(name, str):
        return None
    directory, last = os.path.split(name)
    if last in ("", ".", ".."):
        return os.path.realpath(name)
    return os.path.join(os.path.realpath(directory), last)


def target_of(path: Any) -> str | None:
    """The file that writing to `path` would write, links followed; None where it is not a plain file, or not ours."""
    try:
        name = os.path.realpath(os.fspath(path))
    except TypeError:
        return None
    if not isinstance(name, str):
        return None
    try:
        if not stat_module.S_ISREG(system.stat(name).st_mode):
            return None  # A pipe or a device.
    except FileNotFoundError:
        pass  # A new file.
    except OSError:
        return None
    directory = os.path.dirname(name)
    if os.path.basename(directory) == PRIVATE or PRIVATE in name.split(os.sep):
        return None
    try:
        system.private(directory)
    except OSError:
        # No such directory, or no right to make files in it: the program gets the error that it would have got.
        return None
    return name


def is_checkpoint(path: str) -> bool:
    """Whether a file is, by its name and place, a part of a checkpoint."""
    directory, name = os.path.split(path)
    if any(fnmatchcase(name, pattern) for pattern in _saver.settings.match):
        return True
    if name.endswith(CHECKPOINTS):
        # There it holds directories for sys.path.
        return not name.endswith(".pth") or os.path.basename(directory) not in ("site-packages", "dist-packages")
    if not name.endswith(SIDE_FILES):
        return False
    # By what lies there and not by what this process saved: it may have resumed, or be a rank that saves no other file.
    return system.exists(os.path.join(directory, PRIVATE)) or _saver.units.unit_of(path) is not None


def is_checkpoint_move(source: str, target: str) -> bool:
    """Whether a rename puts a checkpoint in place: a plain file, saved by us or named like one."""
    if source in _saver.pretended or source in _saver.mine:
        return True
    return is_checkpoint(target) and system.isfile(source) and not os.path.islink(source)


class _Atomic:
    """A file opened for writing: under its name when it is closed, if all went well until then."""

    def prepare(self, path: str, shown: Any, mode: str) -> Raw:
        self._path = path
        self._shown = shown
        self._mode = mode
        self._called = time.time()
        self._failed: BaseException | None = None
        self._owner = os.getpid()
        self.opened_by = threading.current_thread()
        self._before = _being_handled()
        self._temporary = _saver.temporary(path)
        return Raw(self._temporary, like=path, mode="x+" if "+" in mode else "x")

    @property
    def name(self) -> Any:
        return self._shown

    @property
    def mode(self) -> str:
        return self._mode

    def fail(self, error: BaseException, *, aside: bool = False) -> None:
        """What was written is not to be put in place, for an error came in between; `aside` keeps it elsewhere."""
        if self._failed is None:
            self._failed = error
            self._aside = aside

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            self.fail(error)
        self.close()

    def close(self) -> None:
        this: Any = self
        if this.closed:
            return
        raw: Any = this.raw
        base: Any = super()
        if self._owner != os.getpid():
            base.close()  # A forked child's copy: the file is its parent's.
            return
        if raw.failed is not None:
            self.fail(raw.failed)
        error = sys.exc_info()[1]
        if error is not None and id(error) not in self._before and not isinstance(error, _CONTROL):
            # Closed on the way out, as in `finally`, or as numpy closes an npz: that makes it no whole file. Where the
            # program meant to write so much and no more, it finds it.
            self.fail(error, aside=True)
        try:
            if self._failed is None:
                _saver.finish(raw, base)
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            try:
                base.close()
            finally:
                if self._failed is not None:
                    _saver.abandon(self._temporary, self._path, self._failed, aside=self._aside)
        if self._failed is None:
            _saver.put(self._temporary, self._path, raw.size, raw.crc, self._called)


_CONTROL = (StopIteration, StopAsyncIteration, GeneratorExit)
"""Exceptions that are no errors: a file may well be closed while one is dealt with."""


def _being_handled() -> set[int]:
    """The exceptions that are being dealt with. By number: to hold them would hold all that was going on then."""
    numbers: set[int] = set()
    error = sys.exc_info()[1]
    while error is not None and id(error) not in numbers:
        numbers.add(id(error))
        error = error.__context__
    return numbers


_not_closed: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Files that the program leaves to the interpreter to close, which does so when we can do nothing any more."""
    died = getattr(sys, "last_value", None)
    for file in list(_not_closed):
        binary = getattr(file, "buffer", file) if not file.closed else None
        if binary is None:
            continue
        if died is not None:
            binary.fail(died, aside=True)
        elif binary.opened_by is not threading.current_thread() and binary.opened_by.is_alive():
            continue  # A daemon thread is in the middle of it.
        with contextlib.suppress(OSError):  # Reported; and there is nobody left to raise it to.
            file.close()


@contextlib.contextmanager
def writing_to(file: Any) -> Iterator[None]:
    """Around a function that writes to an open file: if it fails, the file is not put in place, whoever closes it."""
    try:
        yield
    except BaseException as error:
        binary = getattr(file, "buffer", file)
        if isinstance(binary, _Atomic):
            binary.fail(error)
        raise


class Bytes(_Atomic, io.BufferedWriter):  # type: ignore[misc, override, unused-ignore]
    """A file opened with "wb"."""

    def __init__(self, path: str, shown: Any, buffer_size: int) -> None:
        super().__init__(self.prepare(path, shown, "wb"), buffer_size)


class ReadableBytes(_Atomic, io.BufferedRandom):  # type: ignore[misc, override, unused-ignore]
    """A file opened with "w+b", as zipfile does, and so numpy for an npz."""

    def __init__(self, path: str, shown: Any, buffer_size: int) -> None:
        super().__init__(self.prepare(path, shown, "rb+"), buffer_size)


class Text(io.TextIOWrapper):
    """The same for text."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            buffer: Any = self.buffer
            buffer.fail(error)
        self.close()


def open(
    file: Any,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Any = None,
) -> Any:
    """The builtin, except for checkpoints that are written from the start."""
    if (
        not isinstance(mode, str)
        or "w" not in mode
        or ("+" in mode and "b" not in mode)
        or buffering == 0
        or (opener is not None and getattr(opener, "__func__", None) is not _PATH_OPENER)
        or not isinstance(file, (str, os.PathLike))
    ):
        if mode == "rb" and isinstance(file, (str, os.PathLike)) and os.fsdecode(file).endswith(SHARDS):
            file = _check(file) or file
        return system.open_file(file, mode, buffering, encoding, errors, newline, closefd, opener)
    name = absolute(file)
    if name is None or not is_checkpoint(name):
        return system.open_file(file, mode, buffering, encoding, errors, newline, closefd, opener)
    path = target_of(file)
    if path is None:
        with _saver.reporting(name):
            return system.open_file(file, mode, buffering, encoding, errors, newline, closefd, opener)
    size = buffering if buffering > 1 else 1 << 20
    binary: Any
    if _saver.leaves_to_rank_zero(path):
        binary = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(Unwritten(path, file), size)
    else:
        binary = (ReadableBytes if "+" in mode else Bytes)(path, file, size)
    if "b" not in mode:
        binary = (Text if isinstance(binary, _Atomic) else io.TextIOWrapper)(
            binary, encoding, errors, newline, line_buffering=buffering == 1
        )
        binary.mode = mode
    if isinstance(getattr(binary, "buffer", binary), _Atomic):
        _not_closed.add(binary)
    return binary


class Unwritten(io.FileIO):
    """What a rank writes to that leaves the saving to rank 0: nothing is kept but the size. Read, it is empty."""

    def __init__(self, path: str, shown: Any) -> None:
        super().__init__(os.devnull, "w+")
        self.name = shown
        self._path = path
        self._at = 0
        self._size = 0
        _saver.pretend(path, 0)

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._at += size
        self._size = max(self._size, self._at)
        return size

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def truncate(self, size: int | None = None) -> int:
        self._size = self._at if size is None else size
        return self._size

    def close(self) -> None:
        if not self.closed and self._path in _saver.pretended:
            _saver.pretended[self._path] = self._size
        super().close()


class Counting:
    """A file that forgets everything but its size: what a rank writes to that leaves the saving to rank 0."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.size += size
        return size

    def seek(self, offset: int, whence: int) -> int:
        """Only forward, from where it is, over data that torch.save is told to skip."""
        self.size += offset
        return self.size

    def flush(self) -> None:
        """Nothing is held back."""


def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
    """`os.stat`, which also sees the files that rank 0 saves in this rank's place."""
    try:
        return system.stat(path, *args, **kwargs)
    except FileNotFoundError:
        if not is_pretended(path):
            raise
        now = time.time()
        mode = stat_module.S_IFREG | 0o644
        size = _saver.pretended[os.path.realpath(path)]
        return os.stat_result((mode, 0, 0, 1, 0, 0, size, int(now), int(now), int(now)))


def is_pretended(path: Any) -> bool:
    """Whether rank 0 saves this file in this rank's place."""
    if not _saver.pretended or not isinstance(path, (str, os.PathLike)):
        return False
    return os.path.realpath(path) in _saver.pretended


class Entries:
    """The result of `os.scandir` without some names."""

    def __init__(self, entries: Any, hidden: set[str]) -> None:
        self._entries = entries
        self._hidden = hidden

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while True:
            entry = next(self._entries)
            if entry.name not in self._hidden:
                return entry

    def __enter__(self) -> Entries:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._entries.close()
