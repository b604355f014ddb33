"""What shows that nobody changed a tensor of host memory between two moments: its version counter, and a few words."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from operator import attrgetter

import torch

_SAMPLES = 4
_VERSION = attrgetter("_version")


def memory(address: int, size: int) -> memoryview:
    """A view of memory that somebody else keeps alive."""
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether its bytes lie in memory as they are saved."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def all_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the bytes of all of them do."""
    return (
        all(map(torch.Tensor.is_contiguous, tensors))
        and not any(map(torch.Tensor.is_neg, tensors))
        and not any(map(torch.Tensor.is_conj, tensors))
    )


def version(tensor: torch.Tensor) -> int:
    """Its version counter; one made in inference mode has none."""
    return -1 if tensor.is_inference() else tensor._version


def versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:
        return list(map(version, tensors))


@functools.lru_cache(1 << 16)
def _words(address: int, size: int) -> memoryview:
    words = memory(address, size // 8 * 8).cast("Q")
    return words[:: max(1, (len(words) - 1) // (_SAMPLES - 1))]


def sample(address: int, size: int) -> bytes:
    """A few words of memory that somebody else keeps alive, spread over it."""
    # The view is kept: a tensor mostly lies where it lay at the save before.
    return _words(address, size).tobytes()


class Samples:
    """The same of many places, in one call: it asks the memory for all of them at a time.

    Args:
        addresses: of the places.
        sizes: their bytes, at least 64 each.
    """

    def __init__(self, addresses: Sequence[int], sizes: Sequence[int]) -> None:
        base = min(addresses) // 8 * 8
        rows = []
        for address, size in zip(addresses, sizes, strict=True):
            first, last = -(-address // 8), (address + size) // 8 - 1
            rows.append([first + (last - first) * number // (_SAMPLES - 1) - base // 8 for number in range(_SAMPLES)])
        count = max(row[-1] for row in rows) + 1
        self._memory = torch.frombuffer((ctypes.c_char * (8 * count)).from_address(base), dtype=torch.int64)
        self._index = torch.tensor(rows, device="cpu").view(-1)

    def take(self) -> torch.Tensor:
        return self._memory.index_select(0, self._index)


class Watch:
    """Plain tensors of host memory, as they are now.

    Args:
        names: what to call them.
        tensors: their memory is kept alive, whatever becomes of them.
        samples: of all of them.
    """

    def __init__(self, names: Sequence[str], tensors: Sequence[torch.Tensor], samples: Samples) -> None:
        self._names, self._tensors, self._samples = names, tensors, samples
        self._storages = list(map(torch.Tensor.untyped_storage, tensors))
        self._versions, self._words = versions(tensors), samples.take()

    def changed(self) -> str | None:
        """The name of one that was changed since; None where all seem to be what they were."""
        for name, before, now in zip(self._names, self._versions, versions(self._tensors), strict=True):
            if before != now:
                return name
        words = self._samples.take()
        if torch.equal(words, self._words):
            return None
        return self._names[int((words != self._words).nonzero()[0]) // _SAMPLES]
