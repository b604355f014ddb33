"""Which clips go into which batch: clips of similar length together, in an order that every rank computes for itself.

An epoch has one global order of clips, which depends only on the lengths, the epoch, and the number of clips in a
global batch (clips per rank x ranks) when the epoch began. A position is the number of clips of that order that were
trained on. So a run can be resumed within an epoch, on any number of ranks: what remains of the order is cut anew, and
each remaining clip is seen as often as it would have been.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch.utils.data import Sampler

from lastgood_sovits.errors import SovitsError

BOUNDARIES = (32, *range(300, 2000, 100))
"""Bucket i has the clips of more than BOUNDARIES[i] and at most BOUNDARIES[i + 1] frames; others are not used."""


class BucketSampler(Sampler[list[int]]):
    """Yields the batches of one rank for the rest of the current epoch.

    The position does not move while batches are drawn, since a `DataLoader` draws far ahead of the training: call
    `advance` after each trained step.

    Args:
        lengths: of all clips, in frames, the same on every rank.
        batch_size: clips per rank.
        rank, world_size: as in `torch.distributed`.
        boundaries: of the buckets, in frames, rising.

    Raises:
        SovitsError: if no clip falls into a bucket.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        boundaries: Sequence[int] = BOUNDARIES,
    ) -> None:
        if not 0 <= rank < world_size or batch_size < 1:
            raise SovitsError(f"rank {rank} of {world_size} with batches of {batch_size} clips is impossible")
        buckets: list[list[int]] = [[] for _ in boundaries[1:]]
        for index, length in enumerate(lengths):
            bucket = bisect_left(boundaries, length) - 1
            if 0 <= bucket < len(buckets):
                buckets[bucket].append(index)
        self.buckets = [bucket for bucket in buckets if bucket]
        if not self.buckets:
            raise SovitsError(
                f"none of the {len(lengths)} clips has more than {boundaries[0]} and at most {boundaries[-1]} frames: "
                "cut the recordings into clips between 0.7 s and 38 s and prepare them again"
            )
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self._fingerprint = hashlib.sha256(repr((list(lengths), list(boundaries))).encode()).hexdigest()[:16]
        self.set_epoch(1)

    def set_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch."""
        self._start(epoch, self.batch_size * self.world_size, 0)

    def _start(self, epoch: int, planned_batch: int, position: int) -> None:
        self.epoch, self.planned_batch, self.position = epoch, planned_batch, position
        self.order = self._global_order()
        self._cuts = self._cut(position)

    def _global_order(self) -> list[int]:
        """Gives the clips of the epoch, one global batch after the other."""
        generator = torch.Generator().manual_seed(self.epoch)
        shuffled = [
            [bucket[i] for i in torch.randperm(len(bucket), generator=generator).tolist()] for bucket in self.buckets
        ]
        size = self.planned_batch
        batches: list[list[int]] = []
        for bucket in shuffled:
            whole = -(-len(bucket) // size) * size  # filled up by repeating its clips
            filled = (bucket * -(-whole // len(bucket)))[:whole]
            batches.extend(filled[start : start + size] for start in range(0, whole, size))
        order = torch.randperm(len(batches), generator=generator).tolist()
        return list(chain.from_iterable(batches[i] for i in order))

    def _cut(self, start: int) -> list[int]:
        """Gives the positions at which the remaining global batches begin, and the end."""
        size, total = self.batch_size * self.world_size, len(self.order)
        cuts = [*range(start, total, size), total]
        # Every rank needs a clip in every batch: what is too little for that joins the batch before it.
        if len(cuts) > 2 and total - cuts[-2] < self.world_size:
            del cuts[-2]
        return cuts

    def __len__(self) -> int:
        """Number of steps that remain in this epoch."""
        return len(self._cuts) - 1 - bisect_left(self._cuts, self.position)

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in a whole epoch that is not interrupted."""
        size = self.batch_size * self.world_size
        return sum(-(-len(bucket) // size) for bucket in self.buckets)

    def __iter__(self) -> Iterator[list[int]]:
        first = bisect_left(self._cuts, self.position)
        for begin, end in zip(self._cuts[first:], self._cuts[first + 1 :], strict=False):
            clips = self.order[begin:end]
            while len(clips) < self.world_size:  # fewer clips than ranks are left in the epoch: none may stand idle
                clips = clips + clips
            yield clips[self.rank :: self.world_size]

    def advance(self) -> None:
        """Records that one more step was trained. Beyond the end of the epoch it stays at the end."""
        self.position = self._cuts[min(bisect_right(self._cuts, self.position), len(self._cuts) - 1)]

    def state_dict(self) -> dict[str, Any]:
        """Gives what another sampler needs to go on from here. The same on every rank."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "planned_batch": self.planned_batch,
            "clips": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another sampler was, whatever its rank, world size and batch size.

        Raises:
            SovitsError: if the clips are not those of the other sampler, so that its position means nothing.
        """
        if state["clips"] != self._fingerprint:
            raise SovitsError(
                f"the data set changed since the checkpoint in epoch {state['epoch']}, so training cannot go on within "
                f"that epoch: bring the old clips back, or begin epoch {state['epoch']} again with set_epoch"
            )
        self._start(state["epoch"], state["planned_batch"], state["position"])
