"""Only what surely changes in announced steps alone is copied in the background."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from lastgood import steady as steady_module
from lastgood.steady import Steady

WIDTH = 384


def build() -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(WIDTH, WIDTH)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(2, WIDTH)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def watched(*optimizers: torch.optim.Optimizer) -> tuple[Steady, list[int]]:
    waits: list[int] = []
    steady = Steady(lambda: waits.append(1))
    steady.watch({str(i): optimizer for i, optimizer in enumerate(optimizers)})
    return steady, waits


def test_an_optimizer_that_was_not_seen_to_step_makes_nothing_steady() -> None:
    model, optimizer = build()
    steady, _ = watched(optimizer)
    assert not steady.look()[1]
    step(model, optimizer)
    assert model.weight.data_ptr() in steady.look()[1]
    assert not steady.look()[1]  # No step since the last look.


def test_its_state_is_steady_and_small_tensors_are_not() -> None:
    model, optimizer = build()
    steady, waits = watched(optimizer)
    step(model, optimizer)
    found = steady.look()[1]
    assert found == {
        model.weight.data_ptr(),
        optimizer.state[model.weight]["exp_avg"].data_ptr(),
        optimizer.state[model.weight]["exp_avg_sq"].data_ptr(),
    }
    assert len(waits) == 1


def test_what_is_found_for_tensors_at_the_same_places_is_used_again_as_long_as_it_holds() -> None:
    model = nn.Linear(WIDTH, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steady, _ = watched(optimizer)
    step(model, optimizer)
    places = object()
    held, found = steady.look(places)
    assert model.weight.data_ptr() in found
    step(model, optimizer)
    assert steady.look(places) == (held, found)
    assert not steady.look(places)[1], "no step since the last look"
    model.weight.requires_grad_(False)
    model.bias.grad = torch.ones_like(model.bias)
    optimizer.step()
    assert model.weight.data_ptr() in held and model.weight.data_ptr() not in steady.look(places)[0]
    again = weakref.ref(optimizer)
    del optimizer, model
    gc.collect()
    assert again() is None, "nothing keeps an optimizer alive"
    assert steady.look(places) == (frozenset(), frozenset())


def test_one_optimizer_says_nothing_about_the_weights_of_another() -> None:
    (one, first), (two, second) = build(), build()
    steady, _ = watched(first, second)
    step(one, first)
    found = steady.look()[1]
    assert one.weight.data_ptr() in found
    assert two.weight.data_ptr() not in found


def test_a_capturable_optimizer_may_be_replayed_without_hooks_so_nothing_is_steady() -> None:
    model = nn.Linear(WIDTH, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    steady, waits = watched(optimizer)
    step(model, optimizer)
    optimizer.param_groups[0]["capturable"] = True
    assert not steady.look()[1]
    assert waits


def test_a_compiled_step_is_waited_for_or_makes_nothing_steady() -> None:
    model, optimizer = build()
    steady, waits = watched(optimizer)
    compiled = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        model(torch.randn(2, WIDTH)).sum().backward()
        before = len(waits)
        compiled()
        if steady.look()[1]:
            assert len(waits) > before


def test_a_wrapper_without_hooks_is_left_alone() -> None:
    class Wrapper(torch.optim.Optimizer):
        """As some libraries do it: the class of an optimizer, without its constructor."""

        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner

        @property
        def param_groups(self) -> list[dict[str, object]]:  # type: ignore[override]
            return self.inner.param_groups

    _, optimizer = build()
    steady, _ = watched(Wrapper(optimizer))
    assert not steady.look()[1]


def test_a_wrapper_with_some_of_the_hooks_is_left_alone() -> None:
    class Lookahead(torch.optim.Optimizer):
        """Makes the hooks of its step by itself, and none of loading."""

        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self._optimizer_step_pre_hooks: OrderedDict[int, Any] = OrderedDict()  # type: ignore[assignment]
            self.param_groups = inner.param_groups

    _, optimizer = build()
    steady, _ = watched(Lookahead(optimizer))
    assert not steady.look()[1]


def test_hooks_do_not_travel_with_copies_and_go_with_close() -> None:
    model, optimizer = build()
    steady, waits = watched(optimizer)
    twin_model = copy.deepcopy(model)
    twin = torch.optim.AdamW(twin_model.parameters(), lr=0.1)
    twin.load_state_dict(optimizer.state_dict())
    step(twin_model, twin)
    assert not waits
    steady.close()
    step(model, optimizer)
    assert not waits
    assert not optimizer._optimizer_step_pre_hooks


def test_an_optimizer_whose_step_was_captured_is_never_steady_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build()
    steady, waits = watched(optimizer)
    step(model, optimizer)
    steady.look()
    waits.clear()
    with monkeypatch.context() as patch:
        patch.setattr(steady_module, "_captures", lambda: True)
        step(model, optimizer)
    assert not waits, "nothing may be waited for while a graph is captured"
    step(model, optimizer)
    held, found = steady.look()
    assert model.weight.data_ptr() in held
    assert not found
