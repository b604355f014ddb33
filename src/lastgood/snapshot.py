"""A consistent copy of the state in host memory, in buffers that are kept between saves."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch

from lastgood.dtypes import DTYPES
from lastgood.plan import Layout, lay_out
from lastgood.shard import PAGE, Piece
from lastgood.state import LocalTensor


class Snapshot:
    """The host buffer of one rank, and the layout by which it is filled.

    The layout and the typed views into the buffer are made once and used again as long as the structure of the state
    is the same: a save of many small tensors then costs one copy each and nothing else.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._key: object = None
        self._storage = torch.empty(0, dtype=torch.uint8)
        self._buffer = self._storage
        self._targets: list[torch.Tensor] = []
        self.layout = Layout(rank, [], [], [], {}, 0, ())
        self.view = memoryview(b"")
        """The bytes of the buffer."""

    @property
    def size(self) -> int:
        """Bytes of host memory that are held."""
        return self._storage.numel()

    def take(self, tensors: Mapping[str, LocalTensor], writers: Sequence[int]) -> None:
        """Copy the state. When it returns, training may change every tensor.

        The caller makes sure that nobody reads the buffer any more.
        """
        self._prepare(tensors, writers)
        sources = [_source(tensors[piece.name], piece) for piece in self.layout.pieces()]
        if sources:
            with torch.no_grad():
                _copy(self._targets, sources)

    def _prepare(self, tensors: Mapping[str, LocalTensor], writers: Sequence[int]) -> None:
        key = (
            tuple(writers),
            tuple((n, t.tensor.dtype, t.tensor.shape, t.shape, t.placement, t.offsets) for n, t in tensors.items()),
        )
        if key == self._key:
            return
        self._key = None
        self.layout = lay_out(tensors, self._rank, writers)
        if self.layout.size > self.size - PAGE or self.size > 2 * self.layout.size + (1 << 20):
            # The old buffer goes first: two at once would be twice the memory that is promised.
            self._targets, self._storage, self._buffer, self.view = [], torch.empty(0), torch.empty(0), memoryview(b"")
            pin = torch.cuda.is_available() and any(t.tensor.is_cuda for t in tensors.values())
            self._storage = torch.empty(self.layout.size + PAGE, dtype=torch.uint8, pin_memory=pin)
        start = -self._storage.data_ptr() % PAGE
        self._buffer = self._storage[start : start + self.layout.size]
        array = (ctypes.c_char * self.layout.size).from_address(self._buffer.data_ptr())
        self.view = memoryview(array).cast("B").toreadonly()
        self._targets = [self._target(piece) for piece in self.layout.pieces()]
        self._key = key

    def _target(self, piece: Piece) -> torch.Tensor:
        raw = self._buffer[piece.at : piece.at + piece.size]
        return raw.view(DTYPES[piece.dtype]).view(piece.shape)


def _source(tensor: LocalTensor, piece: Piece) -> torch.Tensor:
    part = tensor.tensor
    if tuple(part.shape) == piece.shape:
        return part
    # A share of a replicated tensor: rows of it.
    return part.narrow(0, piece.offsets[0], piece.shape[0])


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    cuda = False
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=source.is_cuda)
        cuda = cuda or source.is_cuda
    if cuda:
        for device in {source.device for source in sources if source.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
