"""Tensors that are made of others, as those of 8-bit optimizers and quantized weights, are saved by their parts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

import lastgood
from lastgood.composed import plain_parts
from lastgood.state import local_part
from lastgood.steady import OVERLAP_BYTES, Steady
from roundtrip import Objects, round_trip

SIZE = 64


class Coarse(torch.Tensor):
    """Numbers of 8 bits with a scale: the least that such a class must have."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, levels: int, dtype: torch.dtype) -> Coarse:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, levels: int, dtype: torch.dtype) -> None:
        self.codes, self.scale, self.levels = codes, scale, levels

    @classmethod
    def of(cls, values: torch.Tensor, levels: int = 127) -> Coarse:
        scale = values.abs().max().reshape(1) / levels
        return cls((values / scale).round().to(torch.int8), scale, levels, values.dtype)

    def values(self) -> torch.Tensor:  # type: ignore[override]
        return self.codes.to(self.dtype) * self.scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], (self.levels, self.dtype)

    @staticmethod
    def __tensor_unflatten__(parts: Any, context: Any, size: Any, stride: Any) -> Coarse:
        return Coarse(parts["codes"], parts["scale"], *context)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return Coarse(args[0].codes.detach(), args[0].scale.detach(), args[0].levels, args[0].dtype)
        if function is torch.ops.aten.copy_.default:
            new = Coarse.of(args[1], args[0].levels)
            args[0].codes.copy_(new.codes)
            args[0].scale.copy_(new.scale)
            return args[0]
        raise NotImplementedError(function)


class Descent(torch.optim.Optimizer):
    """Keeps its moments as coarse numbers."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            held = self.state[parameter]
            if not held:
                held["mean"] = Coarse.of(torch.zeros_like(parameter) + 1)
            mean = held["mean"].values() * 0.9 + parameter.grad
            held["mean"].copy_(mean)
            parameter.sub_(held["mean"].values(), alpha=0.1)


def content(tensor: torch.Tensor) -> list[Any]:
    return [part.tolist() for part in plain_parts(tensor)]


def train(objects: Objects) -> None:
    objects["model"](torch.randn(3, SIZE)).square().mean().backward()
    objects["opt"].step()
    objects["opt"].zero_grad()


def make() -> Objects:
    model = nn.Linear(SIZE, SIZE)
    return {"model": model, "opt": Descent(model.parameters())}


def trained() -> Objects:
    objects = make()
    train(objects)
    return objects


@pytest.mark.parametrize("rebuild", [make, trained])
def test_an_optimizer_goes_on_bit_for_bit(tmp_path: Path, rebuild: Any) -> None:
    _, second = round_trip(tmp_path, make, train, rebuild=rebuild)
    assert type(second["opt"].state[second["model"].weight]["mean"]) is Coarse


class Quantized(nn.Module):
    def __init__(self, values: torch.Tensor | None = None, levels: int = 127) -> None:
        super().__init__()
        values = torch.randn(SIZE, SIZE) if values is None else values
        self.weight = nn.Parameter(Coarse.of(values, levels), requires_grad=False)
        self.register_buffer("table", Coarse.of(torch.randn(5)))
        self.tied = self.weight


def test_a_module_is_restored_into_the_memory_that_it_has(tmp_path: Path) -> None:
    def build() -> Objects:
        model = Quantized()
        memory.append(model.weight.codes.data_ptr())
        return {"model": model}

    memory: list[int] = []
    _, second = round_trip(tmp_path, build)
    model = second["model"]
    assert type(model.weight.data) is Coarse and model.weight.codes.data_ptr() == memory[1]
    (shard,) = tmp_path.glob("step-*/*.safetensors")
    assert shard.stat().st_size < SIZE * SIZE * 2 + 4096  # The tied one is there once.


def test_values(tmp_path: Path) -> None:
    def build() -> Objects:
        return {"single": Coarse.of(torch.randn(5)), "state": {"list": [Coarse.of(torch.randn(3, 2))]}}

    round_trip(tmp_path, build)


@pytest.mark.parametrize("nested", [False, True])
def test_a_value_of_another_shape_or_made_in_another_way_is_replaced(tmp_path: Path, nested: bool) -> None:
    def value(numbers: torch.Tensor, levels: int = 127) -> Any:
        return {"in": Coarse.of(numbers, levels)} if nested else Coarse.of(numbers, levels)

    with lastgood.Checkpointer(tmp_path, a=value(torch.arange(5.0)), b=value(torch.arange(4.0))) as ckpt:
        ckpt.save(1)
    with lastgood.Checkpointer(tmp_path, a=value(torch.ones(3)), b=value(torch.ones(4), levels=3)) as ckpt:
        ckpt.restore()
        for name, count in (("a", 5.0), ("b", 4.0)):
            found = ckpt[name]["in"] if nested else ckpt[name]
            assert content(found) == content(Coarse.of(torch.arange(count))) and found.levels == 127


def test_what_does_not_fit_in_part_is_not_restored_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Quantized()
    optimizer = torch.optim.SGD([model.weight], momentum=0.9)
    optimizer.state[model.weight]["momentum_buffer"] = torch.ones(SIZE, SIZE)
    with lastgood.Checkpointer(tmp_path, model=model, opt=optimizer) as ckpt:
        ckpt.save(1)
    other = Quantized()
    other.weight.scale = torch.ones(2)
    before = content(other.weight)
    fresh = torch.optim.SGD([other.weight], momentum=0.9)
    with lastgood.Checkpointer(tmp_path, model=other, opt=fresh) as ckpt:
        with pytest.raises(lastgood.MismatchError, match=r"model\.weight\.scale is float32 \[1\] in the checkpoint"):
            ckpt.restore()
        assert ckpt.restore(strict=False) == 1
    assert content(other.weight) == before and content(other.table) == content(model.table)
    assert not fresh.state


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            lambda: nn.ParameterDict({"weight": torch.randn(SIZE, SIZE)}),
            "Coarse in the checkpoint and a torch.Tensor here",
        ),
        (lambda: Quantized(levels=7), r"Coarse \[64, 64\] that was made with other settings"),
        (lambda: Quantized(torch.randn(3)), r"Coarse \[64, 64\] in the checkpoint and a .*Coarse \[3\] here"),
        (lambda: Quantized(torch.randn(SIZE, SIZE).double()), "other settings"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(tmp_path: Path, other: Any, words: str) -> None:
    with lastgood.Checkpointer(tmp_path, model=Quantized()) as ckpt:
        ckpt.save(1)
    model = other()
    before = [part.clone() for tensor in model.state_dict().values() for part in plain_parts(tensor)]
    with (
        lastgood.Checkpointer(tmp_path, model=model) as ckpt,
        pytest.raises(lastgood.MismatchError, match=rf"model\.weight is a .*{words}"),
    ):
        ckpt.restore()
    after = [part for tensor in model.state_dict().values() for part in plain_parts(tensor)]
    assert all(map(torch.equal, before, after))


def test_a_class_that_the_program_has_not_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lastgood.Checkpointer(tmp_path, **trained()) as ckpt:
        ckpt.save(1)
    objects = make()
    before = objects["model"].weight.detach().clone()
    monkeypatch.setattr(Coarse, "__module__", "elsewhere")
    with (
        lastgood.Checkpointer(tmp_path, **objects) as ckpt,
        pytest.raises(lastgood.LastGoodError, match=r"was saved as a test_composed\.Coarse.*Import the package"),
    ):
        ckpt.restore()
    assert torch.equal(objects["model"].weight, before)


def test_a_class_that_is_unknown_or_refuses_is_no_damage_where_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older checkpoint would be no better."""
    with lastgood.Checkpointer(tmp_path, value=[1]) as ckpt:
        ckpt.save(1)
        ckpt["value"][:] = [Coarse.of(torch.ones(3))]
        ckpt.save(2)
    assert type(lastgood.load(tmp_path)["value"][0]) is Coarse

    def refuse(*_: Any) -> Any:
        raise AssertionError("no such scale")

    with monkeypatch.context() as patch:
        patch.setattr(Coarse, "__tensor_unflatten__", refuse)
        assert lastgood.load(tmp_path)["value"] == [1]  # What is saved there does not make one: it is damage.
    monkeypatch.setattr(Coarse, "__module__", "elsewhere")
    with pytest.raises(lastgood.MismatchError, match="Import the package"):
        lastgood.load(tmp_path)


def test_large_parts_are_copied_in_the_background() -> None:
    model = nn.Linear(256, 256)
    optimizer = Descent(model.parameters())
    steady = Steady(lambda: None)
    steady.watch({"opt": optimizer})
    model(torch.randn(2, 256)).sum().backward()
    optimizer.step()
    held, found = steady.look()
    codes = optimizer.state[model.weight]["mean"].codes
    assert codes.nbytes >= OVERLAP_BYTES and codes.data_ptr() in found and found == held


def test_a_dtensor_of_such_parts_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class DTensor:
        placements, shape, device_mesh = (), (3,), SimpleNamespace(get_coordinate=list)

        def to_local(self) -> torch.Tensor:
            return Coarse.of(torch.randn(3))

    monkeypatch.setattr(
        "torch.distributed.tensor._utils.compute_local_shape_and_global_offset", lambda *_: ((3,), (0,))
    )
    with pytest.raises(
        lastgood.LastGoodError, match=r"w: a DTensor whose parts are of the class .*Coarse cannot be saved"
    ):
        local_part(cast(Any, DTensor()), "w")
