"""A tensor of the state and who holds its bytes: what planning and writing need to know of it, without torch."""

from __future__ import annotations

import enum
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
