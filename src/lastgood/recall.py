"""Modules and optimizers whose structure is what it was at the last save: their names and placements are not worked out
again.

A state of thousands of tensors is mostly the same tensors at the same places with other values. What shows that is
compared in a few passes that run in C; only when all of it is equal is what was found before used again. Nothing here
keeps a tensor alive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(slots=True)
class Given:
    """What a module or an optimizer gave of itself."""

    name: str
    owner: nn.Module | torch.optim.Optimizer
    """Without its wrappers."""
    state: Any
    """Its ``state_dict``."""

    def items(self) -> list[Any]:
        """All that it holds, in order."""
        if isinstance(self.owner, nn.Module):
            return list(self.state.values())
        return [item for held in self.state["state"].values() for item in held.values()]


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
    kept: list[tuple[int, str, Placement, tuple[int, ...], tuple[int, ...]]]
    """Of every tensor that is saved: its place among those of the sight, its name, placement, shape and offsets."""

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
            name: LocalTensor(found[index], placement, shape, offsets, found[index])
            for index, name, placement, shape, offsets in self.kept
        }

    def tree(self, given: Given) -> dict[str, Any]:
        """The tree of the object's ``state``, with the numbers in it as they are now."""
        before = self.trees[given.name]
        if isinstance(given.owner, nn.Module) or all(map(_all_tensors, before.values())):
            return before
        return {
            label: {key: leaf if _is_tensor(leaf) else _number(held[key]) for key, leaf in leaves.items()}
            for (label, leaves), held in zip(before.items(), given.state["state"].values(), strict=True)
        }


def look(given: Sequence[Given], wrappers: object) -> Sight | None:
    """Look at what the objects gave. None where it holds what only a closer look can tell.

    Args:
        wrappers: what else the placements of tensors follow from.
    """
    signs: list[Any] = [wrappers]
    tensors: list[torch.Tensor] = []
    for one in given:
        if isinstance(one.owner, nn.Module):
            items = one.items()
            signs += [one.name, list(one.state), list(map(id, one.owner.parameters()))]
        else:
            held = one.state.get("state")
            if type(held) is not dict or not set(map(type, held.values())) <= {dict}:
                return None
            items = one.items()
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
        (index, name, tensors[name].placement, tensors[name].shape, tensors[name].offsets)
        for name, index in first.items()
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
