"""A pickle interpreter that calls nothing but a closed list of functions, with limits on memory, depth and time.

It understands the opcodes that the binary protocols 2 to 5 write (the list and the meaning of each are in CPython's
Lib/pickletools.py). Opcodes that only protocols 0 and 1 or hand-made pickles use are refused. No name in the file is
ever imported: it is looked up in a table, and what is not there is refused, or kept as an inert `PickledObject`.
"""

from __future__ import annotations

import pickle
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from lastgood.errors import DamagedError, LastGoodError, RefusedError
from lastgood.pickle_limits import PickledObject, RecordType, check_keys, check_size, runs_anything, set_attributes

MAX_INT_BYTES = 1024
"""Longest integer. The largest that torch writes is its 10-byte magic number."""
FREE_MEMORY = 256 << 20
"""Bytes of Python objects that a pickle of any size may create."""
MEMORY_FACTOR = 32
"""Bytes of Python objects that each byte of the pickle may create on top."""
MAX_NAME = 1024
"""Longest line of a module's or class's name, in bytes."""

Records = Collection[str] | Literal["all"]


@dataclass(frozen=True)
class Known:
    """One entry of the table of names: the `value` that the name stands for, and what happens when it is called."""

    value: Any
    call: Callable[..., Any] | None = None
    """Called for REDUCE; None when the name may only be passed on as a value."""
    allowed: bool = False
    """The caller vouches for this class: NEWOBJ and BUILD use its own `__new__` and `__setstate__`."""


Names = Mapping[tuple[str, str], Known]


_CONSTANTS = {pickle.NONE[0]: None, pickle.NEWTRUE[0]: True, pickle.NEWFALSE[0]: False, pickle.EMPTY_TUPLE[0]: ()}
_NUMBERS = {
    op[0]: struct.Struct(layout)
    for op, layout in (
        (pickle.BININT, "<i"),
        (pickle.BININT1, "<B"),
        (pickle.BININT2, "<H"),
        (pickle.BINFLOAT, ">d"),
    )
}


def _text(data: bytes) -> str:
    return str(data, "utf-8", "surrogatepass")


def _integer(data: bytes) -> int:
    if len(data) > MAX_INT_BYTES:
        raise DamagedError(f"an integer of {len(data)} bytes, more than {MAX_INT_BYTES}")
    return int.from_bytes(data, "little", signed=True)


_SIZED: dict[int, tuple[struct.Struct, Callable[[bytes], Any]]] = {
    op[0]: (struct.Struct(layout), convert)
    for op, layout, convert in (
        (pickle.SHORT_BINUNICODE, "<B", _text),
        (pickle.BINUNICODE, "<I", _text),
        (pickle.BINUNICODE8, "<Q", _text),
        (pickle.SHORT_BINBYTES, "<B", bytes),
        (pickle.BINBYTES, "<I", bytes),
        (pickle.BINBYTES8, "<Q", bytes),
        (pickle.BYTEARRAY8, "<Q", bytearray),
        (pickle.SHORT_BINSTRING, "<B", _text),
        (pickle.BINSTRING, "<i", _text),
        (pickle.LONG1, "<B", _integer),
        (pickle.LONG4, "<i", _integer),
    )
}
_OPCODE_NAMES = {
    value[0]: name
    for name, value in vars(pickle).items()
    if isinstance(value, bytes) and len(value) == 1 and name.isupper()
}
# What each new container costs in CPython, in bytes, rounded up.
_COST: dict[Any, int] = {dict: 64, list: 56, set: 216}
_CALL_COST, _MEMO_COST = 512, 96


class Unpickler:
    """Reads one pickle.

    `file` stands at the first byte of the pickle and has `size` bytes left; `names` is the closed table of what may be
    used; `persistent_load` turns a persistent id into an object; names in `records` (or all unknown ones) become
    `PickledObject`. After `load`, `wanted` has every name that the pickle asked for, and `file` stands behind its end.
    """

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        names: Names,
        *,
        persistent_load: Callable[[Any], Any] | None = None,
        records: Records = (),
    ) -> None:
        self.wanted: set[str] = set()
        self._file, self._left, self._size = file, size, size
        self._names, self._records = names, records
        self._persistent_load = persistent_load
        self._calls = {id(known.value): known.call for known in names.values() if known.call is not None}
        self._allowed = {id(known.value) for known in names.values() if known.allowed}
        self._memory = 0
        self._memo: dict[int, Any] = {}
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []

    def load(self) -> Any:
        """The object. Raises `RefusedError` where code would have to run and `DamagedError` for everything else."""
        try:
            value = self._run()
            check_size(value, self._size)
            return value
        except RefusedError:
            raise
        except DamagedError as error:
            raise DamagedError(f"at byte {self._size - self._left} of the pickle: {error}") from error.__cause__
        except (LastGoodError, OSError, MemoryError):
            raise
        except Exception as error:  # a constructor of torch or of an allowed class can raise anything
            what = f"{type(error).__name__}: {str(error)[:300]}"
            raise DamagedError(f"at byte {self._size - self._left} of the pickle: {what}") from error

    def _run(self) -> Any:
        special = _SPECIAL
        while True:
            op = self._read(1)[0]
            if op in _CONSTANTS:
                self._stack.append(_CONSTANTS[op])
            elif (number := _NUMBERS.get(op)) is not None:
                self._stack.append(number.unpack(self._read(number.size))[0])
            elif (sized := _SIZED.get(op)) is not None:
                length, convert = sized
                self._stack.append(convert(self._read(length.unpack(self._read(length.size))[0])))
            elif op == pickle.STOP[0]:
                if len(self._stack) != 1 or self._marks:
                    raise DamagedError("the pickle ends with objects left over")
                return self._stack.pop()
            elif (method := special.get(op)) is not None:
                method(self)
            else:
                self._refuse_opcode(op)

    def _read(self, n: int) -> bytes:
        if not 0 <= n <= self._left:
            raise DamagedError(f"{n} bytes are announced where {self._left} are left")
        data = self._file.read(n)
        if len(data) != n:
            raise DamagedError("the file ends inside the pickle")
        self._left -= n
        return data

    def _line(self) -> str:
        line = self._file.readline(min(MAX_NAME, self._left))
        if not line.endswith(b"\n"):
            raise DamagedError("a name without an end")
        self._left -= len(line)
        return _text(line[:-1])

    def _charge(self, nbytes: int) -> None:
        self._memory += nbytes
        if self._memory > FREE_MEMORY + MEMORY_FACTOR * self._size:
            raise DamagedError(
                f"{self._size} bytes of pickle would become more than {self._memory >> 20} MiB of objects"
            )

    def _new(self, value: Any) -> None:
        self._charge(_COST[type(value)])
        self._stack.append(value)

    def _refuse_opcode(self, op: int) -> None:
        name = _OPCODE_NAMES.get(op)
        if name is None:
            raise DamagedError(f"0x{op:02x} is no pickle instruction")
        if op == pickle.INST[0]:
            wanted = f"{self._line()}.{self._line()}"
            self.wanted.add(wanted)
            raise RefusedError(f"the file calls {wanted} (instruction INST), which could run code; nothing was run")
        raise RefusedError(f"the file uses the pickle instruction {name}, which torch never writes; nothing was run")

    # names and calls

    def _global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise DamagedError("a name that is not text")
        # Protocol 2 writes the names of Python 2.
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[(module, name)]
        elif module in IMPORT_MAPPING:
            module = IMPORT_MAPPING[module]
        full = f"{module}.{name}"
        self.wanted.add(full)
        known = self._names.get((module, name))
        if known is not None:
            self._stack.append(known.value)
        elif self._records == "all" or full in self._records:
            self._charge(_COST[dict])
            self._stack.append(RecordType(full))
        elif runs_anything(module, name):
            raise RefusedError(f"the file wants to use {full}, which runs whatever it is told; nothing was run")
        else:
            raise RefusedError(
                f"the file wants to use {full}, which could run code; nothing was run. If you trust where the file "
                f"comes from, allow it in Python: lastgood.load(file, allow=[{name}]), with {name} imported from "
                f"{module}; what lastgood.save then makes of it, every command reads"
            )

    def _global_op(self) -> None:
        module = self._line()
        self._global(module, self._line())

    def _stack_global(self) -> None:
        name = self._stack.pop()
        self._global(self._stack.pop(), name)

    def _reduce(self) -> None:
        args = self._stack.pop()
        function = self._stack.pop()
        if type(args) is not tuple:
            raise DamagedError("the arguments of a call are not a tuple")
        self._charge(_CALL_COST + sum(map(_weight, args)))
        if type(function) is RecordType:
            self._stack.append(PickledObject(function.name, args))
            return
        call = self._calls.get(id(function))
        if call is None:
            raise RefusedError(f"the file calls {_describe(function)}, which may not be called; nothing was run")
        self._stack.append(call(*args))

    def _new_object(self, cls: Any, args: Any, kwargs: Any) -> None:
        if type(args) is not tuple or type(kwargs) is not dict:
            raise DamagedError("the arguments of a constructor are not a tuple")
        self._charge(_CALL_COST)
        if type(cls) is RecordType:
            self._stack.append(PickledObject(cls.name, (*args, kwargs) if kwargs else args))
        elif id(cls) in self._allowed and isinstance(cls, type):
            self._stack.append(cls.__new__(cls, *args, **kwargs))
        else:
            raise RefusedError(f"the file makes an object of {_describe(cls)}, which is not allowed; nothing was run")

    def _newobj(self) -> None:
        args = self._stack.pop()
        self._new_object(self._stack.pop(), args, {})

    def _newobj_ex(self) -> None:
        kwargs, args = self._stack.pop(), self._stack.pop()
        self._new_object(self._stack.pop(), args, kwargs)

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if type(target) is PickledObject:
            target.state = state
        elif type(target) is OrderedDict:
            # A state dict carries its `_metadata` this way.
            set_attributes(target, state)
        elif id(type(target)) in self._allowed:
            _set_state(target, state)
        else:
            raise RefusedError(f"the file sets the state of a {type(target).__name__}; nothing was run")

    def _persistent(self) -> None:
        if self._persistent_load is None:
            raise RefusedError("the file refers to outside data where none can be; nothing was run")
        self._charge(_CALL_COST)
        self._stack.append(self._persistent_load(self._stack.pop()))

    # the stack, the memo and containers

    def _mark(self) -> None:
        self._charge(_COST[list])
        self._marks.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    def _pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _tuple(self, n: int) -> None:
        items = self._pop_mark() if n < 0 else self._stack[len(self._stack) - n :]
        if len(items) < n:
            raise DamagedError("a tuple of more objects than there are")
        if n > 0:
            del self._stack[-n:]
        self._charge(40 + 8 * len(items))
        self._stack.append(tuple(items))

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is PickledObject:
            target.items.extend(items)
        elif type(target) is list:
            target.extend(items)
        else:
            raise RefusedError(f"the file appends to a {type(target).__name__}; nothing was run")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        keys, values = items[::2], items[1::2]
        if len(keys) != len(values):
            raise DamagedError("a key without a value")
        if type(target) is PickledObject:
            target.items.extend(zip(keys, values, strict=True))
        elif type(target) in (dict, OrderedDict, Counter):
            check_keys(keys, len(target) + len(keys))
            for key, value in zip(keys, values, strict=True):
                target[key] = value
        else:
            raise RefusedError(f"the file sets items of a {type(target).__name__}; nothing was run")

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _add_items(self, make: Callable[[Any], Any] | None) -> None:
        items = self._pop_mark()
        if make is not None:
            check_keys(items, len(items))
            self._charge(_COST[set])
            self._stack.append(make(items))
            return
        target = self._stack[-1]
        if type(target) is not set:
            raise RefusedError(f"the file adds items to a {type(target).__name__}; nothing was run")
        check_keys(items, len(target) + len(items))
        target.update(items)

    def _get(self, layout: str) -> None:
        (index,) = struct.unpack(layout, self._read(struct.calcsize(layout)))
        if index not in self._memo:
            raise DamagedError(f"memo {index} was never set")
        self._stack.append(self._memo[index])

    def _put(self, layout: str) -> None:
        index = struct.unpack(layout, self._read(struct.calcsize(layout)))[0] if layout else len(self._memo)
        self._charge(_MEMO_COST)
        self._memo[index] = self._stack[-1]


def _weight(arg: Any) -> int:
    """Bytes that a call may allocate by copying this argument, rounded up."""
    if isinstance(arg, str | bytes | bytearray):
        return 2 * len(arg)
    return 64 * len(arg) if isinstance(arg, list | tuple | dict | set | frozenset) else 0


def _describe(value: Any) -> str:
    return getattr(value, "__qualname__", None) or f"a {type(value).__name__}"


def _set_state(target: Any, state: Any) -> None:
    """What `pickle` does for BUILD, for an object of a class that the caller allowed."""
    set_state = getattr(target, "__setstate__", None)
    if set_state is not None:
        set_state(state)
        return
    slots = None
    if isinstance(state, tuple) and len(state) == 2:
        state, slots = state
    if state:
        target.__dict__.update(state)
    for name, value in (slots or {}).items():
        setattr(target, name, value)


_SPECIAL: dict[int, Callable[[Unpickler], object]] = {
    pickle.PROTO[0]: lambda u: u._read(1),
    pickle.FRAME[0]: lambda u: u._read(8),
    pickle.MARK[0]: Unpickler._mark,
    pickle.POP[0]: Unpickler._pop,
    pickle.POP_MARK[0]: Unpickler._pop_mark,
    pickle.EMPTY_DICT[0]: lambda u: u._new({}),
    pickle.EMPTY_LIST[0]: lambda u: u._new([]),
    pickle.EMPTY_SET[0]: lambda u: u._new(set()),
    pickle.TUPLE[0]: lambda u: u._tuple(-1),
    pickle.TUPLE1[0]: lambda u: u._tuple(1),
    pickle.TUPLE2[0]: lambda u: u._tuple(2),
    pickle.TUPLE3[0]: lambda u: u._tuple(3),
    pickle.APPEND[0]: lambda u: u._append([u._stack.pop()]),
    pickle.APPENDS[0]: lambda u: u._append(u._pop_mark()),
    pickle.SETITEM[0]: Unpickler._set_item,
    pickle.SETITEMS[0]: lambda u: u._set_items(u._pop_mark()),
    pickle.ADDITEMS[0]: lambda u: u._add_items(None),
    pickle.FROZENSET[0]: lambda u: u._add_items(frozenset),
    pickle.BINGET[0]: lambda u: u._get("<B"),
    pickle.LONG_BINGET[0]: lambda u: u._get("<I"),
    pickle.BINPUT[0]: lambda u: u._put("<B"),
    pickle.LONG_BINPUT[0]: lambda u: u._put("<I"),
    pickle.MEMOIZE[0]: lambda u: u._put(""),
    pickle.GLOBAL[0]: Unpickler._global_op,
    pickle.STACK_GLOBAL[0]: Unpickler._stack_global,
    pickle.REDUCE[0]: Unpickler._reduce,
    pickle.NEWOBJ[0]: Unpickler._newobj,
    pickle.NEWOBJ_EX[0]: Unpickler._newobj_ex,
    pickle.BUILD[0]: Unpickler._build,
    pickle.BINPERSID[0]: Unpickler._persistent,
}
