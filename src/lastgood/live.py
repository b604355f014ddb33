"""Restored state into live objects, where their own ways of taking it lose something or do not fit."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lastgood.composed import is_composed, plain_parts, take_apart
from lastgood.state import matches, memory_key


def uncast(saved: Any, cast: Any) -> Any:
    """State of an optimizer as it was saved, on the device to which torch has put it.

    torch casts floating state to the type of its parameter, which loses bits of float32 moments of a bfloat16 model,
    and it rebuilds whatever can be iterated, which garbles strings.
    """
    if isinstance(saved, torch.Tensor) and isinstance(cast, torch.Tensor):
        return cast if cast.dtype == saved.dtype else saved.to(cast.device)
    if type(saved) is dict and type(cast) is dict:
        # In place: torch's dict is the one that the optimizer holds, and may have got keys of a newer version.
        cast.update({key: uncast(item, cast.get(key)) for key, item in saved.items()})
        return cast
    if type(saved) in (list, tuple) and type(saved) is type(cast) and len(saved) == len(cast):
        return type(saved)(uncast(item, other) for item, other in zip(saved, cast, strict=True))
    return cast if type(saved) in (int, float, bool, type(None)) else saved


def keep_left_out(present: Any, saved: Any, path: str, patterns: Sequence[str]) -> Any:
    """`saved`, with the present values of what was left out of the saving."""
    if not patterns:
        return saved
    if isinstance(present, dict) and isinstance(saved, dict):
        for key, item in present.items():
            if matches(f"{path}.{key}", patterns):
                saved[key] = item
            elif key in saved:
                saved[key] = keep_left_out(item, saved[key], f"{path}.{key}", patterns)
    elif type(present) in (list, tuple) and type(saved) is type(present):
        return type(saved)(
            item
            if i >= len(present)
            else present[i]
            if matches(f"{path}[{i}]", patterns)
            else keep_left_out(present[i], item, f"{path}[{i}]", patterns)
            for i, item in enumerate(saved)
        )
    return saved


def is_value(key: str, item: Any) -> bool:
    """Whether an item of a state_dict is a value, to be set as a whole; extra state may be a tensor of any size."""
    return not isinstance(item, torch.Tensor) or key.rpartition(".")[2] == "_extra_state"


def is_plain(module: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether every tensor of the state_dict is the memory of a parameter or buffer, and nothing wants to hear."""
    tensors = [*module.parameters(), *module.buffers()]
    owned = {_address(part) for tensor in tensors for part in plain_parts(tensor)} | {None}
    for tensor in state.values():
        if not isinstance(tensor, torch.Tensor):
            return False
        if any(part.numel() and _address(part) not in owned for part in plain_parts(tensor)):
            return False
    for child in module.modules():
        hooks = getattr(child, "_load_state_dict_pre_hooks", None), getattr(child, "_load_state_dict_post_hooks", None)
        overrides = any(
            getattr(type(child), method) is not getattr(nn.Module, method)
            for method in ("load_state_dict", "_load_from_state_dict")
        )
        # torch's own override it for old versions of their state only.
        if any(hooks) or (overrides and not type(child).__module__.startswith("torch.nn.modules.")):
            return False
    return True


def _address(tensor: torch.Tensor) -> int | None:
    """Where a tensor's memory begins; None for kinds of tensors that have no single memory."""
    plain = tensor.layout is torch.strided and not tensor.is_nested and type(tensor).__name__ != "DTensor"
    return tensor.data_ptr() if plain else None


def into_value(value: Any, saved: Any, taken: set[Any], top: bool = True) -> Any:
    """A restored plain value. Containers and tensors are changed in place, so that all who hold them see it.

    Args:
        value: the present value.
        saved: the restored one.
        taken: what was changed so far: an object that is in two places now, but was saved as two, takes one of them.
    """
    if value is saved:
        if isinstance(value, torch.Tensor) and _address(value) is not None:
            taken.add(memory_key(value))
        return value
    if is_composed(type(value)) and type(value) is type(saved):
        ours, theirs = list(plain_parts(value)), list(plain_parts(saved))
        alike = take_apart(value)[1] == take_apart(saved)[1] and [(part.dtype, part.shape) for part in ours] == [
            (part.dtype, part.shape) for part in theirs
        ]
        if not alike:
            return saved
        put = [into_value(part, new, taken, top) for part, new in zip(ours, theirs, strict=True)]
        return value if all(one is part for one, part in zip(put, ours, strict=True)) else saved
    if isinstance(value, torch.Tensor) and isinstance(saved, torch.Tensor):
        key = memory_key(value)
        if key == memory_key(saved):
            taken.add(key)
            return value  # It was read into.
        expanded = any(stride == 0 for stride in value.stride())
        if not top or expanded or key in taken or (value.dtype, value.shape) != (saved.dtype, saved.shape):
            return saved
        taken.add(key)
        with torch.no_grad():
            value.copy_(saved)
        return value
    if type(value) is not type(saved) or id(value) in taken:
        return saved
    if isinstance(value, dict | list | set | bytearray) or (
        isinstance(value, collections.deque) and value.maxlen == saved.maxlen
    ):
        taken.add(id(value))
    if isinstance(value, dict):
        items = {key: into_value(value.get(key), item, taken, False) for key, item in saved.items()}
        value.clear()
        for key, item in items.items():
            value[key] = item
    elif isinstance(value, list):
        here = [*value, *[None] * len(saved)]
        value[:] = [into_value(old, item, taken, False) for old, item in zip(here, saved, strict=False)]
    elif isinstance(value, set):
        value.clear()
        value.update(saved)
    elif isinstance(value, bytearray):
        value[:] = saved
    elif isinstance(value, collections.deque) and value.maxlen == saved.maxlen:
        value.clear()
        value.extend(saved)
    elif type(value).__name__ == "ndarray" and (value.dtype, value.shape) == (saved.dtype, saved.shape):
        if not value.flags.writeable:
            return saved
        value[...] = saved
    else:
        return saved
    return value
