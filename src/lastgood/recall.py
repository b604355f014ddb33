"""Modules and optimizers whose structure is what it was at the last save: their names and placements are not worked out
again.

A state of thousands of tensors is mostly the same tensors at the same places with other values. What shows that is
compared in a few passes that run in C; only when all of it is equal is what was found before used again. Nothing here
keeps a tensor alive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from lastgood import values
from lastgood.placement import LocalTensor, Placement
from lastgood.values import Json

_TENSORS = {torch.Tensor, nn.Parameter}
_NUMBERS = {int, float, bool, type(None)}
_ADDRESS, _STRIDE = torch.Tensor.data_ptr, torch.Tensor.stride
_SHAPE, _DTYPE, _DEVICE = attrgetter("shape"), attrgetter("dtype"), attrgetter("device")
_LAYOUT, _NESTED = attrgetter("layout"), attrgetter("is_nested")


class Given:
    """What a module or an optimizer gives of itself.

    Args:
        name: under which it is registered.
        owner: the object, without its wrappers.
    """

    def __init__(self, name: str, owner: nn.Module | torch.optim.Optimizer) -> None:
        self.name, self.owner = name, owner
        self.view = _view_module(owner) if isinstance(owner, nn.Module) else _view_optimizer(owner)
        """None where only its ``state_dict`` can tell what it saves."""
        self._state: Any = None if self.view else owner.state_dict()

    @property
    def state(self) -> Any:
        """Its ``state_dict``."""
        if self._state is None:
            self._state = self.owner.state_dict()
        return self._state

    def held(self) -> list[Any]:
        """Of an optimizer: what it keeps for each parameter."""
        assert isinstance(self.owner, torch.optim.Optimizer)
        return list((self.owner.state if self.view else self.state["state"]).values())

    def beside(self, count: int) -> tuple[dict[Any, Any], list[tuple[dict[str, Any], Sequence[int]]], dict[str, Any]]:
        """Of an optimizer with so many parameters: what it holds beside the state of each of them.

        Returns:
            State of its own, which some keep under keys of any kind; the options of every group of parameters and
            which parameters are in it; and what else is in its ``state_dict``.
        """
        assert isinstance(self.owner, torch.optim.Optimizer)
        if self.view is not None:
            groups: list[tuple[dict[str, Any], Sequence[int]]] = []
            at = 0
            for group in self.owner.param_groups:
                groups.append((_options(group), range(at, at + len(group["params"]))))
                at += len(group["params"])
            return {}, groups, {}
        state = self.state
        shared = {key: held for key, held in state["state"].items() if type(key) is not int or key >= count}
        extra = {key: item for key, item in state.items() if key not in ("state", "param_groups")}
        return shared, [(_options(group), group["params"]) for group in state["param_groups"]], extra


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: option for key, option in group.items() if key != "params"}


@dataclass(slots=True)
class View:
    """What an object's ``state_dict`` would give, seen without making it."""

    signs: list[Any]
    """What the names in it follow from."""
    items: list[Any]
    """All that it holds, in order."""

    def shows(self, state: Any, owner: object) -> bool:
        """Whether the ``state_dict`` holds the same."""
        if not isinstance(owner, nn.Module) and set(state) != {"state", "param_groups"}:
            return False
        mapping = {"": state} if isinstance(owner, nn.Module) else state["state"]
        items = [item for held in mapping.values() for item in held.values()]
        return len(items) == len(self.items) and all(map(_same, items, self.items))


def _same(one: Any, other: Any) -> bool:
    if type(one) in _TENSORS and type(other) in _TENSORS:
        forms = [(t.data_ptr(), t.storage_offset(), t.shape, t.dtype) for t in (one, other)]
        return forms[0] == forms[1]
    return one is other


_METHODS: dict[type, tuple[str, ...]] = {
    nn.Module: ("state_dict", "_save_to_state_dict", "get_extra_state"),
    torch.optim.Optimizer: ("state_dict",),
}
_PLAIN = {
    base: [method for name in names if (method := getattr(base, name)).__module__ == base.__module__]
    for base, names in _METHODS.items()
}
# As they are when this is imported. Where somebody had replaced one for everybody before, the list equals none.


def _is_plain(kind: type, base: type) -> bool:
    """Whether a class saves what torch's own class saves."""
    return [getattr(kind, name) for name in _METHODS[base]] == _PLAIN[base]


def _view_module(module: nn.Module) -> View | None:
    signs: list[Any] = []
    items: list[Any] = []
    held: list[int] = []
    plain: dict[type, bool] = {}
    stack: list[nn.Module] = [module]
    while stack:
        one = stack.pop()
        kind, own = type(one), one.__dict__
        if kind not in plain:
            # A scripted one keeps nothing in its __dict__.
            plain[kind] = _is_plain(kind, nn.Module) and "_parameters" in own
        if not plain[kind] or own["_state_dict_hooks"] or own["_state_dict_pre_hooks"] or "state_dict" in own:
            return None
        parameters, buffers, children = own["_parameters"], own["_buffers"], own["_modules"]
        signs += (kind, *parameters, 1, *buffers, 2, *children)
        if parameters:
            items += parameters.values()
            held += map(id, parameters.values())
        if buffers:
            passing = own["_non_persistent_buffers_set"]
            items += [buffer for name, buffer in buffers.items() if name not in passing]
            if passing:
                signs.append(frozenset(passing))
        if children:
            below = list(children.values())
            if None in below:
                signs.append([child is None for child in below])
            stack += [child for child in reversed(below) if child is not None]
    # Which parameters are an optimizer's; and which of all are there.
    signs += (held, [item is None for item in items])
    return View(signs, [item for item in items if item is not None])


def _view_optimizer(optimizer: torch.optim.Optimizer) -> View | None:
    own = optimizer.__dict__
    hooks = own.get("_optimizer_state_dict_pre_hooks"), own.get("_optimizer_state_dict_post_hooks")
    if not _is_plain(type(optimizer), torch.optim.Optimizer) or any(hooks) or "state_dict" in own:
        return None
    keys, held = list(optimizer.state), list(optimizer.state.values())
    parameters = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if not set(map(type, held)) <= {dict} or not set(map(id, keys)) <= set(parameters):
        return None
    if len(set(parameters)) != len(parameters):
        return None
    signs = [list(map(id, keys)), list(map(tuple, held)), parameters]
    return View(signs, [item for one in held for item in one.values()])


@dataclass(slots=True)
class Sight:
    """All of what names and placements follow from, and the tensors that were looked at, in order."""

    signs: list[Any]
    tensors: list[torch.Tensor]
    addresses: list[int]


@dataclass(slots=True)
class Memory:
    """What was worked out for a sight."""

    signs: list[Any]
    addresses: list[int]
    apart: bool
    """Whether every tensor had an address of its own."""
    trees: dict[str, dict[str, Any]]
    """By object, the tree of its ``state``."""
    labels: dict[str, list[str]]
    """By optimizer, the names of its parameters."""
    seen: dict[int, list[str]]
    """By address, the tensors that begin there."""
    kept: list[tuple[int, str, Placement, tuple[int, ...], tuple[int, ...], str, tuple[int, ...] | None]]
    """Of every tensor that is saved: its place among those of the sight, its name, placement, shape, offsets, type and
    unusual strides.
    """
    index: dict[str, int] = field(init=False)
    """By name, the place of a tensor that is saved among those of the sight."""

    def __post_init__(self) -> None:
        self.index = {name: number for number, name, *_ in self.kept}

    def fits(self, sight: Sight) -> bool:
        """Whether it holds for what is there now. Where tensors moved, which are tied can only be told if none are."""
        if sight.signs != self.signs:
            return False
        if sight.addresses != self.addresses:
            if not (self.apart and _apart(sight.addresses)):
                return False
            names = {index: name for index, name, *_ in self.kept}
            self.seen = {address: [names[index]] for index, address in enumerate(sight.addresses)}
            self.addresses = sight.addresses
        return True

    def tensors(self, sight: Sight) -> dict[str, LocalTensor]:
        """The tensors by name, as they are now."""
        found = sight.tensors
        return {
            name: LocalTensor(found[index], placement, shape, offsets, found[index], dtype, strides=strides)
            for index, name, placement, shape, offsets, dtype, strides in self.kept
        }

    def tree(self, given: Given) -> dict[str, Any]:
        """The tree of the object's ``state``, with the numbers in it as they are now."""
        before = self.trees[given.name]
        if isinstance(given.owner, nn.Module) or all(map(_all_tensors, before.values())):
            return before
        return {
            label: {key: leaf if _is_tensor(leaf) else _number(held[key]) for key, leaf in leaves.items()}
            for (label, leaves), held in zip(before.items(), given.held(), strict=True)
        }


def look(given: Sequence[Given], wrappers: object) -> Sight | None:
    """Look at what the objects gave. None where it holds what only a closer look can tell.

    Args:
        wrappers: what else the placements of tensors follow from.
    """
    signs: list[Any] = [wrappers]
    tensors: list[torch.Tensor] = []
    for one in given:
        if one.view is not None:
            signs += [one.name, one.view.signs]
            items = one.view.items
        elif isinstance(one.owner, nn.Module):
            items = list(one.state.values())
            signs += [one.name, list(one.state), list(map(id, one.owner.parameters()))]
        else:
            held = one.state.get("state")
            if type(held) is not dict or not set(map(type, held.values())) <= {dict}:
                return None
            items = [item for each in held.values() for item in each.values()]
            parameters = [id(parameter) for group in one.owner.param_groups for parameter in group["params"]]
            signs += [one.name, list(held), list(map(tuple, held.values())), parameters]
        types = list(map(type, items))
        kinds = set(types)
        signs.append(types)
        if kinds <= _TENSORS:
            tensors += items
        elif kinds <= _TENSORS | _NUMBERS and not isinstance(one.owner, nn.Module):
            tensors += [item for item, kind in zip(items, types, strict=True) if kind in _TENSORS]
        else:
            return None
    if not set(map(_LAYOUT, tensors)) <= {torch.strided} or any(map(_NESTED, tensors)):
        return None  # It is refused by name, where it is looked at closely.
    for sign in (_SHAPE, _DTYPE, _DEVICE, _STRIDE):
        signs.append(list(map(sign, tensors)))
    return Sight(signs, tensors, list(map(_ADDRESS, tensors)))


def learn(
    sight: Sight,
    given: Sequence[Given],
    trees: Mapping[str, dict[str, Any]],
    labels: dict[str, list[str]],
    seen: Mapping[int, list[str]],
    tensors: Mapping[str, LocalTensor],
) -> Memory | None:
    """Remember what was worked out for a sight. None where the trees do not show what became of every tensor of it."""
    if not all(one.view is None or one.view.shows(one.state, one.owner) for one in given):
        return None
    parameters = {id(item) for one in given if isinstance(one.owner, nn.Module) for item in one.owner.parameters()}
    names: list[str] = []
    for one in given:
        tree = trees[one.name]
        if isinstance(one.owner, nn.Module):
            leaves = list(tree.values())
        else:
            leaves = [leaf for held in tree.values() for leaf in held.values()]
            # The name of a parameter that no module shows could change without a sign.
            if any(id(p) not in parameters for group in one.owner.param_groups for p in group["params"]):
                return None
        names += [leaf["v"] for leaf in leaves if _is_tensor(leaf)]
    if len(names) != len(sight.tensors):
        return None
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        first.setdefault(name, index)
    kept = [
        (index, name, one.placement, one.shape, one.offsets, one.dtype, one.strides)
        for name, index in first.items()
        for one in [tensors[name]]
    ]
    return Memory(sight.signs, sight.addresses, _apart(sight.addresses), dict(trees), labels, dict(seen), kept)


def _apart(addresses: Sequence[int]) -> bool:
    different = set(addresses)
    return len(different) == len(addresses) and 0 not in different


def _is_tensor(leaf: Json) -> bool:
    return type(leaf) is dict and leaf.get("$") == "tensor"


def _all_tensors(leaves: Mapping[str, Json]) -> bool:
    return all(map(_is_tensor, leaves.values()))


def _number(value: float | None) -> Json:
    return values.encode(value, "", _no_tensor)


def _no_tensor(*_: Any) -> Any:
    raise TypeError("a number is no tensor")
