"""Who writes what: a layout of the state in host memory and in the shards, computed alike on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lastgood.direct_io import PAGE
from lastgood.manifest import DTYPE_BYTES, checksum
from lastgood.placement import LocalTensor, Placement
from lastgood.shard import Piece

SPLIT_BYTES = 1 << 20
"""Smaller tensors are never cut in two."""


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor, or the whole."""

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def nbytes(tensor: LocalTensor) -> int:
    """Bytes of this rank's part."""
    return tensor.tensor.numel() * DTYPE_BYTES[tensor.dtype]


def share_out(tensors: Mapping[str, LocalTensor], writers: Sequence[int]) -> dict[int, list[Box]]:
    """Divide the replicated tensors among the writers, evenly by bytes.

    Every rank gets the same answer from the same structure: nothing is sent. Large tensors are cut between rows, small
    ones go whole to the writer in whose part their middle lies.
    """
    replicated = [(name, t) for name, t in tensors.items() if t.placement is Placement.REPLICATED]
    total = sum(nbytes(t) for _, t in replicated)
    shares: dict[int, list[Box]] = {writer: [] for writer in writers}
    count = len(writers)

    def owner(position: int) -> int:
        return min(count - 1, position * count // max(total, 1))

    at = 0
    for name, tensor in replicated:
        size, shape = nbytes(tensor), tensor.shape
        first, last = owner(at), owner(at + max(size - 1, 0))
        if first == last or size < SPLIT_BYTES or not shape or shape[0] < 2:
            shares[writers[owner(at + size // 2)]].append(Box(name, (0,) * len(shape), shape))
        else:
            row_bytes = size // shape[0]
            row = 0
            for index in range(first, last + 1):
                # The first byte that belongs to the next writer, rounded to a row of this tensor.
                edge = -(-(index + 1) * total // count)
                end = shape[0] if index == last else min(shape[0], max(row, round((edge - at) / row_bytes)))
                if end > row:
                    shares[writers[index]].append(Box(name, (row,) + (0,) * (len(shape) - 1), (end - row, *shape[1:])))
                row = end
        at += size
    return shares


def structure(tensors: Mapping[str, LocalTensor]) -> str:
    """A digest of the replicated tensors' names, types and shapes: ranks share the writing only where it is equal."""
    text = "\n".join(
        f"{name} {t.dtype} {t.shape}" for name, t in tensors.items() if t.placement is Placement.REPLICATED
    )
    return checksum(text.encode())


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything that one rank copies lies in its host buffer. Each list is in file order."""

    rank: int
    share: list[Piece]
    """This rank's share of the replicated tensors. On rank 0: also all else that it writes, in the same file."""
    own: list[Piece]
    """What only this rank has (empty on rank 0)."""
    compare: list[Piece]
    """What it writes only where it differs from rank 0's. On rank 0 (in `share` too): what to compare with."""
    others: dict[int, list[Piece]]
    """On rank 0: the other writers' shares, so that it can check them, and write them itself."""
    size: int
    """Bytes of the host buffer."""
    writers: tuple[int, ...]
    frozen: list[Piece] = field(default_factory=list)
    """On rank 0: what goes to a file of its own, since it does not change from save to save."""
    still: frozenset[str] = frozenset()
    """Names of the tensors in that file: no other rank writes them."""

    def pieces(self) -> list[Piece]:
        """All that is copied, each once."""
        unlisted = self.compare if self.rank != 0 else []
        return [
            piece for group in (self.frozen, self.share, self.own, unlisted, *self.others.values()) for piece in group
        ]


def lay_out(
    tensors: Mapping[str, LocalTensor], rank: int, writers: Sequence[int], still: frozenset[str] = frozenset()
) -> Layout:
    """The layout of rank `rank`, when the replicated tensors are written by `writers`, but for those in `still`."""
    shares = share_out({name: t for name, t in tensors.items() if name not in still}, writers)
    share, own, compare, frozen = list(shares.get(rank, ())), [], [], []
    for name, tensor in tensors.items():
        box = Box(name, tensor.offsets, tuple(tensor.tensor.shape))
        placement = tensor.placement
        if rank == 0 and name in still:
            frozen.append(box)
        elif placement is Placement.REPLICATED or (placement is Placement.SHARDED and not tensor.writes):
            continue
        elif rank == 0:
            share.append(box)
        elif placement is Placement.UNKNOWN:
            compare.append(box)
        elif placement is not Placement.ROOT:
            own.append(box)
    at = 0

    def place(boxes: Sequence[Box]) -> list[Piece]:
        nonlocal at
        # Every group could become a file: it begins at a page. Wide types come first, so that all are aligned.
        at = -(-at // PAGE) * PAGE
        pieces = []
        for box in sorted(boxes, key=lambda box: -_width(tensors[box.name])):
            tensor = tensors[box.name]
            alone = rank != 0 and tensor.placement in (Placement.LOCAL, Placement.UNKNOWN)
            label = f"rank{rank}/{box.name}" if alone else box.name
            pieces.append(Piece(box.name, label, tensor.dtype, box.offsets, box.shape, tensor.shape, at))
            at += math.prod(box.shape) * _width(tensor)
        return pieces

    # What is frozen comes first: it keeps its place in memory when something else changes.
    kept, placed, mine, maybe = place(frozen), place(share), place(own), place(compare)
    others = {writer: place(shares[writer]) for writer in writers if writer != 0} if rank == 0 else {}
    if rank == 0:
        maybe = [piece for piece in [*kept, *placed] if tensors[piece.name].placement is Placement.UNKNOWN]
    return Layout(rank, placed, mine, maybe, others, at, tuple(writers), kept, still)


def _width(tensor: LocalTensor) -> int:
    return DTYPE_BYTES[tensor.dtype]
