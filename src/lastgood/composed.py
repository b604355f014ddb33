"""Tensors of classes that keep their content in other tensors: quantized weights, moments of 8 bits.

Such a class says so by ``__tensor_flatten__`` and ``__tensor_unflatten__``, as ``torch.compile`` wants it. What is
saved are those other tensors. A class is found again only among those that the program has imported: none is imported
for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lastgood.errors import MismatchError


def is_composed(kind: type) -> bool:
    """Whether tensors of a class are saved by their parts. torch's own classes are not: what they need is more."""
    return hasattr(kind, "__tensor_flatten__") and not kind.__module__.startswith("torch.")


def take_apart(tensor: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors that make up a composed one, by attribute, and what else its class needs to make it again."""
    names, context = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}, context


def put_together(
    kind: type, parts: Mapping[str, torch.Tensor], context: Any, shape: Sequence[int], strides: Sequence[int]
) -> torch.Tensor:
    """The composed tensor of these parts."""
    made: torch.Tensor = kind.__tensor_unflatten__(  # type: ignore[attr-defined]
        dict(parts), context, torch.Size(shape), tuple(strides)
    )
    return made


def plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor, or all the plain ones that it is made of."""
    if is_composed(type(tensor)):
        for part in take_apart(tensor)[0].values():
            yield from plain_parts(part)
    else:
        yield tensor


def name_of(kind: type) -> str:
    """By which a class is found again."""
    return f"{kind.__module__}.{kind.__qualname__}"


def find(name: str) -> type:
    """The class of this name. Raises MismatchError where the program has imported none."""
    seen: set[type] = set()
    todo: list[Any] = [torch.Tensor]
    while todo:
        kind: type = todo.pop()
        if is_composed(kind) and name_of(kind) == name:
            return kind
        below: list[type] = kind.__subclasses__()
        todo += [one for one in below if one not in seen]
        seen.update(below)
    raise MismatchError(
        f"a tensor was saved as a {name}, and this program knows no such class. Import the package that it is from "
        "first; a command cannot, but a program that calls lastgood.load can."
    )
