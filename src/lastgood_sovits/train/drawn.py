"""Batches of stage 2 with the random numbers of the generator, which belong to the clip and not to the process.

The posterior's noise and the slice of a clip follow from the seed, the epoch and the clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lastgood_sovits.s2.batch import Batch, Clip, collate
from lastgood_sovits.train.keyed import Key, generator_of


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
        for row, (key, clip) in enumerate(items):
            frames = clip.spec.shape[1]
            generator = generator_of(self.seed, key)
            starts[row] = int(torch.randint(max(frames - self.segment + 1, 1), (1,), generator=generator))
            noise[row, :, :frames] = torch.randn(self.channels, frames, generator=generator)
        return Drawn(batch=batch, noise=noise, starts=starts)
