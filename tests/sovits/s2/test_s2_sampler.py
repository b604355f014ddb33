"""Batches against upstream's (exact), and resuming within an epoch, on the same and on other numbers of ranks."""

from collections import Counter
from itertools import chain
from typing import Any

import pytest
from s2_golden import read_json

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.s2.sampler import BOUNDARIES, BucketSampler

REFERENCE = read_json("samplers.json")["s2"]


def batches(batch_size: int, world: int, **kwargs: Any) -> list[BucketSampler]:
    return [BucketSampler(REFERENCE["frames"], batch_size, rank=r, world_size=world, **kwargs) for r in range(world)]


@pytest.mark.parametrize(("cases", "boundaries"), [("cases", "v1_v2_pro"), ("cases_v3_v4", "v3_v4")])
def test_batches_are_upstreams(cases: str, boundaries: str) -> None:
    for case in REFERENCE[cases]:
        sampler = BucketSampler(
            REFERENCE["frames"],
            case["batch_size"],
            rank=case["rank"],
            world_size=case["world"],
            boundaries=REFERENCE[f"boundaries_{boundaries}"],
        )
        sampler.set_epoch(case["epoch"])
        assert list(sampler) == case["batches"]
        assert len(sampler) == sampler.steps_per_epoch == case["len"] == len(case["batches"])
    assert list(BOUNDARIES) == REFERENCE["boundaries_v1_v2_pro"]


def test_clips_outside_the_boundaries_are_not_used() -> None:
    (sampler,) = batches(4, 1)
    used = set(sampler.order)
    assert [i for i in range(len(REFERENCE["frames"])) if i not in used] == REFERENCE["never_used"]
    with pytest.raises(SovitsError, match="none of the 2 clips"):
        BucketSampler([32, 1901], 4)


def test_drawing_ahead_does_not_move_the_position() -> None:
    (sampler,) = batches(4, 1)
    list(sampler)
    assert sampler.state_dict()["position"] == 0
    sampler.advance()
    assert sampler.state_dict()["position"] == 4


def test_resuming_within_an_epoch_yields_exactly_the_remaining_batches() -> None:
    for done in (0, 1, 3, 7):
        for rank in (0, 1):
            whole = list(batches(4, 2)[rank])
            old, new = batches(4, 2)[rank], batches(4, 2)[rank]
            for _ in range(done):
                old.advance()
            new.load_state_dict(old.state_dict())
            assert list(new) == whole[done:]
            assert len(new) == len(whole) - done
    while len(new):
        new.advance()
    assert list(new) == [] and new.position == len(new.order)
    new.advance()
    assert new.position == len(new.order)


@pytest.mark.parametrize(("old_world", "old_batch"), [(1, 4), (2, 4), (4, 2), (3, 5)])
@pytest.mark.parametrize(("new_world", "new_batch"), [(1, 4), (1, 7), (2, 4), (3, 4), (5, 3), (8, 2)])
def test_after_a_change_of_ranks_every_clip_is_seen_as_often_as_planned(
    old_world: int, old_batch: int, new_world: int, new_batch: int
) -> None:
    old = batches(old_batch, old_world)
    planned = Counter(old[0].order)
    seen: list[int] = []
    for rank, sampler in enumerate(old):
        sampler.set_epoch(5)
        seen.extend(chain.from_iterable(list(sampler)[:2]))
        sampler.advance()
        sampler.advance()
        assert sampler.state_dict() == old[0].state_dict() or rank == 0
    planned = Counter(old[0].order)
    new = batches(new_batch, new_world)
    steps = set()
    for sampler in new:
        sampler.load_state_dict(old[0].state_dict())
        rest = list(sampler)
        steps.add(len(rest))
        assert len(rest) == len(sampler) and all(rest), "every rank has something to do in every step"
        assert max(map(len, rest)) <= new_batch + 1
        seen.extend(chain.from_iterable(rest))
    assert len(steps) == 1, "every rank does the same number of steps"
    assert Counter(seen) == planned


def test_two_changes_of_ranks_in_one_epoch() -> None:
    first, second, third = batches(4, 2)[0], batches(4, 3)[0], batches(4, 1)[0]
    first.advance()
    second.load_state_dict(first.state_dict())
    second.advance()
    third.load_state_dict(second.state_dict())
    assert third.position == 8 + 12
    assert list(chain.from_iterable(third)) == first.order[20:]


def test_fewer_clips_than_ranks_leave_no_rank_idle() -> None:
    old = BucketSampler([100, 101, 102, 103, 104], 1)
    for _ in range(3):
        old.advance()
    rest = []
    for rank in range(3):
        new = BucketSampler([100, 101, 102, 103, 104], 1, rank=rank, world_size=3)
        new.load_state_dict(old.state_dict())
        rest.append(list(new))
    assert all(len(steps) == 1 and steps[0] for steps in rest)
    assert set(chain.from_iterable(chain.from_iterable(rest))) == set(old.order[3:])


def test_a_changed_data_set_is_noticed() -> None:
    state = BucketSampler([100, 200], 1).state_dict()
    with pytest.raises(SovitsError, match="data set changed"):
        BucketSampler([100, 201], 1).load_state_dict(state)


def test_the_next_epoch_is_planned_for_the_present_ranks() -> None:
    old, new = batches(4, 2)[0], batches(4, 3)[0]
    new.load_state_dict(old.state_dict())
    new.set_epoch(2)
    fresh = batches(4, 3)[0]
    fresh.set_epoch(2)
    assert list(new) == list(fresh)
