"""Every type, layout and name of a tensor comes back, and the safetensors library reads the same from the files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import lastgood
from lastgood import catalog
from lastgood.dtypes import DTYPES
from lastgood.snapshot import Snapshot
from lastgood.state import Flattener
from roundtrip import bits, round_trip


def of_type(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits that are a valid value of the type: NaNs with payload among them."""
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size) if shape else (size,), dtype=torch.uint8)
    whole = raw.view(dtype)
    return whole if shape else whole.reshape(())


@pytest.mark.parametrize("name", DTYPES)
def test_every_type_keeps_every_bit(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]

    def make() -> dict[str, Any]:
        model = nn.Module()
        for label, shape in {"matrix": (3, 5), "scalar": (), "empty": (0, 4), "one": (1,)}.items():
            model.register_buffer(label, of_type(dtype, *shape))
        strided = of_type(dtype, 6, 4)
        model.register_buffer("turned", strided.t())
        model.register_buffer("inside", strided[1:5:2, 1:])
        return {"m": model, "values": [of_type(dtype, 4, 2), of_type(dtype, 2, 2).t()]}

    first, _ = round_trip(tmp_path, make)
    (entry,) = catalog.committed(tmp_path)
    with safe_open(entry.path / "00000.safetensors", "pt") as file:
        assert bits(file.get_tensor("m.turned")) == bits(first["m"].turned)
        assert bits(file.get_tensor("m.scalar")) == bits(first["m"].scalar)


NAMES = [
    "",
    "a",
    "a.b",
    "a/b",
    "../up",
    "a@0,0",
    "a+",
    "rank1/x",
    "__metadata__",
    "名前",
    "\U0001f600",
    "x" * 5000,
    "a b\n",
]


def test_names_of_every_kind(tmp_path: Path) -> None:
    objects = {name: {key: torch.randn(2) for key in NAMES} for name in NAMES}
    round_trip(tmp_path / "nested", lambda: {name: {k: torch.randn(2) for k in NAMES} for name in NAMES})
    round_trip(tmp_path / "plain", lambda: {name: torch.randn(3) for name in NAMES})
    (entry,) = catalog.committed(tmp_path / "plain")
    with safe_open(entry.path / "00000.safetensors", "pt") as file:
        assert len(file.keys()) == len(NAMES)
    (entry,) = catalog.committed(tmp_path / "nested")
    with safe_open(entry.path / "00000.safetensors", "pt") as file:
        assert len(file.keys()) == len(objects) ** 2


def test_two_paths_that_read_the_same_are_two_tensors(tmp_path: Path) -> None:
    def make() -> dict[str, Any]:
        inner = nn.ModuleDict({"b": nn.Linear(2, 2)})
        outer = nn.Linear(2, 2)
        return {
            "a": inner,
            "a.b": outer,
            "v": {"x": {"y": torch.randn(1)}, "x.y": torch.randn(1), 1: torch.randn(1), "1": torch.randn(1)},
            "opt": torch.optim.SGD([*inner.parameters(), *outer.parameters()], momentum=0.9, lr=0.1),
        }

    def step(objects: dict[str, Any]) -> None:
        objects["opt"].zero_grad()
        (objects["a"]["b"](torch.randn(1, 2)) + objects["a.b"](torch.randn(1, 2)) * 3).sum().backward()
        objects["opt"].step()

    round_trip(tmp_path, make, step)


class Tagged(torch.Tensor):
    pass


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Of torch: prototypes and deprecations.
    UNSUPPORTED: dict[str, tuple[Any, str]] = {
        "sparse": (torch.eye(3).to_sparse(), "sparse"),
        "sparse_csr": (torch.eye(3).to_sparse_csr(), "sparse"),
        "quantized": (torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.quint8), "quantized"),
        "meta": (torch.rand(3, device="meta"), "meta device"),
        "subclass": (torch.rand(3).as_subclass(Tagged), "Tagged"),
        "subclass parameter": (nn.Parameter(torch.rand(3).as_subclass(Tagged)), "Tagged"),
        "nested": (torch.nested.nested_tensor([torch.rand(2), torch.rand(3)]), "nested"),
        "jagged": (torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged), "Nested"),
        "complex128": (torch.rand(3, dtype=torch.complex128), "complex128"),
        "float8 of others": (torch.rand(3).to(torch.float8_e4m3fnuz), "float8_e4m3fnuz"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_an_unsupported_tensor_is_refused_by_name_and_can_be_left_out(tmp_path: Path, kind: str) -> None:
    tensor, word = UNSUPPORTED[kind]
    model = nn.Linear(2, 2)
    if isinstance(tensor, nn.Parameter):
        model.odd = tensor
    else:
        model.register_buffer("odd", tensor)
    with pytest.raises(lastgood.LastGoodError, match=word) as caught:
        lastgood.Checkpointer(tmp_path / "a", model=model, other=1)
    assert "model.odd" in str(caught.value)
    with pytest.raises(lastgood.LastGoodError, match=r"state\.deep\[1\]"):
        lastgood.Checkpointer(tmp_path / "a", state={"deep": [1, tensor]})
    assert not (tmp_path / "a").exists()
    before = model.weight.detach().clone()
    state = {"deep": [1, tensor], "n": 2}
    left_out = ["model.o*", "state.deep[1]"]
    with lastgood.Checkpointer(tmp_path / "b", model=model, state=state, leave_out=left_out) as ckpt:
        ckpt.save(1).result()
        nn.init.zeros_(model.weight)
        state["n"] = 3
        assert ckpt.restore() == 1
        assert torch.equal(model.weight, before)
        assert ckpt["state"]["n"] == 2 and ckpt["state"]["deep"][1] is tensor


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_view_of_any_memory_is_copied_right(data: st.DataObject) -> None:
    """Strides, offsets, steps and expansion as they come: the values are what counts."""
    shape = data.draw(st.lists(st.integers(0, 4), min_size=0, max_size=4))
    view = torch.randn(shape)
    for _ in range(data.draw(st.integers(0, 3))):
        if view.ndim == 0:
            view = view.expand(data.draw(st.integers(1, 3)))
            continue
        d = data.draw(st.integers(0, view.ndim - 1))
        kind = data.draw(st.sampled_from(["permute", "slice", "select", "expand"]))
        if kind == "permute":
            view = view.permute(*data.draw(st.permutations(range(view.ndim))))
        elif kind == "slice":
            view = view[(slice(None),) * d + (slice(data.draw(st.integers(0, 2)), None, data.draw(st.integers(1, 3))),)]
        elif kind == "select" and view.shape[d]:
            view = view.select(d, data.draw(st.integers(0, view.shape[d] - 1)))
        else:
            view = view.unsqueeze(d).expand(*view.shape[:d], data.draw(st.integers(1, 3)), *view.shape[d:])
    state = Flattener({"v": view, "again": [view, view.clone()]}, world_size=1).flatten()
    snapshot = Snapshot(0)
    snapshot.take(state, [0], frozenset())
    for piece in snapshot.layout.pieces():
        if piece.name in ("v", "again[1]"):
            assert bytes(snapshot.view[piece.at : piece.at + piece.size]) == bits(view)


def test_a_conjugate_view_is_not_its_base(tmp_path: Path) -> None:
    def make() -> dict[str, Any]:
        z = torch.randn(3, dtype=torch.complex64)
        return {"v": {"z": z, "conjugate": z.conj(), "imaginary": z.imag, "negated": z.conj().imag}}

    round_trip(tmp_path, make, rebuild=lambda: {"v": {}})


def test_a_parameter_that_is_left_out_may_be_an_optimizers(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.odd = nn.Parameter(torch.rand(3).as_subclass(Tagged))
    optimizer = torch.optim.SGD(model.parameters())
    with lastgood.Checkpointer(tmp_path, model=model, opt=optimizer, leave_out=["model.odd"]) as ckpt:
        ckpt.save(1).result()
