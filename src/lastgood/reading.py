"""Reading saved tensors into memory: in parallel, in place where that can be, every byte checked."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import torch

from lastgood import disk, shard
from lastgood.catalog import Entry
from lastgood.dtypes import DTYPES
from lastgood.errors import DamagedError, MismatchError
from lastgood.manifest import Chunk, Manifest

_THREADS = min(8, (os.cpu_count() or 1) + 2)
_SMALL_BYTES = 256 << 10
# Smaller tensors that lie close together are read together.
_OPEN_FILES = 128
# Shards that are open at a time: macOS lets a process have 256 files, unless it asks for more.


@dataclass(frozen=True, slots=True)
class Want:
    """A box of a saved tensor, and where it goes."""

    name: str
    target: torch.Tensor
    offsets: tuple[int, ...]


def read_wanted(entry: Entry, manifest: Manifest, wants: Sequence[Want]) -> None:
    """Read all that is wanted to where it goes, in parallel.

    Raises:
        DamagedError: a byte on disk is not what was saved.
        MismatchError: an expanded tensor cannot hold what was saved.
    """
    try:
        for record in manifest.shards:
            shard.check_size(entry.path / record.file, record)
            shard.check_header(entry.path / record.file, record)
        jobs = [
            (want, chunk)
            for want in wants
            for chunk in manifest.tensors[want.name].chunks
            if _overlap(chunk, want) is not None
        ]
        # From the front of each file to its end, as disks like it.
        jobs.sort(key=lambda job: (job[1].shard, job[1].begin))
        batches = _batches(jobs)
        with ThreadPoolExecutor(_THREADS if not disk.WINDOWS else 1, "lastgood-read") as pool:
            for first in range(0, len(manifest.shards), _OPEN_FILES):
                shards = range(first, min(first + _OPEN_FILES, len(manifest.shards)))
                _read_shards(pool, entry, manifest, shards, [b for b in batches if b[0][1].shard in shards])
    except OSError as error:
        raise DamagedError(f"{entry.path} cannot be read: {error}") from error


def _read_shards(
    pool: ThreadPoolExecutor,
    entry: Entry,
    manifest: Manifest,
    shards: range,
    batches: Sequence[Sequence[tuple[Want, Chunk]]],
) -> None:
    """Read what is wanted of some shards, which are open meanwhile."""
    with contextlib.ExitStack() as stack:
        files = {
            number: stack.enter_context(disk.open_read(entry.path / manifest.shards[number].file)) for number in shards
        }
        for _ in pool.map(lambda batch: _read_batch(entry, manifest, files[batch[0][1].shard], batch), batches):
            continue


def _batches(jobs: Sequence[tuple[Want, Chunk]]) -> list[list[tuple[Want, Chunk]]]:
    """Small neighbours are read together: a system call and a task each would cost more than their bytes."""
    batches: list[list[tuple[Want, Chunk]]] = []
    size = 0
    for want, chunk in jobs:
        length = chunk.end - chunk.begin
        last = batches[-1][-1][1] if batches else None
        near = last is not None and last.shard == chunk.shard and last.end <= chunk.begin <= last.end + _SMALL_BYTES
        if near and length < _SMALL_BYTES and size + length < 16 * _SMALL_BYTES:
            batches[-1].append((want, chunk))
            size += length
        else:
            batches.append([(want, chunk)])
            size = length
    return batches


def _read_batch(entry: Entry, manifest: Manifest, file: BinaryIO, batch: Sequence[tuple[Want, Chunk]]) -> None:
    if len(batch) == 1:
        return _read_chunk(entry, manifest, functools.partial(disk.read_into, file), *batch[0])
    start = batch[0][1].begin
    block = memoryview(bytearray(max(chunk.end for _, chunk in batch) - start))
    block = block[: disk.read_into(file, start, block)]

    def from_block(offset: int, view: memoryview) -> int:
        part = block[offset - start : offset - start + len(view)]
        view[: len(part)] = part
        return len(part)

    for want, chunk in batch:
        _read_chunk(entry, manifest, from_block, want, chunk)
    return None


def _read_chunk(
    entry: Entry, manifest: Manifest, read: Callable[[int, memoryview], int], want: Want, chunk: Chunk
) -> None:
    box = _overlap(chunk, want)
    assert box is not None
    target = want.target
    for dimension, (begin, end) in enumerate(box):
        offset = want.offsets[dimension]
        target = target.narrow(dimension, begin - offset, end - begin)
    path = entry.path / manifest.shards[chunk.shard].file
    record = manifest.tensors[want.name]
    complete = tuple(target.shape) == chunk.shape
    direct = complete and target.device.type == "cpu" and target.is_contiguous()
    if direct and target.dtype == DTYPES[record.dtype] and not target.is_conj() and not target.is_neg():
        view = bytes_of(target)
        shard.check_chunk(path, want.name, chunk, view, read(chunk.begin, view))
        return
    whole = torch.empty(chunk.shape, dtype=DTYPES[record.dtype])
    view = bytes_of(whole)
    shard.check_chunk(path, want.name, chunk, view, read(chunk.begin, view))
    part = whole
    for dimension, (begin, end) in enumerate(box):
        part = part.narrow(dimension, begin - chunk.offsets[dimension], end - begin)
    for dimension, stride in enumerate(target.stride()):
        if stride == 0 and target.shape[dimension] > 1:
            # An expanded tensor has one row of memory for all its rows.
            first = part.narrow(dimension, 0, 1)
            rows, same = part.contiguous(), first.expand_as(part).contiguous()
            if bytes_of(rows) != bytes_of(same):
                raise MismatchError(f"{want.name} is expanded here (stride 0), and was saved with different rows")
            target, part = target.narrow(dimension, 0, 1), first
    with torch.no_grad():
        target.copy_(part)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor. The tensor must outlive the view."""
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def _overlap(chunk: Chunk, want: Want) -> list[tuple[int, int]] | None:
    """The box that a chunk and a target have in common, as begin and end in each dimension."""
    box = []
    for offset, size, start, length in zip(chunk.offsets, chunk.shape, want.offsets, want.target.shape, strict=True):
        begin, end = max(offset, start), min(offset + size, start + length)
        if begin >= end:
            return None
        box.append((begin, end))
    return box
