"""The torch format before version 1.6: five pickles in a row, then the bytes of every storage.

Layout: torch.serialization._legacy_save. It has no checksums. Storages are little-endian behind an int64 count.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from lastgood.errors import DamagedError, LastGoodError, RefusedError
from lastgood.rebuild import Storage, StorageType, empty_storage, whole
from lastgood.unpickle import Names, Records, Unpickler

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001

Fill = Callable[[int, int, torch.dtype, str], torch.UntypedStorage]
"""(offset in the file, bytes, data type, location as saved) -> the storage with its content."""


def is_legacy(head: bytes) -> bool:
    """Whether a file that begins with `head` begins with the magic number of this format."""
    return head.startswith(b"\x80") and MAGIC.to_bytes(10, "little") in head[:32]


def read_legacy(
    file: BinaryIO, size: int, names: Callable[[], Names], records: Records, fill: Fill | None
) -> tuple[Any, set[str]]:
    """The object in a legacy file of `size` bytes, and the names that it asked for.

    The pickle is read twice: storages come after it, and their place is known only when it names their data types.
    With `fill` None nothing but the structure is read, and tensors are on the meta device.
    Raises `DamagedError` for wrong lengths and numbers and `RefusedError` for code.
    """
    file.seek(0)
    wanted: set[str] = set()

    def plain(what: str) -> Any:
        unpickler = Unpickler(file, size - file.tell(), {})
        try:
            return unpickler.load()
        except DamagedError as error:
            raise DamagedError(f"{what}: {error}") from error

    if plain("the magic number") != MAGIC:
        raise DamagedError("the magic number of a torch file is missing")
    protocol = plain("the protocol number")
    if protocol != PROTOCOL:
        raise DamagedError("an unknown version of the legacy format")
    plain("the description of the system")
    start = file.tell()
    storages: dict[str, Storage] = {}
    locations: dict[str, str] = {}

    def measure(saved: Any) -> Storage:
        kind, key, location, numel = _parts(saved)
        nbytes = numel * kind.dtype.itemsize
        if key in storages:
            if storages[key].nbytes != nbytes:
                raise DamagedError(f"storage {key} has two sizes")
            return storages[key]
        if nbytes > size:
            raise DamagedError(f"storage {key} of {nbytes} bytes in a file of {size}")
        storages[key] = Storage(empty_storage(nbytes, "meta"), kind.dtype, nbytes)
        locations[key] = location
        return storages[key]

    def run(load: Callable[[Any], Storage]) -> Any:
        file.seek(start)
        unpickler = Unpickler(file, size - start, names(), persistent_load=load, records=records)
        try:
            return unpickler.load()
        finally:
            wanted.update(unpickler.wanted)

    result = run(measure)
    keys = plain("the list of storages")
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise DamagedError("the list of storages is no list of names")
    if len(set(keys)) != len(keys) or set(keys) != set(storages):
        raise DamagedError("the list of storages differs from those that the object uses")
    for key in keys:
        storage = storages[key]
        counted = file.read(8)
        position = file.tell()
        if len(counted) != 8 or position + storage.nbytes > size:
            raise DamagedError(
                f"the file is cut off: {size} bytes, storage {key} needs {storage.nbytes} at byte {position}; the save "
                "that wrote it did not finish"
            )
        (count,) = struct.unpack("<q", counted)
        if count * storage.dtype.itemsize != storage.nbytes:
            raise DamagedError(f"storage {key}: {count} elements where {storage.nbytes} bytes are expected")
        if fill is not None:
            data = fill(position, storage.nbytes, storage.dtype, locations[key])
            storages[key] = Storage(data, storage.dtype, storage.nbytes)
        file.seek(position + storage.nbytes)
    if file.tell() != size:
        raise DamagedError(f"{size - file.tell()} bytes follow the last storage")
    return (result if fill is None else run(measure)), wanted


def _parts(saved: Any) -> tuple[StorageType, str, str, int]:
    if type(saved) is not tuple or not saved:
        raise DamagedError("a reference to a storage that is no tuple")
    if saved[0] == "module":
        raise RefusedError("the file holds a whole module, which is code; nothing was run")
    if len(saved) != 6 or saved[0] != "storage" or type(saved[1]) is not StorageType:
        raise DamagedError("a reference to something that is no storage")
    _, kind, key, location, numel, view = saved
    if type(key) is not str or type(location) is not str:
        raise DamagedError("a storage without a name")
    if view is not None:
        raise LastGoodError("the file has views of storages, as PyTorch 0.3 wrote them; save it again with PyTorch 1.x")
    return kind, key, location, whole(numel, "the size of a storage")
