"""Values that are not tensors come back as they were, through real JSON; nothing else is ever made from a file."""

from __future__ import annotations

import collections
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lastgood.errors import DamagedError, LastGoodError
from lastgood.values import decode, encode
from roundtrip import difference


def through_json(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}

    def put(path: str, tensor: torch.Tensor) -> str:
        name = f"{path}#{len(tensors)}"
        tensors[name] = tensor.clone()
        return name

    data = json.loads(json.dumps(encode(value, "x", put), allow_nan=False))
    return decode(data, tensors.__getitem__)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**8000), 2**8000),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.characters(categories=["Cs"]),
    st.binary(),
    st.sampled_from([torch.float8_e4m3fn, torch.Size([1, 0]), torch.device("cpu"), torch.device("cuda", 3)]),
    st.integers(0, 2**64 - 1).map(np.uint64),
    st.floats(width=16).map(np.float16),
    st.floats(width=32).map(np.float32),
    st.floats().map(np.float64),
    st.booleans().map(np.bool_),
)
KEYS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary())
HASHABLE = st.recursive(KEYS, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mapping = st.dictionaries(HASHABLE, inner, max_size=4)
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        mapping,
        st.dictionaries(st.sampled_from(["$", "v", "dtype", "a", ""]), inner, max_size=4),
        mapping.map(collections.OrderedDict),
        mapping.map(lambda m: collections.defaultdict(list, m)),
        st.lists(HASHABLE, max_size=4).map(collections.Counter),
        st.lists(inner, max_size=4).map(lambda items: collections.deque(items, 4)),
        st.sets(HASHABLE, max_size=4),
        st.frozensets(HASHABLE, max_size=4),
        st.lists(st.floats(width=32), max_size=3).map(torch.tensor),
        st.lists(st.integers(-5, 5), max_size=3).map(lambda items: np.array(items, dtype=np.int16)),
    )


@settings(max_examples=300, deadline=None)
@given(st.recursive(SCALARS, containers, max_leaves=12))
def test_any_value_comes_back_with_its_type(value: Any) -> None:
    assert (found := difference(value, through_json(value))) is None, found


@pytest.mark.parametrize(
    "value",
    [range(3), range(9, 1, -2), slice(1, None, 2), bytearray(b"\x00"), -0.0, collections.defaultdict(None, {1: 2})],
)
def test_values_of_other_kinds(value: Any) -> None:
    assert repr(through_json(value)) == repr(value)


class Number(int):
    """A subclass is not the thing itself: it would come back as another type."""


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (object(), "x"),
        ([1, {"a": (2, print)}], r"x\[1\]\.a\[1\]"),
        ({"k": {3: lambda: 0}}, r"x\.k\.3"),
        ({Number(1): 1}, "x.<key>"),
        ({"n": Number(1)}, r"x\.n"),
        ([collections.defaultdict(lambda: 0)], r"x\[0\].*defaultdict"),
        ({"a": np.array([object()])}, r"x\.a: .*numpy"),
        ({"a": np.array(["text"])}, r"x\.a: .*numpy"),
        ({"a": np.datetime64("2020-01-01")}, r"x\.a: .*numpy"),
        ({"a": np.longdouble(1)}, r"x\.a: .*numpy"),
        ({"a": np.zeros(2, np.longdouble)}, r"x\.a: .*numpy"),
        ({"a": np.zeros(2, dtype=">f4")}, r"x\.a: .*numpy.*byte order"),
        ({"a": np.zeros(2, dtype=[("f", "i4")])}, r"x\.a: .*numpy"),
        ({"a": np.ma.masked_array([1.0], [True])}, r"x\.a: .*MaskedArray"),
        (int, "x.*functions and classes are not state"),
        ({"a": 2**8193}, r"x\.a: an integer of 8194 bits"),
    ],
)
def test_what_cannot_be_held_is_refused_with_its_path(value: Any, path: str) -> None:
    with pytest.raises(LastGoodError, match=path):
        through_json(value)


FORMS = [
    "bytes",
    "float",
    "tensor",
    "ndarray",
    "numpy",
    "complex",
    "Size",
    "dtype",
    "device",
    "Path",
    "dict",
    "Counter",
    "defaultdict",
    "tuple",
    "deque",
    "set",
    "frozenset",
    "range",
    "slice",
    "__import__",
    "eval",
]
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 99), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["$", "v", "dtype", "maxlen", "factory", "a"]), inner, max_size=4),
        st.builds(
            lambda kind, v: {"$": kind, "v": v, "dtype": "int8", "maxlen": 2, "factory": "list"},
            st.sampled_from(FORMS),
            inner,
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_whatever_a_file_says_is_a_value_or_damage(data: Any) -> None:
    try:
        decode(data, {"a": torch.zeros(1)}.__getitem__)
    except DamagedError:
        return


@pytest.mark.parametrize(
    "data",
    [
        {"$": "dtype", "v": "load"},
        {"$": "dtype", "v": "nn.Linear"},
        {"$": "device", "v": "no such device"},
        {"$": "defaultdict", "v": [], "factory": "eval"},
        {"$": "numpy", "v": "1", "dtype": "object"},
        {"$": "tensor", "v": "missing"},
        {"$": "os.system", "v": "true"},
        {"$": "set", "v": [[1]]},
        {"$": "range", "v": [1, 2, 0]},
        {"$": "bytes", "v": "not base64!"},
        {"$": ["unhashable"], "v": []},
        {"$": "tuple"},
    ],
)
def test_a_form_that_is_never_written_is_damage(data: Any) -> None:
    with pytest.raises(DamagedError):
        decode(data, dict[str, torch.Tensor]().__getitem__)


def test_deep_nesting_in_a_file_is_damage() -> None:
    data: Any = 1
    for _ in range(500):
        data = [data]
    with pytest.raises(DamagedError, match="nested too deep"):
        decode(data, dict[str, torch.Tensor]().__getitem__)


def test_as_deep_as_may_be_saved_can_be_read() -> None:
    value: Any = 1
    for number in range(60):
        value = [{"a": value}, {1: value}, (value,)][number % 3] if number % 2 else [value]
    assert difference(value, through_json(value)) is None
