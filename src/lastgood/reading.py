"""Reading saved tensors into memory: in parallel, in place where that can be, every byte checked."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from lastgood import disk, shard
from lastgood.catalog import Entry
from lastgood.direct_io import Reader, is_cached
from lastgood.dtypes import DTYPES
from lastgood.errors import DamagedError, MismatchError
from lastgood.manifest import Chunk, Manifest

_THREADS = min(8, (os.cpu_count() or 1) + 2)
_BLOCK = 2 << 20
# Bytes that are read at a time.
_GAP = 256 << 10
# Bytes that are read although nobody wants them, where what is wanted lies on both sides.


@dataclass(frozen=True, slots=True)
class Want:
    """A box of a saved tensor, and where it goes."""

    name: str
    target: torch.Tensor
    offsets: tuple[int, ...]


class _Job:
    """The reading of a chunk of which something is wanted. Its parts come in any order, from several threads.

    Args:
        box: what is wanted of it, as begin and end in each dimension of the tensor.
    """

    def __init__(
        self, want: Want, chunk: Chunk, box: Sequence[tuple[int, int]], path: Path, dtype: torch.dtype
    ) -> None:
        self.chunk = chunk
        self._want, self._path = want, path
        self._target = want.target.detach()
        for dimension, (begin, end) in enumerate(box):
            self._target = self._target.narrow(dimension, begin - want.offsets[dimension], end - begin)
        self._box, self._dtype = box, dtype
        self._whole: torch.Tensor | None = None
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._digest, self._checked = xxhash.xxh3_128(), chunk.begin
        self._there: dict[int, int] = {}
        """Parts that are read and not checked yet: begin and end in the file."""

    def read(self, reader: Reader, begin: int, end: int, ahead: int) -> None:
        """Read a part, where up to `ahead` more will be wanted, and check what can be checked by now."""
        view = bytes_of(self._memory())
        part = view[begin - self.chunk.begin : end - self.chunk.begin]
        if reader.read_into(begin, part, ahead) != len(part):
            raise DamagedError(f"{self._path} ends in the middle of tensor {self._want.name!r}")
        self._there[begin] = end
        while self._checked in self._there and self._turn.acquire(blocking=False):
            try:
                while (until := self._there.pop(self._checked, None)) is not None:
                    self._digest.update(view[self._checked - self.chunk.begin : until - self.chunk.begin])
                    self._checked = until
                if self._checked == self.chunk.end:
                    self._finish()
            finally:
                self._turn.release()  # Another part may have come meanwhile: look again.

    def _memory(self) -> torch.Tensor:
        """Where the bytes go: the target itself, where they lie there as in the file."""
        with self._lock:
            if self._whole is None:
                target, shape = self._target, self.chunk.shape
                direct = tuple(target.shape) == shape and target.device.type == "cpu" and target.is_contiguous()
                if direct and target.dtype == self._dtype and not target.is_conj() and not target.is_neg():
                    self._whole = target
                else:
                    self._whole = torch.empty(shape, dtype=self._dtype, device="cpu")
                if self._whole.nbytes != self.chunk.end - self.chunk.begin:
                    raise DamagedError(f"{self._path}: the bytes of tensor {self._want.name!r} do not fit its shape")
            return self._whole

    def _finish(self) -> None:
        chunk, target = self.chunk, self._target
        if self._digest.hexdigest() != chunk.checksum:
            raise DamagedError(
                f"{self._path} is damaged: tensor {self._want.name!r} (bytes {chunk.begin} to {chunk.end}) does not "
                "match its checksum"
            )
        part, self._whole = self._memory(), None
        if part is target:
            return
        for dimension, (begin, end) in enumerate(self._box):
            part = part.narrow(dimension, begin - chunk.offsets[dimension], end - begin)
        # In this order: leaving inference mode turns gradients on.
        with torch.inference_mode(target.is_inference()), torch.no_grad():
            target.copy_(part)


def read_wanted(entry: Entry, manifest: Manifest, wants: Sequence[Want], *, alone: bool = True) -> None:
    """Read all that is wanted to where it goes, in parallel.

    Args:
        alone: no other process of this machine reads the same at the same time.

    Raises:
        DamagedError: a byte on disk is not what was saved.
        MismatchError: an expanded tensor cannot hold what was saved.
    """
    # An expanded tensor has one row of memory for all its rows, which may come in any order, from several chunks.
    expanded = [(want, _dense(want)) for want in wants if _expanded(want.target)]
    wants = [want for want in wants if not _expanded(want.target)] + [dense for _, dense in expanded]
    try:
        for record in manifest.shards:
            shard.check_size(entry.path / record.file, record)
            shard.check_header(entry.path / record.file, record)
        jobs = [
            _Job(
                want,
                chunk,
                box,
                entry.path / manifest.shards[chunk.shard].file,
                DTYPES[manifest.tensors[want.name].dtype],
            )
            for want in wants
            for chunk in manifest.tensors[want.name].chunks
            if (box := _overlap(chunk, want)) is not None
        ]
        # From the front of each file to its end, as disks like it.
        jobs.sort(key=lambda job: (job.chunk.shard, job.chunk.begin))
        batches = deque(_batches(jobs))
        # What several processes read comes from the disk once, through the cache.
        cached = {
            number: not alone or _is_cached(entry.path / manifest.shards[number].file)
            for number in {job.chunk.shard for job in jobs}
        }
        with ThreadPoolExecutor(_THREADS, "lastgood-read") as pool:
            try:
                tasks = []
                for _ in range(min(_THREADS, len(batches))):
                    try:
                        tasks.append(pool.submit(_read, entry, manifest, batches, cached))
                    except RuntimeError:  # No more threads.
                        _read(entry, manifest, batches, cached)
                for task in tasks:
                    task.result()
            finally:
                batches.clear()  # After an error nobody begins anything new.
    except OSError as error:
        raise DamagedError(f"{entry.path} cannot be read: {error}") from error
    for want, dense in expanded:
        _collapse(want, dense.target)


def _expanded(tensor: torch.Tensor) -> list[int]:
    """The dimensions along which all of a tensor is the same memory."""
    return [number for number, stride in enumerate(tensor.stride()) if stride == 0 and tensor.shape[number] > 1]


def _dense(want: Want) -> Want:
    return Want(want.name, torch.empty(want.target.shape, dtype=want.target.dtype, device="cpu"), want.offsets)


def _collapse(want: Want, whole: torch.Tensor) -> None:
    """Put what was read into an expanded tensor. Raises MismatchError where it is not the same along its dimensions."""
    target, part = want.target.detach(), whole
    for dimension in _expanded(target):
        target, part = target.narrow(dimension, 0, 1), part.narrow(dimension, 0, 1)
    same = part.expand_as(whole).contiguous()
    if bytes_of(same) != bytes_of(whole):
        raise MismatchError(f"{want.name} is expanded here (stride 0), and was saved with different rows")
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        target.copy_(part)


def _batches(jobs: Sequence[_Job]) -> Iterator[list[tuple[_Job, int, int]]]:
    """Parts of chunks that lie close together, as many as one read takes: each job, and where its part is.

    A read past the cache takes whole pages: so the file is cut at multiples of a block, wherever the chunks begin.
    """
    batch: list[tuple[_Job, int, int]] = []
    for job in jobs:
        chunk, begin = job.chunk, job.chunk.begin
        while True:
            end = min(begin - begin % _BLOCK + _BLOCK, chunk.end)
            if batch:
                before, first, last = batch[-1][0].chunk.shard, batch[0][1], batch[-1][2]
                if before != chunk.shard or begin // _BLOCK != first // _BLOCK or begin > last + _GAP:
                    yield batch
                    batch = []
            batch.append((job, begin, end))
            if end == chunk.end:
                break
            begin = end
    if batch:
        yield batch


def _is_cached(path: Path) -> bool:
    with disk.open_read(path) as file:
        return is_cached(file.fileno())


def _read(
    entry: Entry, manifest: Manifest, batches: deque[list[tuple[_Job, int, int]]], cached: Mapping[int, bool]
) -> None:
    """Read batch after batch, until none is left. Several threads do so, each with files of its own.

    Args:
        cached: by shard, whether it is read through the cache.
    """
    number: int | None = None
    reader: Reader | None = None
    with contextlib.ExitStack() as stack:
        try:
            while batches:
                try:
                    batch = batches.popleft()
                except IndexError:
                    return  # Another thread was faster.
                if reader is None or batch[0][0].chunk.shard != number:
                    number = batch[0][0].chunk.shard
                    stack.close()  # A process may have 256 files open on macOS, unless it asks for more.
                    file = stack.enter_context(disk.open_read(entry.path / manifest.shards[number].file))
                    reader = Reader(file, _BLOCK, cached=cached[number])
                for job, begin, end in batch:
                    job.read(reader, begin, end, batch[-1][2])
        except BaseException:
            batches.clear()
            raise


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
