"""What a torch file may ask for by name, and how tensors are rebuilt from storages with every bound checked first.

The list follows torch's own weights-only loading (torch/_weights_only_unpickler.py), less what no ordinary save needs:
wrapper subclasses, nested and quantized tensors, and tensors through NumPy. torch's rebuild functions are not called:
`Tensor.set_` silently enlarges a storage that is too small, so the bounds are checked here.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from lastgood.errors import DamagedError, LastGoodError, RefusedError
from lastgood.pickle_limits import PickledObject, RecordType, check_keys, runs_anything, set_attributes
from lastgood.unpickle import Known, Names

MAX_DIMS = 64
FREE_EXPANSION = 1 << 30
MAX_EXPANSION = 1024
"""An expanded tensor (stride 0) may claim `FREE_EXPANSION` bytes, or this many times its storage."""

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "UntypedStorage": torch.uint8,
}
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


@dataclass(frozen=True)
class StorageType:
    """A class name such as `FloatStorage`, as the data type that it stands for."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """Bytes of a tensor: `data` holds `nbytes` of them, seen as `dtype`."""

    data: torch.UntypedStorage
    dtype: torch.dtype
    nbytes: int


def empty_storage(nbytes: int, device: str = "cpu") -> torch.UntypedStorage:
    """`nbytes` of memory without content; on the "meta" device, none."""
    make: Any = torch.UntypedStorage
    return cast(torch.UntypedStorage, make(nbytes, device=device))


def swap_bytes(data: torch.UntypedStorage, dtype: torch.dtype) -> None:
    """Turns the elements of `data` from the other byte order into this machine's, in place."""
    storage: Any = data
    storage.byteswap(dtype)


def whole(value: Any, what: str) -> int:
    """`value` where it is an integer in 0 .. 2**63 - 1. Raises `DamagedError` that names `what` otherwise."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise DamagedError(f"{what} is not a whole number from 0 to 2**63 - 1")
    return value


def _sizes(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > MAX_DIMS:
        raise DamagedError(f"{what} is not a tuple of at most {MAX_DIMS} numbers")
    return tuple(whole(value, what) for value in values)


def check_view(storage_bytes: int, itemsize: int, offset: int, size: Sequence[int], stride: Sequence[int]) -> None:
    """Raises `DamagedError` where a tensor of `size` and `stride` (elements) at `offset` (elements) leaves its storage
    of `storage_bytes`, or claims to be absurdly larger than it."""
    if len(size) != len(stride):
        raise DamagedError(f"a tensor with {len(size)} sizes and {len(stride)} strides")
    elements, last = 1, offset
    for n, step in zip(size, stride, strict=True):
        elements *= n
        last += (n - 1) * step
    if elements == 0:
        if offset * itemsize > storage_bytes:
            raise DamagedError("an empty tensor that starts behind the end of its storage")
        return
    if (last + 1) * itemsize > storage_bytes:
        raise DamagedError(
            f"a tensor of shape {tuple(size)} reaches byte {(last + 1) * itemsize} of its storage of {storage_bytes}"
        )
    if elements * itemsize > max(FREE_EXPANSION, MAX_EXPANSION * storage_bytes):
        raise DamagedError(f"a tensor of shape {tuple(size)} over a storage of {storage_bytes} bytes")


class Rebuilder:
    """The functions that stand in for torch's own. One object for each file that is read."""

    def __init__(self) -> None:
        self._sparse: list[torch.Tensor] = []

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
        """`_rebuild_tensor` and `_rebuild_tensor_v2`: rest is requires_grad, backward hooks, metadata."""
        if type(storage) is not Storage:
            raise DamagedError("a tensor without a storage")
        return self._view(storage, storage.dtype, offset, size, stride, *rest)

    def tensor_of_dtype(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
    ) -> torch.Tensor:
        """`_rebuild_tensor_v3`: the data type stands beside a storage of bytes."""
        if type(storage) is not Storage or not isinstance(dtype, torch.dtype):
            raise DamagedError("a tensor without a storage or without a data type")
        return self._view(storage, dtype, offset, size, stride, grad, hooks, metadata)

    def _view(
        self,
        storage: Storage,
        dtype: torch.dtype,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any = False,
        hooks: Any = None,
        metadata: Any = None,
    ) -> torch.Tensor:
        _no_hooks(hooks)
        offset, size, stride = whole(offset, "an offset"), _sizes(size, "a shape"), _sizes(stride, "the strides")
        check_view(storage.nbytes, dtype.itemsize, offset, size, stride)
        tensor = torch.empty(0, dtype=dtype, device=storage.data.device)
        tensor.set_(storage.data, offset, size, stride)
        if requires_grad is True:
            tensor.requires_grad_()
        for name, value in (metadata or {}).items():
            if name == "conj" and value is True and tensor.is_complex():
                tensor = tensor.conj()
            elif name == "neg" and value is True:
                tensor = torch._neg_view(tensor)
            elif value:
                raise DamagedError("a tensor with unknown metadata")
        return tensor

    def parameter(self, data: Any, requires_grad: Any, hooks: Any = None, state: Any = None) -> Any:
        """`_rebuild_parameter` and `_rebuild_parameter_with_state`."""
        if type(data) is PickledObject:
            return data
        if not isinstance(data, torch.Tensor):
            raise DamagedError("a parameter without a tensor")
        _no_hooks(hooks)
        parameter = torch.nn.Parameter(data, requires_grad is True)
        set_attributes(parameter, state)
        return parameter

    def sparse(self, layout: Any, data: Any) -> torch.Tensor:
        """`_rebuild_sparse_tensor`. The indices are checked by `finish`, when storages have their content."""
        if layout == torch.sparse_coo:
            indices, values, size = data[:3]
            coalesced = data[3] if len(data) > 3 else None
            result = torch.sparse_coo_tensor(
                indices, values, _sizes(size, "a shape"), check_invariants=False, is_coalesced=coalesced
            )
        else:
            compressed, plain, values, size = data
            result = torch.sparse_compressed_tensor(
                compressed, plain, values, _sizes(size, "a shape"), layout=layout, check_invariants=False
            )
        self._sparse.append(result)
        return result

    def finish(self) -> None:
        """Checks the indices of sparse tensors, which later use would follow out of bounds. Raises `DamagedError`."""
        for tensor in self._sparse:
            if tensor.device.type == "meta":
                continue
            try:
                if tensor.layout == torch.sparse_coo:
                    torch.sparse_coo_tensor(tensor._indices(), tensor._values(), tensor.shape, check_invariants=True)
                else:
                    rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
                    torch.sparse_compressed_tensor(
                        tensor.crow_indices() if rows else tensor.ccol_indices(),
                        tensor.col_indices() if rows else tensor.row_indices(),
                        tensor.values(),
                        tensor.shape,
                        layout=tensor.layout,
                        check_invariants=True,
                    )
            except (RuntimeError, ValueError) as error:
                raise DamagedError(f"a sparse tensor with wrong indices: {str(error)[:200]}") from error

    def meta(self, dtype: Any, size: Any, stride: Any, requires_grad: Any) -> torch.Tensor:
        """`_rebuild_meta_tensor_no_storage`."""
        shape, steps = _sizes(size, "a shape"), _sizes(stride, "the strides")
        return torch.empty_strided(shape, steps, dtype=dtype, device="meta", requires_grad=requires_grad is True)

    def of_type(self, function: Any, new_type: Any, args: Any, state: Any) -> Any:
        """`_rebuild_from_type_v2`: a tensor, then its class and its attributes."""
        if type(function) is RecordType:
            return PickledObject(function.name, tuple(args), state)
        call = _TENSOR_CALLS.get(getattr(function, "__name__", ""))
        if call is None or function is not getattr(torch._utils, function.__name__, None):
            raise RefusedError("a tensor of a subclass that is made by an unknown function; nothing was run")
        tensor = call(self, *args)
        if isinstance(new_type, type) and new_type is not type(tensor):
            if new_type not in (torch.Tensor, torch.nn.Parameter) and new_type not in self.allowed:
                raise RefusedError(f"a tensor of class {new_type.__name__}, which is not allowed; nothing was run")
            tensor = tensor.as_subclass(new_type)
        elif not isinstance(new_type, type | RecordType):
            raise DamagedError("a tensor whose class is no class")
        set_attributes(tensor, state)
        return tensor

    allowed: tuple[type, ...] = ()

    def names(self, allow: Iterable[Any] = ()) -> Names:
        """The closed table of names for `Unpickler`, with the classes and functions that the caller allowed."""
        table = _fixed_names()
        for name, call in _TENSOR_CALLS.items():
            function = getattr(torch._utils, name, None)
            if function is not None:
                table["torch._utils", name] = Known(function, call.__get__(self))
        table["torch._utils", "_rebuild_sparse_tensor"] = Known(torch._utils._rebuild_sparse_tensor, self.sparse)
        table["torch._tensor", "_rebuild_from_type_v2"] = Known(torch._tensor._rebuild_from_type_v2, self.of_type)
        for entry in allow:
            module, name, value = _allowed_name(entry)
            table[module, name] = Known(value, value if callable(value) else None, allowed=True)
            if isinstance(value, type):
                self.allowed = (*self.allowed, value)
        return table


_TENSOR_CALLS: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": Rebuilder.tensor,
    "_rebuild_tensor_v2": Rebuilder.tensor,
    "_rebuild_tensor_v3": Rebuilder.tensor_of_dtype,
    "_rebuild_parameter": Rebuilder.parameter,
    "_rebuild_parameter_with_state": Rebuilder.parameter,
    "_rebuild_meta_tensor_no_storage": Rebuilder.meta,
}


def _no_hooks(hooks: Any) -> None:
    # torch always writes an empty OrderedDict: hooks are functions, and are not saved.
    if hooks:
        raise RefusedError("a tensor with hooks, which are code; nothing was run")


def _allowed_name(entry: Any) -> tuple[str, str, Any]:
    if isinstance(entry, tuple):
        value, full = entry
        module, _, name = str(full).rpartition(".")
    else:
        value = entry
        module, name = getattr(entry, "__module__", ""), getattr(entry, "__qualname__", "")
    if not module or not name:
        raise LastGoodError(f"allow: {entry!r} has no module and name; give (object, 'module.name') instead")
    origin = (str(getattr(value, "__module__", module)), str(getattr(value, "__qualname__", name)))
    for where, what in ((module, name), origin):
        if runs_anything(where, what):
            raise LastGoodError(f"allow: {where}.{what} runs whatever a file tells it to, and cannot be allowed")
    return module, name, value


def _ordered(items: Any = ()) -> OrderedDict[Any, Any]:
    # Python 2 wrote the pairs as one argument.
    pairs = [tuple(pair) for pair in items]
    check_keys([key for key, _ in pairs], len(pairs))
    return OrderedDict(pairs)


def _counter(counts: Any = None) -> Counter[Any]:
    counts = {} if counts is None else counts
    if type(counts) is not dict:
        raise DamagedError("a Counter that is not made from a dict")
    check_keys(counts, len(counts))
    result: Counter[Any] = Counter()
    dict.update(result, counts)
    return result


def _set_of(make: Callable[[Any], Any]) -> Callable[..., Any]:
    def call(items: Any = ()) -> Any:
        check_keys(items, len(items))
        return make(items)

    return call


def _encoded(text: Any, encoding: Any) -> bytes:
    # Protocol 2 writes bytes as text in this encoding; others would only be a way to reach Python's codecs.
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise DamagedError("bytes in an unknown encoding")
    return text.encode("latin-1")


def _byte_array(data: Any = b"", encoding: Any = None) -> bytearray:
    return bytearray(data if type(data) is bytes else _encoded(data, encoding))


def _no_bytes() -> bytes:
    return b""


def _complex(real: Any, imag: Any) -> complex:
    if type(real) is not float or type(imag) is not float:
        raise DamagedError("a complex number without two floats")
    return complex(real, imag)


def _size(values: Any = ()) -> torch.Size:
    return torch.Size(_sizes(values, "a torch.Size"))


def _device(kind: Any, index: Any = None) -> torch.device:
    if type(kind) is not str:
        raise DamagedError("a device without a name")
    return torch.device(kind) if index is None else torch.device(kind, whole(index, "a device's number"))


def _layout(name: Any) -> torch.layout:
    layout = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(layout, torch.layout):
        raise DamagedError("an unknown layout of a tensor")
    return layout


def _fixed_names() -> dict[tuple[str, str], Known]:
    table = {
        ("collections", "OrderedDict"): Known(OrderedDict, _ordered),
        ("collections", "Counter"): Known(Counter, _counter),
        ("builtins", "set"): Known(set, _set_of(set)),
        ("builtins", "frozenset"): Known(frozenset, _set_of(frozenset)),
        ("builtins", "bytes"): Known(bytes, _no_bytes),
        ("builtins", "bytearray"): Known(bytearray, _byte_array),
        ("builtins", "complex"): Known(complex, _complex),
        ("_codecs", "encode"): Known(_encoded, _encoded),
        ("torch", "Size"): Known(torch.Size, _size),
        ("torch", "device"): Known(torch.device, _device),
        ("torch", "Tensor"): Known(torch.Tensor),
        ("torch.nn.parameter", "Parameter"): Known(torch.nn.Parameter),
        ("torch.serialization", "_get_layout"): Known(_layout, _layout),
    }
    for name, dtype in DTYPES.items():
        table["torch", name] = Known(dtype)
    for name, dtype in _STORAGES.items():
        kind = Known(StorageType(dtype))
        # Files of old versions name the device in the class.
        for module in ("torch", "torch.storage", "torch.cuda"):
            table[module, name] = kind
    return table
