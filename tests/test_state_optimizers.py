"""Every optimizer continues bit for bit, whatever its state is made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lastgood
from roundtrip import Objects, round_trip

Make = Callable[[Any], torch.optim.Optimizer]


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2)).to(dtype)


def train(objects: Objects) -> torch.Tensor:
    """One step of every optimizer; the loss."""
    model = objects["model"]
    dtype = next(model.parameters()).dtype
    features, target = torch.randn(5, 3, dtype=dtype), torch.randn(5, 2, dtype=dtype)
    optimizers = [value for value in objects.values() if isinstance(value, torch.optim.Optimizer)]

    def closure() -> torch.Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = (model(features) - target).square().mean()
        loss.backward()
        return loss

    loss = closure()
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            optimizer.step()
    return loss.detach()


def build(make: Make, dtype: torch.dtype = torch.float32) -> Objects:
    model = net(dtype)
    return {"model": model, "opt": make(model.parameters())}


OPTIMIZERS: dict[str, Make] = {
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "Adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "Adam_tensor_lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1)),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1, t0=2),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=2),
    "LBFGS_wolfe": lambda p: torch.optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam_foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "SGD_foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "Adam_fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "AdamW_fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True, amsgrad=True),
    "SGD_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adagrad_fused": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}
if hasattr(torch.optim, "Adafactor"):  # torch 2.5 and newer
    OPTIMIZERS["Adafactor"] = lambda p: torch.optim.Adafactor(p, lr=0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_continues_bit_for_bit(tmp_path: Path, name: str) -> None:
    round_trip(tmp_path, lambda: build(OPTIMIZERS[name]), train)


def test_an_optimizer_of_every_kind_in_torch_is_tried() -> None:
    tried = {name.split("_")[0] for name in OPTIMIZERS} | {"SparseAdam", "Muon", "Optimizer"}
    there = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    assert {name for name in there if issubclass(getattr(torch.optim, name), torch.optim.Optimizer)} <= tried


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_beside_adam_over_one_model(tmp_path: Path) -> None:
    def both() -> Objects:
        model = net()
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim != 2]
        return {"model": model, "muon": torch.optim.Muon(matrices, lr=0.1), "adam": torch.optim.Adam(vectors, lr=0.1)}

    round_trip(tmp_path, both, train)


def test_sparse_adam_has_dense_state(tmp_path: Path) -> None:
    def sparse() -> Objects:
        model = nn.Embedding(7, 3, sparse=True)
        return {"model": model, "opt": torch.optim.SparseAdam(model.parameters(), lr=0.1)}

    def step(objects: Objects) -> None:
        objects["opt"].zero_grad()
        objects["model"](torch.randint(7, (4,))).square().sum().backward()
        objects["opt"].step()

    round_trip(tmp_path, sparse, step)


class Unusual(torch.optim.Optimizer):
    """State of every kind that optimizers keep, and no two parameters alike."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99), "nested": {1: [None, "x"]}})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        first = self.param_groups[0]["params"][0]
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if number == 2:
                    continue  # One has no state at all.
                state = self.state[parameter]
                state["calls"] = state.get("calls", 0) + 1
                state["nothing"] = None
                state["mode"] = "warm"
                state["raw"] = b"\x00\xff"
                state["pair"] = (torch.rand(2, dtype=torch.float64), 0.25)
                state["history"] = [*state.get("history", []), torch.rand((), dtype=torch.float32)]
                state["by_number"] = {0: torch.rand(3), "deep": {"er": [torch.rand(1)]}}
                state["int8"] = torch.randint(-9, 9, (5,), dtype=torch.int8)
                state["mask"] = torch.rand(4) > 0.5
                state["master"] = parameter.detach().float().clone()
                parameter.data -= group["lr"] * parameter.grad * state["pair"][0].sum().to(parameter.dtype)
        self.state[first]["stacked"] = torch.rand(len(self.param_groups[0]["params"]), 2, 2)
        self.state["global"] = {"step": self.state.get("global", {}).get("step", 0) + 1, "mean": torch.rand(2)}
        self.state["model.count"] = {"looks": "like the name of a parameter"}
        self.state[("a", 1)] = 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unusual_state_keeps_types_and_structure(tmp_path: Path, dtype: torch.dtype) -> None:
    first, second = round_trip(tmp_path, lambda: build(Unusual, dtype), train)
    state = second["opt"].state
    parameter = second["opt"].param_groups[0]["params"][0]
    assert state[parameter]["master"].dtype == torch.float32
    assert state[parameter]["pair"][0].dtype == torch.float64
    assert state[parameter]["mode"] == "warm"
    assert state["global"]["step"] == first["opt"].state["global"]["step"] > 3


def test_moments_of_another_type_than_the_parameters_survive(tmp_path: Path) -> None:
    class Master(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    master = state.setdefault("master", parameter.detach().float())
                    master -= 0.001 * parameter.grad.float()
                    parameter.data.copy_(master)

    round_trip(tmp_path, lambda: build(lambda p: Master(p, {}), torch.bfloat16), train)


def test_groups_keep_their_own_options(tmp_path: Path) -> None:
    def groups() -> Objects:
        model = net()
        parameters = list(model.parameters())
        opt = torch.optim.AdamW(
            [{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:], "betas": (0.5, 0.6)}]
        )
        return {"model": model, "opt": opt}

    def step(objects: Objects) -> torch.Tensor:
        objects["opt"].param_groups[0]["lr"] *= 0.5
        objects["opt"].param_groups[1]["note"] = ["added later", float("inf")]
        return train(objects)

    _, second = round_trip(tmp_path, groups, step)
    assert second["opt"].param_groups[0]["lr"] == 0.5 * 0.5**6
    assert second["opt"].param_groups[1]["betas"] == (0.5, 0.6)


def test_the_order_of_parameters_may_differ(tmp_path: Path) -> None:
    """State is filed under names, so it cannot reach the wrong parameter."""

    def make(backwards: bool) -> Objects:
        model = net()
        parameters = list(model.parameters())
        return {"model": model, "opt": torch.optim.Adam(parameters[::-1] if backwards else parameters, lr=0.1)}

    first = make(False)
    train(first)
    with lastgood.Checkpointer(tmp_path, **first) as ckpt:
        ckpt.save(1)
    second = make(True)
    with lastgood.Checkpointer(tmp_path, **second) as ckpt:
        ckpt.restore()
    for mine, theirs in zip(first["model"].parameters(), second["model"].parameters(), strict=True):
        assert torch.equal(first["opt"].state[mine]["exp_avg"], second["opt"].state[theirs]["exp_avg"])


def test_several_optimizers_over_one_model_and_one_over_several(tmp_path: Path) -> None:
    def make() -> Objects:
        model, head = net(), nn.Linear(2, 2)
        parameters = list(model.parameters())
        return {
            "model": model,
            "head": head,
            "a": torch.optim.Adam(parameters[:2], lr=0.1),
            "b": torch.optim.SGD(parameters[1:], lr=0.1, momentum=0.5),
            "all": torch.optim.RMSprop([*parameters, *head.parameters()], lr=0.01),
        }

    def step(objects: Objects) -> None:
        objects["head"](objects["model"](torch.randn(5, 3))).square().mean().backward()
        for name in ("a", "b", "all"):
            objects[name].step()
        objects["model"].zero_grad()
        objects["head"].zero_grad()

    round_trip(tmp_path, make, step)


def test_frozen_parameters_have_no_state(tmp_path: Path) -> None:
    def make() -> Objects:
        model = net()
        next(model.parameters()).requires_grad_(False)
        return {"model": model, "opt": torch.optim.Adam(model.parameters(), lr=0.1)}

    _, second = round_trip(tmp_path, make, train)
    assert len(second["opt"].state) == 3


class Turned(torch.optim.Optimizer):
    """Multiplies by matrices that lie in memory column by column, as those of a decomposition do."""

    def __init__(self, parameters: Any, early: bool = False) -> None:
        super().__init__(parameters, {"lr": 0.1})
        if early:
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["q"] = torch.zeros(parameter.shape[-1], parameter.shape[-1])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            held = self.state[parameter]
            if "n" not in held:
                held["n"] = 0
                held["q"] = torch.randn(parameter.shape[-1], parameter.shape[-1]).t()
                held["bases"] = [torch.randn(3, 1, 4).permute(2, 0, 1), None]
            held["n"] += 1
            parameter.sub_(parameter.grad @ held["q"] * 0.1 * held["bases"][0].sum())


@pytest.mark.parametrize("early", [False, True])
def test_what_lies_column_by_column_does_so_again(tmp_path: Path, early: bool) -> None:
    """A product of it has other last bits where it lies row by row."""

    def make(early: bool = False) -> Objects:
        return build(lambda parameters: Turned(parameters, early))

    _, second = round_trip(tmp_path, make, train, rebuild=lambda: make(early))
    (held, *_) = second["opt"].state.values()
    assert held["q"].stride() == (1, 3) and held["bases"][0].stride() == (1, 4, 4)


def test_the_moments_of_a_model_in_channels_last(tmp_path: Path) -> None:
    def make() -> Objects:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)).to(memory_format=torch.channels_last)
        return {"model": model, "opt": torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True)}

    def step(objects: Objects) -> None:
        objects["model"](torch.randn(2, 3, 5, 5)).square().mean().backward()
        objects["opt"].step()
        objects["opt"].zero_grad()

    _, second = round_trip(tmp_path, make, step)
    for parameter, held in second["opt"].state.items():
        assert held["exp_avg"].stride() == parameter.stride()
    assert len(second["opt"].state) == 4


class Around(torch.optim.Optimizer):
    """An optimizer around another one, whose state has a form of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.slow = inner, {p: p.detach().clone() for g in inner.param_groups for p in g["params"]}
        self.steps = 0

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inner.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        self.steps += 1
        if self.steps % 2 == 0:
            for parameter, slow in self.slow.items():
                parameter.copy_(slow.lerp_(parameter, 0.5))

    def state_dict(self) -> dict[str, Any]:
        return {
            "inner": self.inner.state_dict(),
            "slow": {(0, i): s for i, s in enumerate(self.slow.values())},
            "n": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.slow = {p: state["slow"][0, i] for i, p in enumerate(self.slow)}
        self.steps = state["n"]


def test_an_optimizer_around_another_whose_state_has_a_form_of_its_own(tmp_path: Path) -> None:
    round_trip(tmp_path, lambda: build(lambda parameters: Around(torch.optim.Adam(parameters, lr=0.1))), train)


class Through(torch.optim.Optimizer):
    """Gives what is in the inner one as it is."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name in ("param_groups", "state"):
            return getattr(self.inner, name)
        raise AttributeError(name)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


class Bare(Around):
    """Shows no parameters."""

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        raise AttributeError("param_groups")


@pytest.mark.parametrize("order", [("a", "b", "c"), ("b", "c", "a")])
def test_optimizers_of_one_class_may_be_around_different_ones(tmp_path: Path, order: tuple[str, ...]) -> None:
    def make() -> Objects:
        model = net()
        kinds = {"a": lambda o: Through(Around(o)), "b": Through, "c": Bare}
        return {"model": model, **{name: kinds[name](torch.optim.Adam(model.parameters())) for name in order}}

    def step(objects: Objects) -> None:
        objects["model"](torch.randn(5, 3)).square().mean().backward()
        for name in order:
            optimizer = objects[name]
            (optimizer if isinstance(optimizer, Bare) else optimizer.inner).step()
        objects["model"].zero_grad()

    round_trip(tmp_path, make, step)


def test_a_group_that_was_added_later_must_be_there_at_restore(tmp_path: Path) -> None:
    def make(added: bool) -> Objects:
        model = net()
        parameters = list(model.parameters())
        opt = torch.optim.Adam(parameters[:2], lr=0.1)
        if added:
            opt.add_param_group({"params": parameters[2:], "lr": 0.3})
        return {"model": model, "opt": opt}

    round_trip(tmp_path / "a", lambda: make(True), train)
    with (
        lastgood.Checkpointer(tmp_path / "a", **make(False)) as ckpt,
        pytest.raises(lastgood.MismatchError, match="1 parameter groups, and was saved with 2"),
    ):
        ckpt.restore()


def test_an_optimizer_that_was_never_stepped(tmp_path: Path) -> None:
    _, second = round_trip(tmp_path, lambda: build(OPTIMIZERS["Adam"]), None)
    assert not second["opt"].state


def test_the_state_of_a_stepped_optimizer_gives_way_to_an_empty_one(tmp_path: Path) -> None:
    def stepped() -> Objects:
        objects = build(OPTIMIZERS["Adam"])
        train(objects)
        return objects

    round_trip(tmp_path, lambda: build(OPTIMIZERS["Adam"]), None, rebuild=stepped)


def test_parameters_of_no_registered_module(tmp_path: Path) -> None:
    """They are known by their place; registered as values, their numbers are saved too."""

    def make() -> Objects:
        weight = nn.Parameter(torch.randn(3))
        return {"weight": weight, "opt": torch.optim.Adam([weight], lr=0.1)}

    def step(objects: Objects) -> None:
        objects["opt"].zero_grad()
        (objects["weight"] * torch.randn(3)).sum().backward()
        objects["opt"].step()

    round_trip(tmp_path, make, step)


def test_parameters_that_nothing_saves_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, forgotten = nn.Linear(2, 2), nn.Parameter(torch.randn(3))
    opt = torch.optim.Adam([*model.parameters(), forgotten])
    with lastgood.Checkpointer(tmp_path / "a", model=model, opt=opt) as ckpt:
        ckpt.save(1)
    assert "opt" in caplog.text and "opt.group0.2" in caplog.text and "not saved" in caplog.text
    caplog.clear()
    with lastgood.Checkpointer(tmp_path / "b", model=model, forgotten={"x": [forgotten]}, opt=opt) as ckpt:
        ckpt.save(1)
    assert "not saved" not in caplog.text
