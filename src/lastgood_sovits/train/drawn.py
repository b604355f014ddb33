"""Batches of stage 2 with the random numbers of the generator, which belong to the clip and not to the process.

The posterior's noise and the slice of a clip follow from the seed, the epoch and the clip. One process and many then
train on the same numbers, and so does a run that is resumed on another number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from lastgood_sovits.s2.batch import Batch, Clip, collate
from lastgood_sovits.s2.dataset import ClipDataset
from lastgood_sovits.s2.sampler import BucketSampler

Key = tuple[int, int]
"""Epoch and index of a clip."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A batch and what was drawn for it."""

    batch: Batch
    noise: Tensor
    """For the posterior (batch, channels, frames)."""
    starts: Tensor
    """First frame of each slice (batch,), int64."""

    def to(self, device: torch.device) -> Drawn:
        noise, starts = self.noise.to(device, non_blocking=True), self.starts.to(device, non_blocking=True)
        return Drawn(batch=self.batch.to(device), noise=noise, starts=starts)

    def pin_memory(self) -> Drawn:
        """Called by a `DataLoader` with `pin_memory=True`."""
        return Drawn(batch=self.batch.pin_memory(), noise=self.noise.pin_memory(), starts=self.starts.pin_memory())


class KeyedSampler(Sampler[list[Key]]):
    """A `BucketSampler` whose batches name the epoch, too: a loader's processes do not see it otherwise."""

    def __init__(self, sampler: BucketSampler) -> None:
        super().__init__()
        self._sampler = sampler

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self._sampler.epoch
        for indices in self._sampler:
            yield [(epoch, index) for index in indices]


class KeyedClips(Dataset[tuple[Key, Clip]]):
    """A `ClipDataset` that hands the key on."""

    def __init__(self, clips: ClipDataset) -> None:
        self._clips = clips

    def __getitem__(self, key: Key) -> tuple[Key, Clip]:
        return key, self._clips[key[1]]


@dataclass(frozen=True)
class Draw:
    """Makes a `Drawn` of clips.

    Args:
        seed: of the training.
        channels: of the latent.
        segment: frames of a slice.
    """

    seed: int
    channels: int
    segment: int

    def __call__(self, items: list[tuple[Key, Clip]]) -> Drawn:
        items = sorted(items, key=lambda item: item[1].spec.shape[1], reverse=True)  # as collate does
        batch = collate([clip for _, clip in items])
        noise = torch.zeros(len(items), self.channels, batch.spec.shape[2])
        starts = torch.zeros(len(items), dtype=torch.int64)
        for row, ((epoch, index), clip) in enumerate(items):
            frames = clip.spec.shape[1]
            generator = torch.Generator().manual_seed(((self.seed << 40) + (epoch << 24) + index) % 2**63)
            starts[row] = int(torch.randint(max(frames - self.segment + 1, 1), (1,), generator=generator))
            noise[row, :, :frames] = torch.randn(self.channels, frames, generator=generator)
        return Drawn(batch=batch, noise=noise, starts=starts)
