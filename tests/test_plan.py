"""The sharing of replicated tensors among writers: every byte once, evenly, and the same on every rank."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lastgood import plan
from lastgood.dtypes import DTYPE_NAMES
from lastgood.placement import LocalTensor, Placement
from lastgood.plan import Box, lay_out, share_out, structure

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool]
SHAPES = st.one_of(
    st.lists(st.integers(0, 9), max_size=3),
    st.tuples(st.integers(1, 5000), st.integers(1, 3000)).map(list),
    st.tuples(st.integers(1, 9_000_000)).map(list),
)


def local(shape: list[int], dtype: torch.dtype, placement: Placement, writes: bool = True) -> LocalTensor:
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return LocalTensor(tensor, placement, tuple(shape), (0,) * len(shape), tensor, DTYPE_NAMES[dtype], writes)


TENSORS = st.lists(
    st.tuples(SHAPES, st.sampled_from(DTYPES), st.sampled_from([Placement.REPLICATED] * 4 + list(Placement))),
    max_size=12,
).map(lambda specs: {f"t{i}": local(*spec) for i, spec in enumerate(specs)})
WRITERS = st.lists(st.integers(0, 40), min_size=1, max_size=9, unique=True).map(sorted)


def rows(box: Box, tensor: LocalTensor) -> tuple[int, int]:
    assert box.offsets[1:] == (0,) * (len(box.offsets) - 1) and box.shape[1:] == tensor.shape[1:]
    return (box.offsets[0], box.offsets[0] + box.shape[0]) if tensor.shape else (0, 1)


@settings(max_examples=200, deadline=None)
@given(TENSORS, WRITERS)
def test_every_byte_is_written_exactly_once_and_evenly(tensors: dict[str, LocalTensor], writers: list[int]) -> None:
    shares = share_out(tensors, writers)
    assert list(shares) == writers
    assert shares == share_out(dict(tensors), tuple(writers))
    taken: dict[str, list[tuple[int, int]]] = {}
    for boxes in shares.values():
        for box in boxes:
            assert tensors[box.name].placement is Placement.REPLICATED
            taken.setdefault(box.name, []).append(rows(box, tensors[box.name]))
    replicated = {name: t for name, t in tensors.items() if t.placement is Placement.REPLICATED}
    assert taken.keys() == replicated.keys()
    for name, ranges in taken.items():
        at = 0
        for begin, end in sorted(ranges):
            assert begin == at
            at = end
        assert at == (replicated[name].shape[0] if replicated[name].shape else 1)
    total = sum(plan.nbytes(t) for t in replicated.values())
    # A small tensor is not cut, a large one only between rows: by so much a share may be off at either end.
    grain = plan.SPLIT_BYTES + max(
        [plan.nbytes(t) // t.shape[0] for t in replicated.values() if t.shape and t.shape[0]] or [0]
    )
    for boxes in shares.values():
        size = sum(math.prod(b.shape) * tensors[b.name].tensor.element_size() for b in boxes)
        assert abs(size - total / len(writers)) <= 2 * grain


@settings(max_examples=100, deadline=None)
@given(TENSORS, WRITERS, st.integers(0, 12))
def test_the_layouts_of_all_ranks_agree(tensors: dict[str, LocalTensor], writers: list[int], rank: int) -> None:
    root = lay_out(tensors, 0, writers)
    mine = lay_out(tensors, rank, writers)
    if rank != 0 and rank in writers:
        theirs = [(p.label, p.offsets, p.shape, p.dtype) for p in root.others[rank]]
        assert theirs == [(p.label, p.offsets, p.shape, p.dtype) for p in mine.share]
    for layout in (root, mine):
        ends: list[tuple[int, int]] = sorted((p.at, p.at + p.size) for p in layout.pieces() if p.size)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends)), "two pieces in one place"
        assert all(end <= layout.size for _, end in ends)
        assert all(p.at % tensors[p.name].tensor.element_size() == 0 for p in layout.pieces())
        for group in (layout.share, layout.own, *layout.others.values()):
            assert len({p.entry for p in group}) == len(group)
            for one, two in itertools.pairwise(group):
                assert two.at == one.at + one.size, "a hole inside a file"
    # Rank 0 can complete the save alone: it has copied all that is not another rank's own.
    own = {n for n, t in tensors.items() if t.placement is not Placement.SHARDED or t.writes}
    assert {p.name for p in root.pieces()} == own


def test_the_structure_says_what_ranks_must_agree_on() -> None:
    one = {"a": local([2, 3], torch.float32, Placement.REPLICATED), "b": local([2], torch.uint8, Placement.LOCAL)}
    other = {**one, "b": local([9], torch.uint8, Placement.LOCAL)}
    assert structure(one) == structure(other)
    for changed in (
        {"a": local([3, 2], torch.float32, Placement.REPLICATED)},
        {"a": local([2, 3], torch.float64, Placement.REPLICATED)},
        {"c": local([2, 3], torch.float32, Placement.REPLICATED)},
        {},
    ):
        assert structure(one) != structure(changed)
