"""What an object from an untrusted pickle may look like, so that nothing done with it later takes exponential time,
quadratic time, or more stack than there is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from lastgood.errors import DamagedError

MAX_DEPTH = 500
"""Deepest nesting of containers; much deeper ones overflow the C stack when they are hashed or compared."""
MAX_KEY_PARTS = 1000
"""Values inside one key. A tuple does not remember its hash: (t, t) nested n times takes 2**n steps to hash."""
FEW_KEYS = 1000
"""A dict or set up to this size may have any keys; a larger one only keys that cannot be made to collide."""
MAX_SPREAD_INT = 1 << 24
"""Integers and floats hash to themselves modulo 2**61 - 1, so large ones can be chosen to collide."""
MAX_VALUES = 10_000_000
"""Values in a result when shared ones are counted each time they appear, plus 64 for each byte of the pickle."""
_ANYTHING = frozenset(
    ("os", "sys", "posix", "nt", "subprocess", "shutil", "importlib", "runpy", "pty", "socket", "ctypes", "pickle")
)
_ANYTHING_BUILTIN = frozenset(("eval", "exec", "compile", "__import__", "getattr", "setattr", "open", "breakpoint"))


@dataclass(frozen=True)
class RecordType:
    """Stands for a class or function that was not imported."""

    name: str


@dataclass(eq=False)
class PickledObject:
    """An object whose class was not imported: what the pickle says about it, and nothing else."""

    name: str
    """`module.class` as written in the file."""
    args: tuple[Any, ...] = ()
    """Positional arguments of its constructor."""
    state: Any = None
    """What its `__setstate__` or `__dict__` would have been given."""
    items: list[Any] = field(default_factory=list)
    """Values appended to it, or (key, value) pairs set in it."""


def check_keys(keys: Iterable[Any], total: int) -> None:
    """Raises `DamagedError` where `keys` of a dict or set that will hold `total` of them are costly to hash."""
    for key in keys:
        if type(key) is str:
            continue
        parts, left = [key], MAX_KEY_PARTS
        while parts:
            part = parts.pop()
            left -= 1
            if isinstance(part, tuple | frozenset):
                left -= len(part)
                if left < 0:
                    raise DamagedError(f"a key made of more than {MAX_KEY_PARTS} values")
                parts.extend(part)
            elif total > FEW_KEYS and isinstance(part, int | float | complex) and not _spread(part):
                raise DamagedError(f"{total} keys that are no small integers, which could be chosen to collide")


def _spread(number: complex) -> bool:
    return isinstance(number, int) and abs(number) < MAX_SPREAD_INT


def _children(value: Any) -> Iterator[Any] | None:
    if isinstance(value, dict):
        return chain(value.values(), getattr(value, "__dict__", {}).values())
    if isinstance(value, list | tuple | set | frozenset):
        return iter(value)
    if isinstance(value, PickledObject):
        return iter((value.args, value.state, value.items))
    return None


def check_size(root: Any, pickle_bytes: int) -> None:
    """Raises `DamagedError` where containers in `root` nest too deeply, contain themselves, or repeat without bound.

    Objects of classes that the caller allowed are not looked into.
    """
    limit = MAX_VALUES + 64 * pickle_bytes
    measured: dict[int, tuple[int, int]] = {}  # id: nesting below it, values in it
    children = _children(root)
    if children is None:
        return
    path = [(root, children)]
    on_path = {id(root)}
    depth, count = [1], [1]
    while path:
        value, children = path[-1]
        for child in children:
            known = measured.get(id(child))
            if known is None:
                below = _children(child)
                if below is not None:
                    if id(child) in on_path:
                        raise DamagedError("an object that contains itself")
                    if len(path) >= MAX_DEPTH:
                        raise DamagedError(f"objects nested more than {MAX_DEPTH} deep")
                    path.append((child, below))
                    on_path.add(id(child))
                    depth.append(1)
                    count.append(1)
                    break
                known = (0, 1)
            depth[-1] = max(depth[-1], known[0] + 1)
            count[-1] += known[1]
        else:
            path.pop()
            on_path.discard(id(value))
            measured[id(value)] = done = (depth.pop(), count.pop())
            if done[0] > MAX_DEPTH:
                raise DamagedError(f"objects nested more than {MAX_DEPTH} deep")
            if done[1] > limit:
                raise DamagedError(f"{pickle_bytes} bytes of pickle that stand for more than {limit} values")
            if path:
                depth[-1] = max(depth[-1], done[0] + 1)
                count[-1] += done[1]


def set_attributes(target: Any, state: Any) -> None:
    """Sets the plain attributes that `state` holds; none that the class of `target` gives a meaning to."""
    if isinstance(state, tuple) and len(state) == 2 and not state[1]:
        state = state[0]
    if state is None:
        return
    if type(state) is not dict:
        raise DamagedError(f"the attributes of a {type(target).__name__} are not a dict")
    for name, value in state.items():
        if type(name) is not str or name.startswith("__") or hasattr(type(target), name):
            raise DamagedError(f"an attribute that would replace part of {type(target).__name__} itself")
        setattr(target, name, value)


def runs_anything(module: str, name: str) -> bool:
    """Whether `module.name` gives a file that may call it everything: never to be allowed."""
    return module.partition(".")[0] in _ANYTHING or (module == "builtins" and name in _ANYTHING_BUILTIN)
