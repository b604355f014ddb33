"""Writing and reading past the page cache, where the system and the file system can: a part of :mod:`lastgood.disk`.

The bytes then go between the disk and our memory without a copy in between, and the cache stays with those who need
it. What is not aligned, or refused, goes the ordinary way.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
from typing import BinaryIO

PAGE = 4096
"""Bytes: what direct I/O wants memory, offsets and lengths to be multiples of, on every disk in use."""
O_DIRECT = getattr(os, "O_DIRECT", 0)
_MAP_FAILED = ctypes.c_void_p(-1).value
_LOOKS = 8
# Pages that tell whether a file is cached.
_HUGE_PAGE = 2 << 20
# Bytes, on x86-64; on others it is a number like any.

_library = ctypes.CDLL(None) if os.name == "posix" else None
# Opened here, once: where files of strangers are read, a library that is opened is watched for.
if _library is not None:
    _library.mmap.restype = ctypes.c_void_p
    _library.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_longlong,
    )
    _library.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _library.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    _library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class Writer:
    """A new file, open for writing. Raises FileExistsError when the name is taken."""

    def __init__(self, path: str, direct: bool) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0)
        self._direct = bool(direct and O_DIRECT)
        try:
            self._descriptor = os.open(path, flags | (O_DIRECT if self._direct else 0), 0o666)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise
            # Some file systems (tmpfs, some network ones) refuse the flag, after having made the file.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            self._direct = False
            self._descriptor = os.open(path, flags, 0o666)
        self._at = 0
        self.closed = False

    def write(self, data: memoryview) -> int:
        """One write; returns how many bytes were taken."""
        if self._direct:
            whole = len(data) - len(data) % PAGE
            if whole and self._at % PAGE == 0 and _address(data) % PAGE == 0:
                try:
                    return self._took(os.write(self._descriptor, data[:whole]))
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
            self._direct = False
            _set_direct(self._descriptor, False)
        return self._took(os.write(self._descriptor, data))

    def _took(self, count: int) -> int:
        self._at += count
        return count

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self._descriptor)


class Reader:
    """Reads a file in blocks into memory of its own.

    Args:
        file: synced, open for unbuffered reading, and no longer read in any other way.
        block: bytes to read at a time, at most.
        cached: read through the cache of the system; else what lies on the disk, not what the system has cached of it.
    """

    def __init__(self, file: BinaryIO, block: int, *, cached: bool = False) -> None:
        self._file, self._cached = file, cached
        self._block = _memory(max(PAGE, -(-block // PAGE) * PAGE))
        self._start = self._filled = 0
        """Which bytes of the file are in the block."""
        self._direct = bool(O_DIRECT) and not cached
        if self._direct:
            try:
                _set_direct(file.fileno(), True)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
                self._direct = False
        if not self._direct:
            self._drop_cache()

    def _drop_cache(self) -> None:
        if not self._cached:
            drop_cache(self._file.fileno())

    def read(self, begin: int, end: int, ahead: int) -> memoryview:
        """The bytes from `begin` on, up to `end` or less; none where the file ends. Good until the next call.

        Args:
            ahead: up to here more will be wanted.
        """
        if not self._start <= begin < self._start + self._filled:
            self._fill(begin, ahead)
        return self._block[max(0, begin - self._start) : max(0, min(end - self._start, self._filled))]

    def read_into(self, begin: int, into: memoryview, ahead: int) -> int:
        """Fill `into` with the bytes from `begin` on; returns how many there were.

        Args:
            ahead: as for :meth:`read`.
        """
        done = 0
        if self._cached and len(into) > len(self._block) // 16:
            self._file.seek(begin)
            while done < len(into) and (count := self._file.readinto(into[done:])):  # type: ignore[attr-defined]
                done += count
            return done
        while done < len(into):
            part = self.read(begin + done, begin + len(into), ahead)
            if not part:
                break
            # A slice that is assigned to would keep the GIL.
            ctypes.memmove(_address(into) + done, _address(part), len(part))
            done += len(part)
        return done

    def _fill(self, begin: int, ahead: int) -> None:
        if self._direct:
            start = begin - begin % PAGE
            size = min(len(self._block), -(-(ahead - start) // PAGE) * PAGE)
            try:
                self._filled = read_at(self._file.fileno(), self._block[:size], start)
                self._start = start
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            self._direct = False
            _set_direct(self._file.fileno(), False)
            self._drop_cache()
        self._file.seek(begin)
        self._start, self._filled = begin, self._file.readinto(self._block[: ahead - begin])  # type: ignore[attr-defined]


def read_at(descriptor: int, into: memoryview, offset: int) -> int:
    """Fill `into` from `offset` on, in one read; returns how many bytes there were. Not for Windows."""
    if sys.platform == "win32":
        raise NotImplementedError("reading at a place without going there")
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [into], offset)
    data = os.pread(descriptor, len(into), offset)  # macOS before 11, or a Python that was built for it.
    into[: len(data)] = data
    return len(data)


def is_cached(descriptor: int) -> bool:
    """Whether the system has a file in its cache, as far as it tells: it looks at a few pages, and reads none."""
    size = os.fstat(descriptor).st_size
    if sys.platform != "linux" or _library is None or size == 0:
        return False
    found = (ctypes.c_ubyte * 1)()
    address = _library.mmap(None, size, 0, 1, descriptor, 0)  # PROT_NONE, MAP_SHARED: nothing of it is touched.
    if address == _MAP_FAILED:
        return False
    try:
        for number in range(1, _LOOKS + 1):  # Not the first page: the header has often just been read.
            at = (size - 1) * number // _LOOKS
            if _library.mincore(address + at - at % mmap.PAGESIZE, mmap.PAGESIZE, found) or not found[0] & 1:
                return False
    finally:
        _library.munmap(address, size)
    return True


def drop_cache(descriptor: int) -> None:
    """Ask the system to forget what it has cached of a synced file, so that reading it reads the disk.

    Where a system does not do that, it is no error: what is read back is what was written, if not what the disk holds.
    """
    advise = getattr(os, "posix_fadvise", None)
    if advise is not None:
        advise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # type: ignore[attr-defined, unused-ignore]
    elif os.name == "posix":
        _invalidate(descriptor)


def _invalidate(descriptor: int) -> None:
    """For macOS, which has no posix_fadvise, and whose F_NOCACHE takes what is cached already.

    Making a mapping of the file invalid drops its clean pages. So does fio (os/mac/posix.c), as Apple showed it.
    """
    size = os.fstat(descriptor).st_size
    if size == 0 or _library is None:
        return
    # PROT_NONE, MAP_SHARED and MS_INVALIDATE are these numbers on Linux, too. Of the module mmap, which knows no
    # address of what is only read, they cannot be had on every system.
    address = _library.mmap(None, size, 0, 1, descriptor, 0)
    if address != _MAP_FAILED:  # Else a file system without mappings.
        _library.msync(address, size, 2)
        _library.munmap(address, size)


def _memory(size: int) -> memoryview:
    """Memory that begins at a page, in large pages where it is worth it: the system then has fewer of them to look up.

    Reading 600 MiB takes the system 5 instead of 33 ms of computing.
    """
    if sys.platform == "win32" or size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(mmap.mmap(-1, size))
    whole = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # A system without large pages.
        whole.madvise(mmap.MADV_HUGEPAGE)
    block = memoryview(whole)
    start = -_address(block) % _HUGE_PAGE
    return block[start : start + size]


def _set_direct(descriptor: int, direct: bool) -> None:
    if sys.platform != "win32":
        import fcntl

        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | O_DIRECT if direct else flags & ~O_DIRECT)


def _address(data: memoryview) -> int:
    """Where the bytes lie in memory; 1, which is no multiple of anything, for memory that is read-only."""
    return 1 if data.readonly else ctypes.addressof(ctypes.c_char.from_buffer(data))
