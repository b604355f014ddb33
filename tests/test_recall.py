"""What is recalled of a state's structure is what would be worked out anew, whatever happened since the last save."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lastgood import Checkpointer, plan
from lastgood.state import Flattener, State
from roundtrip import hook_state_dict


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.second(self.first(x)))
        return result


def job() -> dict[str, Any]:
    torch.manual_seed(1)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    # Its step counters are numbers.
    other = torch.optim.Rprop(net.parameters(), lr=0.1)
    objects = {"ema": {"w": torch.ones(3)}, "net": net, "optimizer": optimizer, "other": other, "epoch": 3}
    train(objects)
    return objects


def train(objects: dict[str, Any]) -> None:
    objects["net"](torch.randn(4, 6)).sum().backward()
    for name in ("optimizer", "other"):
        objects[name].step()


def described(state: State) -> Any:
    tensors = [
        (name, t.tensor.data_ptr(), t.tensor.shape, t.tensor.dtype, t.tensor.stride(), t.placement, t.shape, t.offsets)
        for name, t in state.tensors.items()
    ]
    for name, part in state.tensors.items():
        source = state.sources[state.index[name]]
        assert (source.data_ptr(), source.shape) == (part.tensor.data_ptr(), part.tensor.shape), name
    return tensors, state.objects, state.kinds


def recalls(flattener: Flattener) -> bool:
    memory = flattener._memory
    return memory is not None and flattener.flatten() is not None and flattener._memory is memory


def test_the_structure_is_recalled_and_the_values_are_new() -> None:
    objects = job()
    flattener = Flattener(objects, world_size=1)
    before = flattener.flatten()
    train(objects)
    objects["optimizer"].param_groups[0]["lr"] = 0.5
    assert recalls(flattener)
    again = flattener.flatten()
    assert again.objects["optimizer"]["groups"][0]["options"]["lr"] == 0.5
    assert again.objects["optimizer"] != before.objects["optimizer"]
    assert described(again) == described(Flattener(objects, world_size=1).flatten())


def test_numbers_that_an_optimizer_keeps_for_each_parameter_are_those_of_now() -> None:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for parameter in net.parameters():
        optimizer.state[parameter] = {"count": 1, "average": torch.zeros(2), "best": float("inf")}
    flattener = Flattener({"net": net, "optimizer": optimizer}, world_size=1)
    flattener.flatten()
    for number, parameter in enumerate(net.parameters()):
        optimizer.state[parameter]["count"] = 7 + number
    assert recalls(flattener)
    tree = flattener.flatten().objects["optimizer"]["state"]
    assert [held["count"] for held in tree.values()] == [7, 8]
    assert (
        flattener.flatten().objects == Flattener({"net": net, "optimizer": optimizer}, world_size=1).flatten().objects
    )


def tie(objects: dict[str, Any]) -> None:
    objects["net"].second.weight = objects["net"].first.weight


def tie_by_data(objects: dict[str, Any]) -> None:
    objects["net"].second.weight.data = objects["net"].first.weight.data


def transpose(objects: dict[str, Any]) -> None:
    objects["net"].first.weight.data = objects["net"].first.weight.data.t()


def convert(objects: dict[str, Any]) -> None:
    objects["net"].first.weight.data = objects["net"].first.weight.data.to(torch.bfloat16)


def reshape(objects: dict[str, Any]) -> None:
    objects["net"].average.data = objects["net"].average.data.view(2, 3)


def swap(objects: dict[str, Any]) -> None:
    net = objects["net"]
    net.first.weight, net.second.weight = net.second.weight, net.first.weight


def replace_buffer(objects: dict[str, Any]) -> None:
    objects["net"].average = objects["net"].average + 1


def add_module(objects: dict[str, Any]) -> None:
    objects["net"].third = nn.Linear(2, 2)
    objects["optimizer"].add_param_group({"params": list(objects["net"].third.parameters())})


def remove_state(objects: dict[str, Any]) -> None:
    optimizer = objects["optimizer"]
    del optimizer.state[next(iter(optimizer.state))]


def change_state_type(objects: dict[str, Any]) -> None:
    for held in objects["optimizer"].state.values():
        held["step"] = int(held["step"])


def reorder_groups(objects: dict[str, Any]) -> None:
    objects["optimizer"].param_groups[0]["params"].reverse()


def tensor_rate(objects: dict[str, Any]) -> None:
    objects["optimizer"].param_groups[0]["lr"] = torch.tensor(0.25)


def empty(objects: dict[str, Any]) -> None:
    objects["net"].average = torch.empty(0)


def hook(objects: dict[str, Any]) -> None:
    hook_state_dict(
        objects["net"], lambda module, state, prefix, metadata: state.update({"first.bias": state["second.bias"]})
    )


def hook_before(objects: dict[str, Any]) -> None:
    late = torch.ones(2)
    objects["net"].first.register_state_dict_pre_hook(
        lambda module, prefix, keep_vars: module.register_buffer("late", late)
    )


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"more": 5}


class Renaming(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix + "inner.", keep_vars)


class Slim(nn.Linear):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        del state[kwargs["prefix"] + "bias"]
        return state


def extra_state(objects: dict[str, Any]) -> None:
    objects["net"].first.__class__ = Extra


def other_names(objects: dict[str, Any]) -> None:
    objects["net"].first.__class__ = Renaming


def other_state_dict(objects: dict[str, Any]) -> None:
    objects["net"].first.__class__ = Slim


def one_with_a_state_dict_of_its_own(objects: dict[str, Any]) -> None:
    net = objects["net"]
    net.state_dict = lambda: {"average": net.average}


def not_persistent(objects: dict[str, Any]) -> None:
    objects["net"]._non_persistent_buffers_set.add("average")


def no_bias(objects: dict[str, Any]) -> None:
    objects["net"].second.bias = None


def no_module(objects: dict[str, Any]) -> None:
    objects["net"].second = None


def other_order(objects: dict[str, Any]) -> None:
    modules = objects["net"]._modules
    modules["first"] = modules.pop("first")


def other_name(objects: dict[str, Any]) -> None:
    modules = objects["net"]._modules
    modules["third"] = modules.pop("norm")


def one_module_twice(objects: dict[str, Any]) -> None:
    objects["net"].second = objects["net"].first


def module_moves_in(objects: dict[str, Any]) -> None:
    objects["net"].first.add_module("norm", objects["net"].norm)
    del objects["net"].norm


def parameter_becomes_a_buffer(objects: dict[str, Any]) -> None:
    linear = objects["net"].first
    weight = linear.weight
    del linear.weight
    linear.register_buffer("weight", weight.detach())


def optimizer_hook(objects: dict[str, Any]) -> None:
    objects["optimizer"].register_state_dict_post_hook(lambda optimizer, state: state["state"].pop(0) and None)


class Counting(torch.optim.AdamW):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": 3}


def optimizer_with_more(objects: dict[str, Any]) -> None:
    objects["optimizer"].__class__ = Counting


def state_of_the_optimizer_itself(objects: dict[str, Any]) -> None:
    objects["optimizer"].state["all"] = {"seen": 4}


def other_groups(objects: dict[str, Any]) -> None:
    groups = objects["optimizer"].param_groups
    groups.append({**groups[0], "params": [groups[0]["params"].pop()]})


CHANGES = [tie, tie_by_data, transpose, convert, reshape, swap, replace_buffer, add_module, remove_state]
CHANGES += [change_state_type, reorder_groups, tensor_rate, empty, hook]
CHANGES += [hook_before, extra_state, other_names, other_state_dict, one_with_a_state_dict_of_its_own, not_persistent]
CHANGES += [no_bias, no_module, other_order, other_name, one_module_twice, module_moves_in, parameter_becomes_a_buffer]
CHANGES += [optimizer_hook, optimizer_with_more, state_of_the_optimizer_itself, other_groups]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_state_that_changed_is_worked_out_anew(change: Callable[[dict[str, Any]], None]) -> None:
    objects = job()
    flattener = Flattener(objects, world_size=1)
    flattener.flatten()
    assert recalls(flattener), "the test would show nothing"
    change(objects)
    for _ in range(2):
        assert described(flattener.flatten()) == described(Flattener(objects, world_size=1).flatten())


def test_a_tensor_at_another_place_keeps_its_name_and_what_is_tied_is_found() -> None:
    objects = job()
    flattener = Flattener(objects, world_size=1)
    flattener.flatten()
    replace_buffer(objects)
    assert recalls(flattener)
    objects["ema"]["w"] = objects["net"].average
    state = flattener.flatten()
    assert state.objects["ema"]["w"] == state.objects["net"]["state"]["average"]
    assert described(state) == described(Flattener(objects, world_size=1).flatten())


def test_nothing_that_was_replaced_is_kept_alive(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    objects = {"net": net, "optimizer": optimizer}
    with Checkpointer(tmp_path / "run", **objects) as ckpt:
        ckpt.restore()
        for step in (1, 2, 3):
            net(torch.randn(4, 6)).sum().backward()
            optimizer.step()
            ckpt.save(step, blocking=True)
        ckpt._finish_save()
        gone = weakref.ref(net.average)
        net.average = torch.ones(6)
        gc.collect()
        assert gone() is None


def test_a_transposed_view_is_not_tied_to_what_it_was_equal_to() -> None:
    objects = job()
    tie_by_data(objects)
    flattener = Flattener(objects, world_size=1)
    assert flattener.flatten().objects["net"]["state"]["second.weight"]["v"] == "net.first.weight"
    assert recalls(flattener)
    objects["net"].second.weight.data = objects["net"].first.weight.data.t()
    state = flattener.flatten()
    assert state.objects["net"]["state"]["second.weight"]["v"] == "net.second.weight"
    assert described(state) == described(Flattener(objects, world_size=1).flatten())


def test_the_parameters_of_an_optimizer_without_state_change_places() -> None:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    objects = {"net": net, "optimizer": optimizer}
    flattener = Flattener(objects, world_size=1)
    flattener.flatten()
    assert recalls(flattener)
    optimizer.param_groups[0]["params"].reverse()
    groups = flattener.flatten().objects["optimizer"]["groups"]
    assert groups[0]["params"] == ["net.bias", "net.weight"]


def test_a_number_and_a_tensor_change_places() -> None:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    objects = {"net": net, "optimizer": optimizer}
    optimizer.state[net.weight] = {"a": 1, "b": torch.ones(2)}
    flattener = Flattener(objects, world_size=1)
    flattener.flatten()
    assert recalls(flattener)
    optimizer.state[net.weight] = {"a": torch.ones(2), "b": 1}
    assert described(flattener.flatten()) == described(Flattener(objects, world_size=1).flatten())


def test_hooks_of_a_module_get_what_state_dict_gives_them(tmp_path: Path) -> None:
    """Tensors that need no gradient: some make arrays of them."""
    net = Net()
    seen: list[float] = []
    hook_state_dict(
        net, lambda module, state, prefix, metadata: seen.append(float(state["first.weight"].numpy().sum()))
    )
    with Checkpointer(tmp_path / "run", net=net) as ckpt:
        ckpt.save(1, blocking=True)
        ckpt.save(2, blocking=True)
    assert seen


def test_what_else_an_optimizer_gives_is_saved() -> None:
    objects = job()
    flattener = Flattener(objects, world_size=1)
    flattener.flatten()
    state_of_the_optimizer_itself(objects)
    assert flattener.flatten().objects["optimizer"]["shared"] == {"all": {"seen": 4}}
    objects = job()
    flattener = Flattener(objects, world_size=1)
    flattener.flatten()
    optimizer_with_more(objects)
    assert flattener.flatten().objects["optimizer"]["extra"] == {"count": 3}


class Slots(nn.Module):
    """With places of which some are empty."""

    def __init__(self) -> None:
        super().__init__()
        self.register_module("a", nn.Linear(2, 2))
        self.register_module("b", None)
        self.register_buffer("c", torch.zeros(2))
        self.register_buffer("d", None)
        self.register_buffer("e", torch.zeros(2))
        self.register_buffer("f", torch.zeros(2), persistent=False)


def swap_modules(slots: Any) -> None:
    slots.a, slots.b = None, slots.a


def swap_buffers(slots: Any) -> None:
    slots.c, slots.d = None, slots.c


def swap_persistence(slots: Any) -> None:
    slots._non_persistent_buffers_set.remove("f")
    slots._non_persistent_buffers_set.add("e")


@pytest.mark.parametrize("change", [swap_modules, swap_buffers, swap_persistence], ids=lambda change: change.__name__)
def test_an_empty_place_and_a_full_one_change_places(change: Callable[[Any], None]) -> None:
    slots = Slots()
    flattener = Flattener({"slots": slots}, world_size=1)
    flattener.flatten()
    assert recalls(flattener)
    change(slots)
    assert list(flattener.flatten().objects["slots"]["state"]) == list(slots.state_dict())


def test_a_plain_module_and_optimizer_are_not_asked_for_their_state_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be made only to be looked at."""
    objects = job()
    flattener = Flattener(objects, world_size=1)
    flattener.flatten()
    asked: list[str] = []
    # As a profiler sees them: the methods are the same.
    sys.setprofile(lambda frame, event, arg: asked.append(frame.f_code.co_name) if event == "call" else None)
    try:
        flattener.flatten()
    finally:
        sys.setprofile(None)
    assert "look" in asked
    assert "state_dict" not in asked


def test_a_model_that_changes_its_type_after_the_save_was_saved_as_it_was() -> None:
    """The ranks compare what they have in the background, when training may have gone on."""
    objects = job()
    flattener = Flattener(objects, world_size=2, replicated=["net.*"])
    flattener.flatten()
    assert recalls(flattener)
    for part in ({}, {"ema": objects.pop("ema")}):
        objects |= part
        flattener.flatten()
        before, later = plan.structure(flattener.flatten().tensors), flattener.flatten()
        objects["net"].to(torch.bfloat16)
        assert plan.structure(later.tensors) == before
        assert plan.structure(flattener.flatten().tensors) != before
        objects["net"].float()


def test_a_scripted_module_is_saved(tmp_path: Path) -> None:
    net = torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3))
    wanted = [parameter.detach().clone() for parameter in net.parameters()]
    with Checkpointer(tmp_path / "run", net=net) as ckpt:
        ckpt.save(1, blocking=True)
        ckpt.save(2, blocking=True)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        ckpt.restore()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), wanted, strict=True))
