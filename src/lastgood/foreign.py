"""State dicts that other programs saved, put in the place of the objects that they are the state of.

A checkpoint knows an optimizer's state by the names of its parameters, while ``Optimizer.state_dict()`` numbers them.
The numbers count the model's parameters in order, so the names are found again, and every shape is compared.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lastgood.errors import LastGoodError

_WRAPPERS = ("module.", "_orig_mod.")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""Names of the buffers that torch's own layers have."""


@dataclass(slots=True)
class Foreign:
    """A part of a foreign checkpoint."""

    kind: str
    """module, optimizer, stateful, value"""
    value: Any

    @classmethod
    def of(cls, name: str, value: Any, kind: str | None = None) -> Foreign:
        """Take `value` for the state of an object of `kind`, by default of the kind that it looks like.

        Raises:
            LastGoodError: it has not the form of that kind.
        """
        seen = _looks_like(value)
        kind = kind or seen
        if kind in ("module", "optimizer") and kind != seen:
            raise LastGoodError(f"{name} is no state dict of a {kind}: it looks like a {seen}")
        if kind == "stateful" and not isinstance(value, dict):
            raise LastGoodError(f"{name} is a {type(value).__name__}: what load_state_dict takes is a dict")
        return cls(kind, value)

    def tensor_count(self) -> int:
        return sum(1 for _ in _tensors(self.value))


def _looks_like(value: Any) -> str:
    if isinstance(value, Mapping):
        if value and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items()):
            return "module"
        if {"state", "param_groups"} <= value.keys():
            return "optimizer"
        return "stateful"
    return "value"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def at_key(content: Any, key: str, path: Path) -> Any:
    """What `content` holds under `key`; dots lead into nested dicts, unless the key itself has them.

    Raises:
        LastGoodError: there is no such key.
    """
    if isinstance(content, Mapping):
        if key in content:
            return content[key]
        first, dot, rest = key.partition(".")
        if dot and first in content:
            return at_key(content[first], rest, path)
    raise LastGoodError(f"{path} has nothing under {key!r}; it holds {_keys(content)}")


def whole(content: Any, path: Path) -> Any:
    """`content` where it is a state dict of a model.

    Raises:
        LastGoodError: it is something else; the message shows how to map it.
    """
    if _looks_like(content) == "module":
        return content
    hint = ""
    if isinstance(content, Mapping):
        models = [key for key, item in content.items() if _looks_like(item) == "module"]
        others = [key for key, item in content.items() if _looks_like(item) == "optimizer"]
        parts = [f"--map model={key}" for key in models[:1]] + [f"--map optimizer={key}" for key in others[:1]]
        hint = f" Say what becomes what, for example: {' '.join(parts)}." if parts else ""
    raise LastGoodError(f"{path} is no plain state dict: it holds {_keys(content)}.{hint}")


def _keys(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names = [repr(key) for key in content]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def objects(found: Mapping[str, Foreign]) -> tuple[dict[str, Any], list[str]]:
    """Objects whose state is what was found, to be saved, and remarks on what was changed.

    Raises:
        LastGoodError: an optimizer's state does not fit the model's parameters.
    """
    result: dict[str, Any] = {}
    remarks: list[str] = []
    for name, part in found.items():
        if part.kind == "module":
            state, wrappers = _unwrapped(part.value)
            if wrappers:
                remarks.append(f"{name}: the wrapper's {wrappers!r} was left out of the names")
            result[name] = _Module(state)
        elif part.kind == "stateful":
            result[name] = _Stateful(part.value)
        elif part.kind == "value":
            result[name] = part.value
    for name, part in found.items():
        if part.kind == "optimizer":
            modules = {key: item for key, item in result.items() if isinstance(item, _Module)}
            result[name] = _optimizer(name, part.value, modules)
    return {name: result[name] for name in found}, remarks


def _unwrapped(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """The state dict without the prefixes that DDP and ``torch.compile`` put before every name."""
    taken = ""
    plain = dict(state)
    while True:
        prefix = next((p for p in _WRAPPERS if all(key.startswith(p) for key in plain)), None)
        if prefix is None:
            return plain, taken
        plain = {key[len(prefix) :]: tensor for key, tensor in plain.items()}
        taken += prefix


class _Module(nn.Module):
    """A module of which only the state is known."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._state = state
        self._named: dict[str, nn.Parameter] = {}
        seen = set()
        for key, tensor in state.items():
            # A tied parameter has one number in an optimizer, that of its first name.
            if key.rpartition(".")[2] not in _BUFFERS and tensor.data_ptr() not in seen:
                self._named[key] = nn.Parameter(tensor, requires_grad=False)
            if tensor.numel():
                seen.add(tensor.data_ptr())

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return dict(self._state)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._named.items()


class _Stateful:
    """Something of which only the state is known."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise LastGoodError("what is imported cannot be restored into")


class _Optimizer(torch.optim.Optimizer):
    """An optimizer of which only the state is known."""

    def __init__(self, groups: list[dict[str, Any]], state: dict[str, Any]) -> None:
        super().__init__(groups, {})
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state


def _optimizer(name: str, state: dict[str, Any], modules: Mapping[str, _Module]) -> _Optimizer:
    parameters = [(f"{m}.{key}", p) for m, module in modules.items() for key, p in module.named_parameters()]
    try:
        numbers = [number for group in state["param_groups"] for number in group["params"]]
    except (TypeError, KeyError) as error:
        raise LastGoodError(f"{name} is no state dict of an optimizer: {error!r}") from error
    advice = "Import the weights without it: training then begins with a fresh optimizer."
    if numbers != list(range(len(parameters))):
        raise LastGoodError(
            f"{name} has {len(numbers)} parameters, and the imported models have {len(parameters)} in the same order: "
            f"which is which cannot be known. {advice}"
        )
    for number, held in state["state"].items():
        label, parameter = parameters[number]
        for key, item in held.items() if isinstance(held, Mapping) else ():
            if isinstance(item, torch.Tensor) and item.ndim and item.shape != parameter.shape:
                raise LastGoodError(
                    f"{name}: {key} of parameter {number} is {list(item.shape)}, and {label} is "
                    f"{list(parameter.shape)}: its parameters are not those of the imported models, or in another "
                    f"order. {advice}"
                )
    groups = [{"params": [parameters[number][1] for number in group["params"]]} for group in state["param_groups"]]
    return _Optimizer(groups, state)


def seed() -> None:
    """Give the random generators a fixed state: an import of the same files makes the same checkpoint."""
    random.seed(0)
    torch.manual_seed(0)
