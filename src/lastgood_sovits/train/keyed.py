"""Clips with the epoch that they are read for, so that what is drawn at random belongs to the clip, not to the process.

One process and many then train on the same numbers, and so does a run that is resumed on another number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import Dataset, Sampler

Key = tuple[int, int]
"""Epoch and index of a clip."""
Item = TypeVar("Item")


class EpochSampler(Protocol):
    """A sampler of batches that knows its epoch."""

    epoch: int

    def __iter__(self) -> Iterator[list[int]]: ...


class KeyedSampler(Sampler[list[Key]]):
    """A sampler whose batches name the epoch, too: a loader's processes do not see it otherwise."""

    def __init__(self, sampler: EpochSampler) -> None:
        super().__init__()
        self._sampler = sampler

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self._sampler.epoch
        for indices in self._sampler:
            yield [(epoch, index) for index in indices]


class KeyedClips(Dataset[tuple[Key, Item]], Generic[Item]):
    """A data set that hands the key on."""

    def __init__(self, clips: Dataset[Item]) -> None:
        self._clips: Any = clips

    def __getitem__(self, key: Key) -> tuple[Key, Item]:
        return key, self._clips[key[1]]


def generator_of(seed: int, key: Key) -> torch.Generator:
    """The random numbers of a clip in an epoch, of a training with `seed`."""
    epoch, index = key
    return torch.Generator().manual_seed(((seed << 40) + (epoch << 24) + index) % 2**63)
