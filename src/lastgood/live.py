"""Restored state into live objects, where their own ways of taking it lose something or do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


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


def is_value(key: str, item: Any) -> bool:
    """Whether an item of a state_dict is a value, to be set as a whole; extra state may be a tensor of any size."""
    return not isinstance(item, torch.Tensor) or key.rpartition(".")[2] == "_extra_state"


def is_plain(module: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether every tensor of the state_dict is the memory of a parameter or buffer, and nothing wants to hear."""
    owned = {t.data_ptr() for t in [*module.parameters(), *module.buffers()] if type(t).__name__ != "DTensor"}
    for tensor in state.values():
        if not isinstance(tensor, torch.Tensor):
            return False
        if type(tensor).__name__ != "DTensor" and tensor.numel() and tensor.data_ptr() not in owned:
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


def into_value(value: Any, saved: Any) -> Any:
    """A restored plain value; dicts, lists and tensors are changed in place, so that all who hold them see it."""
    if type(value) is dict and type(saved) is dict:
        value.clear()
        value.update(saved)
        return value
    if type(value) is list and type(saved) is list:
        value[:] = saved
        return value
    if isinstance(value, torch.Tensor) and isinstance(saved, torch.Tensor):
        with torch.no_grad():
            value.copy_(saved)
        return value
    return saved
