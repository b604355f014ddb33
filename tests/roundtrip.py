"""Save, build everything anew, restore, and compare bit for bit: what the tests of the state have in common."""

from __future__ import annotations

import collections
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lastgood
from lastgood.composed import is_composed, take_apart
from lastgood.generators import is_generator
from lastgood.generators import state_of as state_of_generator
from lastgood.placement import is_dense

Objects = dict[str, Any]


def hook_state_dict(module: nn.Module, hook: Callable[[nn.Module, Objects, str, Any], None]) -> None:
    """What is called `register_state_dict_post_hook` since torch 2.5."""
    getattr(module, "register_state_dict_post_hook", module._register_state_dict_hook)(hook)


def bits(tensor: torch.Tensor) -> bytes:
    """The values of a tensor, whatever its type, strides and device."""
    plain = torch.empty(tensor.shape, dtype=tensor.dtype)
    plain.copy_(tensor.detach())
    return bytes(plain.reshape(-1).view(torch.uint8).tolist())


def difference(one: Any, two: Any, path: str = "") -> str | None:
    """Where two values differ in type or in a bit; None where they do not."""
    if is_composed(type(one)) and type(one) is type(two):
        return difference(take_apart(one), take_apart(two), path)
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.dtype != two.dtype or one.shape != two.shape:
            return f"{path}: {one.dtype} {list(one.shape)} and {two.dtype} {list(two.shape)}"
        if one.stride() != two.stride() and not one.is_sparse and is_dense(one.shape, one.stride()):
            return f"{path}: the strides {one.stride()} and {two.stride()}"
        return None if bits(one) == bits(two) else f"{path}: {one} and {two}"
    if type(one) is not type(two):
        return f"{path}: {type(one)} and {type(two)}"
    if isinstance(one, dict):
        if list(one) != list(two) and not isinstance(one, collections.Counter):
            return f"{path}: the keys {list(one)} and {list(two)}"
        if set(one) != set(two):
            return f"{path}: the keys {set(one)} and {set(two)}"
        return next((d for key in one if (d := difference(one[key], two[key], f"{path}.{key}"))), None)
    if isinstance(one, list | tuple | collections.deque):
        if len(one) != len(two):
            return f"{path}: {len(one)} and {len(two)} items"
        pairs = enumerate(zip(one, two, strict=True))
        return next((d for i, (a, b) in pairs if (d := difference(a, b, f"{path}[{i}]"))), None)
    if isinstance(one, float) and math.isnan(one) and math.isnan(two):
        return None
    if isinstance(one, complex):
        return difference((one.real, one.imag), (two.real, two.imag), path)
    if type(one).__module__ == "numpy":
        same = one.dtype == two.dtype and one.shape == two.shape
        same = same and (one.tobytes() == two.tobytes() or (one.ndim == 0 and one != one and two != two))
        return None if same else f"{path}: {one} and {two}"
    if is_generator(one) and is_generator(two):
        return difference(state_of_generator(one, path), state_of_generator(two, path), path)
    return None if one == two or (repr(one) == repr(two) and hasattr(one, "__dict__")) else f"{path}: {one} and {two}"


def state_of(value: Any) -> Any:
    """What two objects are compared by."""
    if isinstance(value, nn.Module):
        return {"state": dict(value.state_dict()), "buffers": dict(value.named_buffers())}
    return value.state_dict() if hasattr(value, "state_dict") else value


def states(objects: Objects) -> dict[str, Any]:
    return {name: state_of(value) for name, value in objects.items()}


def seed(number: int) -> None:
    random.seed(number)
    torch.manual_seed(number)


def round_trip(
    run: Path,
    build: Callable[[], Objects],
    train: Callable[[Objects], Any] | None = None,
    *,
    steps: int = 3,
    rebuild: Callable[[], Objects] | None = None,
    **arguments: Any,
) -> tuple[Objects, Objects]:
    """Train `steps`, save, train on; build anew, restore, train on as well. Asserts that no bit differs.

    Args:
        build: makes the objects; called under another seed each time, so that nothing is right by chance.
        train: one step, in which it may draw random numbers; its result is compared.
        rebuild: makes the second set of objects, where it is built in another way.
        arguments: of the Checkpointer.
    """
    seed(1)
    first = build()
    for _ in range(steps if train else 0):
        assert train is not None
        train(first)
    with lastgood.Checkpointer(run, **arguments, **first) as saver:
        if saver.restore() == 0:
            saver.save(steps)
    seed(2)
    second = (rebuild or build)()
    before = None if train is None else random.getstate()
    with lastgood.Checkpointer(run, **arguments, **second) as restorer:
        assert restorer.restore() == steps
        second = {name: restorer[name] for name in first}
    assert before is None or before != random.getstate()
    assert (found := difference(states(first), states(second))) is None, found
    if train is not None:
        continue_alike(first, second, train)
    return first, second


def continue_alike(first: Objects, second: Objects, train: Callable[[Objects], Any], steps: int = 3) -> None:
    """Train both on from the same random state and compare every result and the end."""
    start, torch_start = random.getstate(), torch.get_rng_state()
    ours = [train(first) for _ in range(steps)]
    random.setstate(start)
    torch.set_rng_state(torch_start)
    theirs = [train(second) for _ in range(steps)]
    assert (found := difference(ours, theirs)) is None, found
    assert (found := difference(states(first), states(second))) is None, found
