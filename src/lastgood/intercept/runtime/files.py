"""`open` for writing, and which paths are of interest."""

from __future__ import annotations

import io
import os
import stat as stat_module
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from . import system
from .saving import Raw, Saver
from .settings import PRIVATE, SIDE_FILES

CHECKPOINTS = (".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".pth.tar", ".pt.tar")

_saver: Saver


def use(saver: Saver) -> None:
    """Bind the functions of this module to the saver of this process."""
    global _saver
    _saver = saver


def absolute(path: Any) -> str | None:
    """The absolute path; None for bytes and descriptors, which we leave alone."""
    try:
        name = os.fspath(path)
    except TypeError:
        return None
    return os.path.abspath(name) if isinstance(name, str) else None


def target_of(path: Any) -> str | None:
    """The file that writing to `path` would write, links followed; None where it is not a plain file, or not ours."""
    name = absolute(path)
    if name is None:
        return None
    name = os.path.realpath(name)
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
    name = os.path.basename(path)
    if name.endswith(CHECKPOINTS) or any(fnmatchcase(name, pattern) for pattern in _saver.settings.match):
        return True
    if not name.endswith(SIDE_FILES):
        return False
    # By what lies there and not by what this process saved: it may have resumed, or be a rank that saves no other file.
    return system.exists(os.path.join(os.path.dirname(path), PRIVATE)) or _saver.units.unit_of(path) is not None


def is_checkpoint_move(source: str, target: str) -> bool:
    """Whether a rename puts a checkpoint in place: a plain file, saved by us or named like one."""
    if source in _saver.pretended or source in _saver.mine:
        return True
    return is_checkpoint(target) and system.isfile(source) and os.path.isdir(os.path.dirname(target))


class _Atomic:
    """A file opened for writing: under its name when it is closed, if all went well until then."""

    def prepare(self, path: str, shown: Any, mode: str) -> Raw:
        self._path = path
        self._shown = shown
        self._mode = mode
        self._called = time.time()
        self._failed: BaseException | None = None
        self._temporary = _saver.temporary(path)
        return Raw(self._temporary, mode="x+" if "+" in mode else "x")

    @property
    def name(self) -> Any:
        return self._shown

    @property
    def mode(self) -> str:
        return self._mode

    def fail(self, error: BaseException) -> None:
        """What was written is not to be kept: the program left the block with an error."""
        self._failed = error

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
        try:
            if self._failed is None:
                _saver.finish(raw, base)
        except BaseException as error:
            self._failed = error
            raise
        finally:
            try:
                base.close()
            finally:
                if self._failed is not None:
                    _saver.abandon(self._temporary, self._path, self._failed)
        if self._failed is None:
            _saver.put(self._temporary, self._path, raw.size, raw.crc, self._called)


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
        or opener is not None
        or not isinstance(file, (str, os.PathLike))
    ):
        return system.open_file(file, mode, buffering, encoding, errors, newline, closefd, opener)
    name = absolute(file)
    path = target_of(file) if name is not None and is_checkpoint(name) else None
    if path is None:
        return system.open_file(file, mode, buffering, encoding, errors, newline, closefd, opener)
    if "+" not in mode and _saver.leaves_to_rank_zero(path):
        _saver.pretend(path, 0)
        return system.open_file(os.devnull, mode, buffering, encoding, errors, newline)
    binary = (ReadableBytes if "+" in mode else Bytes)(path, file, buffering if buffering > 1 else 1 << 20)
    if "b" in mode:
        return binary
    text = Text(binary, encoding, errors, newline, line_buffering=buffering == 1)
    text.mode = mode  # type: ignore[misc]
    return text


class Counting:
    """A file that forgets everything but its size: what a rank writes to that leaves the saving to rank 0."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        """Nothing is held back."""


def stat(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
    """`os.stat`, which also sees the files that rank 0 saves in this rank's place."""
    try:
        return system.stat(path, *args, **kwargs)
    except FileNotFoundError:
        name = absolute(path) if not isinstance(path, int) else None
        if name is None or name not in _saver.pretended:
            raise
        now = time.time()
        mode = stat_module.S_IFREG | 0o644
        return os.stat_result((mode, 0, 0, 1, 0, 0, _saver.pretended[name], int(now), int(now), int(now)))


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
