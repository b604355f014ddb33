"""Which clips make up each micro-batch, in an order that depends on the data, the seed and the epoch only."""

from __future__ import annotations

import hashlib
import logging
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from lastgood_sovits.errors import SovitsError

logger = logging.getLogger(__name__)

BUCKET_SECONDS = 2.0


def make_buckets(seconds: Sequence[float]) -> list[list[int]]:
    """Clips sorted by length, in buckets of about two seconds.

    A bucket ends at the first clip past its upper bound, and the bound then grows by one width only, even where the
    next clip is far longer. This is upstream's rule; a bucket may be empty.
    """
    buckets: list[list[int]] = []
    current: list[int] = []
    bound = BUCKET_SECONDS
    for clip in sorted(range(len(seconds)), key=seconds.__getitem__):
        if seconds[clip] >= bound:
            buckets.append(current)
            current = []
            bound += BUCKET_SECONDS
        current.append(clip)
    buckets.append(current)
    return buckets


def epoch_order(seconds: Sequence[float], *, seed: int, group: int) -> list[int]:
    """The order of one epoch: buckets shuffled within, cut into groups of `group` clips, the groups shuffled."""
    generator = random.Random(seed)
    clips: list[int] = []
    for bucket in make_buckets(seconds):
        generator.shuffle(bucket)
        clips += bucket
    groups = [clips[start : start + group] for start in range(0, len(clips), group)]
    generator.shuffle(groups)
    return [clip for members in groups for clip in members]


class BucketBatchSampler(Sampler[list[int]]):
    """Micro-batches of clips of similar length, for one rank of many; a batch sampler for `DataLoader`.

    All ranks share one order per epoch and take every world-th clip of it; where it does not divide, clips from its
    head are repeated. The position in it is counted in clips of all ranks, so a checkpoint taken in mid-epoch resumes
    with any number of ranks: the rest of that epoch keeps its order, and every clip not yet seen is still seen as often
    as planned.

    Iterating yields the rest of the current epoch and changes nothing, since a loader reads ahead of the training. Call
    `advance` after each batch that was trained on; the epoch changes by itself at its end.
    """

    def __init__(
        self, seconds: Sequence[float], *, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        """`seconds`: length of every clip; `batch_size`: clips per rank and micro-batch.

        Raises SovitsError when there is no clip, or a number cannot work.
        """
        super().__init__()
        if not seconds:
            raise SovitsError("There is no clip to train on; prepare the data set first.")
        if batch_size < 1:
            raise SovitsError(f"The batch size is {batch_size}; it must be at least 1.")
        if not 0 <= rank < world_size:
            raise SovitsError(f"Rank {rank} does not exist among {world_size} ranks.")
        self._seconds = list(seconds)
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self.epoch = 0
        """Epochs completed."""
        self.position = 0
        """Clips of this epoch's order that are done, over all ranks."""
        self._group = batch_size * world_size

    @property
    def group(self) -> int:
        """Clips that all ranks take together in one micro-batch."""
        return self._batch_size * self._world_size

    def _remaining(self) -> list[int]:
        """This epoch's clips from `position` on, padded so that every rank gets as many."""
        order = epoch_order(self._seconds, seed=self._seed + self.epoch, group=self._group)
        rest = order[self.position :]
        missing = -len(rest) % self._world_size
        return rest + [order[i % len(order)] for i in range(missing)]

    def __iter__(self) -> Iterator[list[int]]:
        mine = self._remaining()[self._rank :: self._world_size]
        for start in range(0, len(mine), self._batch_size):
            yield mine[start : start + self._batch_size]

    def __len__(self) -> int:
        """Micro-batches left in this epoch."""
        return math.ceil((len(self._seconds) - self.position) / self.group)

    def advance(self) -> bool:
        """Counts one micro-batch of every rank as done; True when that completed the epoch."""
        self.position += self.group
        if self.position < len(self._seconds):
            return False
        self.set_epoch(self.epoch + 1)
        return True

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of an epoch, with groups of the present batch and world size."""
        self.epoch = epoch
        self.position = 0
        self._group = self.group

    def _fingerprint(self) -> str:
        return hashlib.sha256(repr(self._seconds).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """The position; the same on every rank."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "group": self._group,
            "seed": self._seed,
            "clips": self._fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        When the clips are not the same any more, the position means nothing: the epoch starts again, with a warning.
        """
        self._seed = int(state["seed"])
        self.set_epoch(int(state["epoch"]))
        if state["clips"] != self._fingerprint():
            if state["position"]:
                logger.warning(
                    "The clips have changed since the checkpoint was saved: epoch %d starts again from its first clip.",
                    self.epoch + 1,
                )
            return
        self.position = int(state["position"])
        self._group = int(state["group"])
