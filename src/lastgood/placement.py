"""A tensor of the state and who holds its bytes: what planning and writing need to know of it, without torch."""

from __future__ import annotations

import enum
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Placement(enum.Enum):
    """Who holds the bytes of a tensor, and so who writes them."""

    ROOT = "root"
    """Rank 0's version counts: everything in a job of one process, and buffers under DDP."""
    REPLICATED = "replicated"
    """The same on every rank, by what holds it (DDP) or by what the caller said: the writing is shared out."""
    SHARDED = "sharded"
    """Every rank holds a box of it (DTensor)."""
    LOCAL = "local"
    """Every rank has its own."""
    UNKNOWN = "unknown"
    """Nobody said: rank 0 writes it, another rank only where its version differs."""


@dataclass(slots=True)
class LocalTensor:
    """A tensor of the state, as this rank holds it."""

    tensor: torch.Tensor
    """The part in this rank's memory."""
    placement: Placement
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    """Where this rank's part begins in the whole."""
    whole: torch.Tensor
    """The tensor as the object holds it: for a DTensor, the DTensor."""
    dtype: str
    """The name that safetensors gives its type."""
    writes: bool = True
    """For SHARDED: False on a rank that holds a second copy of a box."""
    strides: tuple[int, ...] | None = None
    """Those in memory, of a tensor that is not SHARDED, has no holes, and does not lie there row by row."""


@functools.lru_cache(4096)
def row_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor that lies in memory row by row."""
    steps = itertools.accumulate(reversed(shape[1:]), lambda step, size: step * max(size, 1), initial=1)
    return tuple(steps)[::-1] if shape else ()


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether these strides give every element a place of its own, without holes."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True
