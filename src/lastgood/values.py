"""Values that are not tensors, as JSON that gives back exactly what went in.

Plain JSON loses int keys, tuples, inf and nan, bytes. Here every value that JSON has a form for is itself, and every
other is an object with the one reserved key ``"$"``, which names its type. Nothing outside the closed list below is
accepted, and decoding makes nothing but these types: no code of a file is ever run. docs/format.md lists the forms.
"""

from __future__ import annotations

import base64
import collections
import math
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from lastgood.errors import DamagedError, LastGoodError

if TYPE_CHECKING:
    import torch

# torch is imported where it is needed: what only reads manifests starts in a fraction of the time.
Json: TypeAlias = Any
"""What ``json`` reads and writes: None, bool, int, float, str, list, dict with str keys."""

_MAX_DEPTH = 64
_FACTORIES: dict[str, Callable[[], Any]] = {"int": int, "float": float, "list": list, "dict": dict, "set": set}
_NUMPY_SCALARS = frozenset(
    {
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    }
)


def encode(value: Any, path: str, put_tensor: Callable[[str, torch.Tensor], str]) -> Json:
    """The JSON form of `value`.

    Args:
        value: None, bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, OrderedDict, Counter,
            defaultdict, deque, set, frozenset, range, slice, Path, torch.Size, torch.dtype, torch.device, a numpy
            scalar or array, a tensor, or these inside each other.
        path: where the value is in the state, for error messages and as the name of a tensor.
        put_tensor: takes a tensor's path and the tensor, returns the name under which it is saved.

    Raises:
        LastGoodError: the value, or one inside it, cannot be held; the message names its path.
    """
    return _encode(value, path, put_tensor, 0)


def _encode(value: Any, path: str, put: Callable[[str, torch.Tensor], str], depth: int) -> Json:
    if depth > _MAX_DEPTH:
        raise LastGoodError(f"{path}: nested more than {_MAX_DEPTH} deep, or a value that contains itself")
    kind = type(value)
    # Most of a state: first, and at little cost.
    if kind.__module__ == "torch" and kind.__name__ == "Tensor":
        return {"$": "tensor", "v": put(path, value)}
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        if value.bit_length() > 8192:
            raise LastGoodError(f"{path}: an integer of {value.bit_length()} bits cannot be saved (8192 at most)")
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$": "float", "v": repr(value)}
    if kind is dict and "$" not in value and all(type(key) is str for key in value):
        return {key: _encode(item, f"{path}.{key}", put, depth + 1) for key, item in value.items()}
    import torch

    def items(values: Any) -> list[Json]:
        return [_encode(item, f"{path}[{i}]", put, depth + 1) for i, item in enumerate(values)]

    if isinstance(value, torch.Tensor):
        from lastgood import composed

        if composed.is_composed(kind):
            parts, context = composed.take_apart(value)
            return {
                "$": "composed",
                "v": {name: _encode(part, f"{path}.{name}", put, depth + 1) for name, part in parts.items()},
                "class": composed.name_of(kind),
                "context": _encode(context, f"{path}.__tensor_flatten__()", put, depth + 1),
                "shape": list(value.shape),
                "strides": list(value.stride()),
            }
        return {"$": "tensor", "v": put(path, value)}
    if kind is list:
        return items(value)
    if kind is tuple:
        return {"$": "tuple", "v": items(value)}
    if kind in (dict, collections.OrderedDict, collections.Counter, collections.defaultdict):
        pairs = [
            [_encode(key, f"{path}.<key>", put, depth + 1), _encode(item, f"{path}.{key}", put, depth + 1)]
            for key, item in value.items()
        ]
        if kind is not collections.defaultdict:
            return {"$": kind.__name__, "v": pairs}
        factory = "" if value.default_factory is None else getattr(value.default_factory, "__name__", "?")
        if factory and _FACTORIES.get(factory) is not value.default_factory:
            raise LastGoodError(f"{path}: a defaultdict whose factory is {value.default_factory!r} cannot be saved")
        return {"$": "defaultdict", "v": pairs, "factory": factory}
    if kind is collections.deque:
        return {"$": "deque", "v": items(value), "maxlen": value.maxlen}
    if kind in (set, frozenset):
        # Sorted where that is possible, so that equal sets give equal files.
        members = sorted(value) if all(type(m) is str for m in value) or all(type(m) is int for m in value) else value
        return {"$": kind.__name__, "v": items(members)}
    if kind in (bytes, bytearray):
        return {"$": kind.__name__, "v": base64.b64encode(value).decode()}
    if kind is complex:
        return {"$": "complex", "v": [repr(value.real), repr(value.imag)]}
    if kind in (range, slice):
        return {"$": kind.__name__, "v": items((value.start, value.stop, value.step))}
    if kind is torch.Size:
        return {"$": "Size", "v": list(value)}
    if kind in (torch.dtype, torch.device):
        return {"$": kind.__name__, "v": str(value).removeprefix("torch.")}
    if isinstance(value, pathlib.PurePath):
        return {"$": "Path", "v": str(value)}
    if kind.__module__ == "numpy":
        return _encode_numpy(value, path, put)
    from lastgood.generators import is_generator

    hint = " (functions and classes are not state)" if callable(value) else ""
    if hasattr(value, "state_dict") or is_generator(value):
        hint = " as a part of another value: register it under a name of its own"
    raise LastGoodError(
        f"{path}: a value of type {kind.__module__}.{kind.__qualname__} cannot be saved{hint}. Nothing was written. "
        "Keep it out of the state, turn it into numbers, strings, lists, dicts or tensors, or pass "
        f"leave_out=[{path!r}] to save without it."
    )


def _encode_numpy(value: Any, path: str, put: Callable[[str, torch.Tensor], str]) -> Json:
    import numpy as np
    import torch

    # On Windows a longdouble calls itself float64; neither Python nor torch takes it for one.
    known = isinstance(value, (np.generic, np.ndarray)) and value.dtype.char not in "gG"
    if known and isinstance(value, np.generic) and value.dtype.name in _NUMPY_SCALARS:
        raw = value.item()
        text = [repr(raw.real), repr(raw.imag)] if isinstance(raw, complex) else repr(raw)
        return {"$": "numpy", "v": text, "dtype": value.dtype.name}
    if type(value) is np.ndarray and not value.dtype.isnative:
        raise LastGoodError(f"{path}: a numpy array in another byte order cannot be saved; convert it with astype.")
    if known and type(value) is np.ndarray and value.dtype.name in _NUMPY_SCALARS - {"complex128"}:
        # A copy: the array may be a live view, may be read-only, and may have strides that torch does not take.
        return {"$": "ndarray", "v": put(path, torch.from_numpy(value.copy(order="C").reshape(value.shape)))}
    raise LastGoodError(
        f"{path}: a numpy value of type {getattr(value, 'dtype', type(value).__name__)} cannot be saved. Nothing was "
        "written. Convert it to a common type (astype), or leave it out with leave_out=[...]."
    )


def decode(data: Json, get_tensor: Callable[[str], torch.Tensor]) -> Any:
    """The value that :func:`encode` was given.

    Raises:
        DamagedError: `data` has a form that :func:`encode` does not make.
    """
    try:
        return _decode(data, get_tensor, 0)
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, RuntimeError) as error:
        raise DamagedError(f"a value in the manifest has no valid form: {error}") from error


def _decode(data: Json, get: Callable[[str], torch.Tensor], depth: int) -> Any:
    import torch

    if depth > 2 * _MAX_DEPTH:
        raise ValueError("nested too deep")
    if isinstance(data, list):
        return [_decode(item, get, depth + 1) for item in data]
    if not isinstance(data, dict):
        return data
    if "$" not in data:
        return {key: _decode(item, get, depth + 1) for key, item in data.items()}
    kind, v = data["$"], data["v"]
    if kind in ("bytes", "bytearray"):
        raw = base64.b64decode(v, validate=True)
        return raw if kind == "bytes" else bytearray(raw)
    if kind == "float":
        return float(v)
    if kind == "tensor":
        return get(v)
    if kind == "ndarray":
        return get(v).numpy()
    if kind == "numpy":
        return _decode_numpy(v, data["dtype"])
    if kind == "complex":
        return complex(float(v[0]), float(v[1]))
    if kind == "composed":
        from lastgood import composed

        parts = {name: _decode(part, get, depth + 1) for name, part in v.items()}
        context = _decode(data["context"], get, depth + 1)
        if not isinstance(data["class"], str):
            raise ValueError(f"{data['class']!r} is no class")
        made_by = composed.find(data["class"])
        try:
            return composed.put_together(made_by, parts, context, data["shape"], data["strides"])
        except Exception as error:  # Code of that class, which asserts what it likes.
            raise ValueError(f"{data['class']} cannot be made of what was saved: {error!r}") from error
    if kind == "Size":
        return torch.Size(v)
    if kind == "dtype":
        dtype = getattr(torch, v)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{v!r} is no dtype")
        return dtype
    if kind == "device":
        return torch.device(v)
    if kind == "Path":
        return pathlib.Path(v)
    if kind in ("dict", "OrderedDict", "Counter", "defaultdict"):
        pairs = [(_decode(key, get, depth + 1), _decode(item, get, depth + 1)) for key, item in v]
        if kind == "defaultdict":
            return collections.defaultdict(_FACTORIES[data["factory"]] if data["factory"] else None, pairs)
        if kind == "Counter":
            counter: collections.Counter[Any] = collections.Counter()
            counter.update(dict(pairs))
            return counter
        return dict(pairs) if kind == "dict" else collections.OrderedDict(pairs)
    items = [_decode(item, get, depth + 1) for item in v]
    if kind == "tuple":
        return tuple(items)
    if kind == "deque":
        return collections.deque(items, data["maxlen"])
    if kind == "set":
        return set(items)
    if kind == "frozenset":
        return frozenset(items)
    if kind == "range":
        return range(*items)
    if kind == "slice":
        return slice(*items)
    raise ValueError(f"unknown type {kind!r}")


def _decode_numpy(text: Any, name: str) -> Any:
    if name not in _NUMPY_SCALARS:
        raise ValueError(f"unknown numpy type {name!r}")
    import numpy as np

    kind = getattr(np, "bool_" if name == "bool" else name)
    if isinstance(text, list):
        return kind(complex(float(text[0]), float(text[1])))
    if name == "bool":
        return kind(text == "True")
    return kind(int(text) if "int" in name else float(text))


def tensor_names(tree: Json, depth: int = 0) -> Iterable[str]:
    """All tensors that a tree refers to. Raises ValueError where it is deeper than :func:`encode` makes them."""
    if depth > 4 * _MAX_DEPTH:
        raise ValueError("a value is nested too deep")
    if isinstance(tree, dict):
        if tree.get("$") in ("tensor", "ndarray"):
            yield tree["v"]
            return
        for item in tree.values():
            yield from tensor_names(item, depth + 1)
    elif isinstance(tree, list):
        for item in tree:
            yield from tensor_names(item, depth + 1)


def composed_classes(tree: Json) -> set[str]:
    """The names of the classes of all composed tensors in a tree."""
    below = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    own = {tree["class"]} if isinstance(tree, dict) and tree.get("$") == "composed" else set()
    return own.union(*map(composed_classes, below))


def numpy_in_use() -> bool:
    """Whether the program itself uses numpy: it is never imported only to ask for its random state."""
    return sys.modules.get("numpy") is not None
