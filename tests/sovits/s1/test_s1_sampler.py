"""The sampler's order is upstream's, the same on every rank, and resumes in mid-epoch with any number of ranks."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.s1 import BucketBatchSampler
from lastgood_sovits.s1.sampler import epoch_order, make_buckets

SECONDS = [random.Random(5).uniform(1, 12) for _ in range(53)]


def test_buckets_and_batches_are_upstreams(golden: Any) -> None:
    expected = golden.json("samplers")["s1"]
    seconds = [count / 25 for count in expected["codes_per_sample"]]
    assert make_buckets(seconds) == expected["buckets"]
    assert len(expected["cases"]) == 18
    for case in expected["cases"]:
        sampler = BucketBatchSampler(
            seconds,
            batch_size=case["batch_size"],
            rank=case["rank"],
            world_size=case["world"],
            seed=case["seed"],
        )
        sampler.set_epoch(case["epoch"])
        assert list(sampler) == case["batches"], case
        assert len(sampler) == len(case["batches"])


def test_leaves_the_global_random_state_alone() -> None:
    random.seed(3)
    before = random.getstate()
    list(BucketBatchSampler(SECONDS, batch_size=4))
    assert random.getstate() == before


def ranks(world: int, batch_size: int = 4) -> list[BucketBatchSampler]:
    return [BucketBatchSampler(SECONDS, batch_size=batch_size, rank=r, world_size=world) for r in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_all_ranks_together_see_every_clip_and_as_many_batches(world: int) -> None:
    for epoch in range(2):
        samplers = ranks(world)
        for sampler in samplers:
            sampler.set_epoch(epoch)
        batches = [list(sampler) for sampler in samplers]
        assert len({len(b) for b in batches}) == 1
        assert all(len(set(map(len, step))) == 1 for step in zip(*batches, strict=True))
        seen = Counter(clip for rank in batches for batch in rank for clip in batch)
        assert set(seen) == set(range(53)) and sum(seen.values()) == -(-53 // world) * world


def test_reading_ahead_does_not_move_the_position() -> None:
    sampler = BucketBatchSampler(SECONDS, batch_size=4)
    first = list(sampler)
    assert list(sampler) == first and sampler.position == 0
    sampler.advance()
    assert list(sampler) == first[1:] and len(sampler) == len(first) - 1


def test_advance_ends_the_epoch_at_its_last_batch() -> None:
    sampler = BucketBatchSampler(SECONDS, batch_size=4, world_size=3, rank=2)
    ended = [sampler.advance() for _ in range(len(sampler))]
    assert ended == [False] * (len(ended) - 1) + [True]
    assert (sampler.epoch, sampler.position) == (1, 0)


@pytest.mark.parametrize("done", [0, 1, 3, 6])
def test_resumes_in_mid_epoch_with_the_same_ranks(done: int) -> None:
    for rank, sampler in enumerate(ranks(2)):
        sampler.set_epoch(4)
        whole = list(sampler)
        for _ in range(done):
            sampler.advance()
        resumed = ranks(2)[rank]
        resumed.load_state_dict(sampler.state_dict())
        assert list(resumed) == whole[done:]


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 3])
def test_another_number_of_ranks_sees_every_remaining_clip_once(before: int, after: int, batch_size: int) -> None:
    samplers = ranks(before)
    seen: Counter[int] = Counter()
    for sampler in samplers:
        sampler.set_epoch(1)
        batches = list(sampler)
        for batch in batches[:3]:
            seen.update(batch)
            sampler.advance()
    assert len({str(sampler.state_dict()) for sampler in samplers}) == 1
    rest: list[list[int]] = []
    for sampler in ranks(after, batch_size):
        sampler.load_state_dict(samplers[0].state_dict())
        clips = [clip for batch in sampler for clip in batch]
        rest.append(clips)
        ended = [sampler.advance() for _ in range(len(sampler))]
        assert ended[-1] and sampler.epoch == 2
        assert list(sampler) == list(
            BucketBatchSampler(SECONDS, batch_size=batch_size, rank=len(rest) - 1, world_size=after, seed=2)
        )
    together = [clip for step in zip(*rest, strict=True) for clip in step]
    left = 53 - sum(seen.values())
    assert set(seen) | set(together[:left]) == set(range(53))
    assert max(seen.values()) == 1 and len(set(together[:left])) == left
    assert len(together) == -(-left // after) * after


def test_the_whole_order_survives_repeated_changes_of_the_number_of_ranks() -> None:
    order = epoch_order(SECONDS, seed=0, group=12)
    state, taken = ranks(3)[0].state_dict(), []
    for world in (3, 2, 1, 5):
        samplers = ranks(world)
        for sampler in samplers:
            sampler.load_state_dict(state)
        step = [next(iter(sampler)) for sampler in samplers]
        taken += [clip for clips in zip(*step, strict=True) for clip in clips]
        samplers[0].advance()
        state = samplers[0].state_dict()
    assert taken == order[: len(taken)] and len(taken) == 44


def test_changed_data_starts_the_epoch_again_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    sampler = BucketBatchSampler(SECONDS, batch_size=4)
    sampler.set_epoch(2)
    sampler.advance()
    other = BucketBatchSampler(SECONDS[:-1], batch_size=4)
    other.load_state_dict(sampler.state_dict())
    assert (other.epoch, other.position) == (2, 0)
    assert "have changed" in caplog.text


def test_refuses_what_cannot_work() -> None:
    with pytest.raises(SovitsError, match="no clip"):
        BucketBatchSampler([], batch_size=4)
    with pytest.raises(SovitsError, match="batch size"):
        BucketBatchSampler([1.0], batch_size=0)
    with pytest.raises(SovitsError, match="Rank 2"):
        BucketBatchSampler([1.0], batch_size=1, rank=2, world_size=2)
