"""The data files of a checkpoint: plain safetensors files, written in one pass and checked while read.

The header is padded with spaces to a multiple of 4096 bytes, so that the tensors begin at a page of the file; between
tensors there are no holes, as the safetensors library demands.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import xxhash

from lastgood import direct_io, disk
from lastgood.aside import aside
from lastgood.direct_io import PAGE
from lastgood.errors import DamagedError
from lastgood.manifest import DTYPE_BYTES, Chunk, ShardRecord, checksum, compact

FROZEN = "00000-frozen.safetensors"
"""Name of the data file of what does not change from save to save: the only one that checkpoints may share."""
_BLOCK = 8 << 20
# Bytes that are read or written at a time.


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor in host memory, about to be written."""

    name: str
    """The tensor's name in the state of this rank."""
    label: str
    """Its name in the checkpoint: another one where it is this rank's own version."""
    dtype: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    tensor_shape: tuple[int, ...]
    """Of the whole tensor."""
    at: int
    """First byte in the host buffer."""
    size: int = field(init=False)
    """Bytes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", math.prod(self.shape) * DTYPE_BYTES[self.dtype])

    @property
    def entry(self) -> str:
        """The name in the safetensors file: the tensor's own, with the box's place where it is only a part."""
        whole = self.shape == self.tensor_shape
        return self.label if whole else f"{self.label}@{','.join(map(str, self.offsets))}"


def header(pieces: Sequence[Piece]) -> bytes:
    """The safetensors header for `pieces` in this order: length field, JSON, padding."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "writer": "lastgood"}}
    at = 0
    for piece in pieces:
        name = piece.entry
        while name in entries:
            name += "+"  # A name of the state may be the one key that safetensors reserves, or look like a part's.
        entries[name] = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": [at, at + piece.size],
        }
        at += piece.size
    text = compact(entries).encode()
    length = -(-(8 + len(text)) // PAGE) * PAGE - 8
    return length.to_bytes(8, "little") + text.ljust(length)


class Buffer(Protocol):
    """Host memory that may still be filling, from its beginning to its end."""

    view: memoryview

    def await_bytes(self, end: int, *, patient: bool = False) -> None:
        """Return when all bytes before `end` are there. Raises what went wrong while they were copied.

        Args:
            patient: what is done with them is not urgent.
        """


def write(path: Path, pieces: Sequence[Piece], buffer: Buffer) -> tuple[ShardRecord, list[str]]:
    """Write a shard and sync it. The name must be new.

    Args:
        path: the file.
        pieces: what goes in, in file order; each lies in `buffer`.
        buffer: host memory; what is there already is written while the rest is still being copied.

    Returns:
        The record of the file, and the checksum of every piece.
    """
    head = header(pieces)
    # Both only read the buffer, and the hash releases the GIL: it is free while the disk is the slower one.
    digests = aside(lambda: [checksum(head), *(piece_checksum(piece, buffer) for piece in pieces)], "lastgood-checksum")
    try:
        with disk.NewFile(path, direct=True) as file:
            file.write(_aligned(head))
            for begin, end in _runs(pieces):
                for at in range(begin, end, _BLOCK):
                    block = min(at + _BLOCK, end)
                    buffer.await_bytes(block)
                    file.write(buffer.view[at:block])
            file.sync()
            size = file.size
    finally:
        wait([digests])  # Nobody may read the buffer any more when this is over.
    first, *others = digests.result()
    return ShardRecord(path.name, size, len(head), first), others


def piece_checksum(piece: Piece, buffer: Buffer) -> str:
    """The checksum of a piece in host memory."""
    buffer.await_bytes(piece.at + piece.size, patient=True)
    return checksum(buffer.view[piece.at : piece.at + piece.size])


def _aligned(data: bytes) -> memoryview:
    """A copy that begins at a page of memory, for direct I/O."""
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memoryview(memory)


def _runs(pieces: Iterable[Piece]) -> list[tuple[int, int]]:
    """Pieces that lie one after the other in memory, as one range: few large writes instead of many small ones."""
    runs: list[tuple[int, int]] = []
    for piece in pieces:
        if runs and runs[-1][1] == piece.at:
            runs[-1] = (runs[-1][0], piece.at + piece.size)
        else:
            runs.append((piece.at, piece.at + piece.size))
    return [run for run in runs if run[0] < run[1]]


def check_size(path: Path, record: ShardRecord) -> None:
    """The quick check: the file is there and has the right length. Raises DamagedError."""
    try:
        size = disk.file_size(path)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    if size != record.size:
        raise DamagedError(f"{path} has {size} bytes instead of {record.size}")


def check_header(path: Path, record: ShardRecord) -> None:
    """Whether the safetensors header is the one that was written; the size was checked before. Raises DamagedError."""
    with disk.open_read(path) as file:
        data = bytearray(record.header_size)
        got = disk.read_into(file, 0, memoryview(data))
    if got != record.header_size or checksum(data) != record.header_checksum:
        raise DamagedError(f"{path} is damaged: its header does not match its checksum")


def check_full(
    path: Path,
    record: ShardRecord,
    chunks: Sequence[tuple[str, Chunk]],
    advance: Callable[[int], None] | None = None,
) -> None:
    """Read every byte of a shard from the disk and check it, in bounded memory. Raises DamagedError.

    Args:
        advance: is told of the bytes that were read since it was told last, to show progress.
    """
    found = damage(path, record, chunks, advance)
    if found:
        raise DamagedError("; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else ""))


def _ends(parts: Sequence[tuple[str, int, int, str]]) -> dict[int, int]:
    """By where each part begins, the end of the last one that follows it without a gap: so far one may read ahead.

    Args:
        parts: in the order of the file; each with its beginning and its end.
    """
    ends: dict[int, int] = {}
    for _, begin, end, _ in reversed(parts):
        ends[begin] = ends.get(end, end)
    return ends


def damage(
    path: Path,
    record: ShardRecord,
    chunks: Sequence[tuple[str, Chunk]],
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """What is wrong with a shard, after every byte of it was read: a sentence for every damaged tensor.

    Raises:
        DamagedError: the file is missing, has another length, or cannot be read.
    """
    check_size(path, record)
    found = []
    try:
        with disk.open_read(path) as file:
            reader = direct_io.Reader(file, min(_BLOCK, record.size))
            parts = [("the header", 0, record.header_size, record.header_checksum)]
            parts += [(f"tensor {name!r}", chunk.begin, chunk.end, chunk.checksum) for name, chunk in chunks]
            parts.sort(key=lambda part: part[1])
            ends = _ends(parts)
            for what, begin, end, expected in parts:
                state = xxhash.xxh3_128()
                at = begin
                while at < end:
                    part = reader.read(at, end, ends[begin])
                    if not part:
                        raise DamagedError(f"{path} ends in the middle of {what}")
                    state.update(part)
                    at += len(part)
                    if advance is not None:
                        advance(len(part))
                if state.hexdigest() != expected:
                    found.append(f"{path} is damaged: {what} (bytes {begin} to {end}) does not match its checksum")
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    return found
