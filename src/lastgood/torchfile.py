"""Files of torch.save, checked before they are read, and read without running anything from them.

`read` gives what `torch.load(weights_only=True)` gives, and what it adds are the checks that torch leaves out: lengths
and CRC-32 of every part, tensors that stay inside their storages, and limits for hostile files.
"""

from __future__ import annotations

import ctypes
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, cast

import torch

from lastgood import disk
from lastgood.errors import DamagedError, LastGoodError, RefusedError
from lastgood.legacyfile import is_legacy, read_legacy
from lastgood.rebuild import Rebuilder, Storage, StorageType, empty_storage, swap_bytes, whole
from lastgood.safetensors_check import check_safetensors, is_safetensors
from lastgood.unpickle import Names, Records, Unpickler
from lastgood.ziparchive import CHUNK, ZipArchive

MAX_PICKLE = 1 << 30
"""Bytes of `data.pkl`, which holds everything but the tensors' content."""

ALIGNMENT = 64
"""Bytes. torch aligns every storage to this; one that an archiver moved is copied, not mapped."""

File = str | os.PathLike[str] | BinaryIO
MapLocation: TypeAlias = str | torch.device | Mapping[str, str] | Callable[[torch.UntypedStorage, str], Any] | None
Kind = Literal["zip", "legacy", "torchscript", "safetensors", "unknown"]


@dataclass(frozen=True)
class TorchFileInfo:
    """What `inspect` found in a file."""

    kind: Kind
    size: int
    """Bytes."""
    checksums: bool
    """Whether the file has checksums of its content. Without them a changed byte in a tensor cannot be noticed."""
    globals: tuple[str, ...]
    """Every `module.name` that the pickle asks for, sorted."""
    damage: tuple[str, ...]
    """A sentence for everything that is damaged; empty when the file is whole."""
    refusal: str
    """Why `read` would refuse the file; empty when it would not."""


def read(
    file: File,
    *,
    map_location: MapLocation = "cpu",
    mmap: bool = False,
    allow: Iterable[Any] = (),
    records: Records = (),
) -> Any:
    """The object in a .pt, .pth, .ckpt or .safetensors file, with every check done and nothing executed.

    Arguments:
        file: a path, or a binary file object that can seek; it is read from its beginning.
        map_location: device for all tensors; None is the device that each was saved from. Or, as in ``torch.load``, a
            dict from devices to devices, or a function of the storage (on the CPU) and the device it was saved from.
        mmap: map tensors from the file instead of copying them (zip format on CPU, by path only).
        allow: classes and functions that the file may use, or `(object, "module.name")`. They run with what the file
            gives them: allow only what you trust with the file's content.
        records: names ("module.name") that become inert `PickledObject`s instead of being refused; "all" for every one.

    Raises `DamagedError` when a check fails, `RefusedError` when code would have to run, with the name of what the
    file wants, and `LastGoodError` for files of another kind or that cannot be opened.
    """
    allowed = tuple(allow)
    with _opened(file) as (stream, size):
        kind = _kind(stream, size)
        _refuse_kind(kind, size)
        if kind == "safetensors":
            check_safetensors(stream, size)
            return _read_safetensors(stream, map_location)
        rebuilder = Rebuilder()
        names = rebuilder.names(allowed)
        place = _placer(map_location)
        if kind == "legacy":
            if mmap:
                raise LastGoodError("mmap needs the zip format; this file has the format from before torch 1.6")
            result, _ = read_legacy(stream, size, lambda: names, records, _legacy_fill(stream, place))
        else:
            archive = ZipArchive(stream, size)
            mapped = _mapped(file, size, archive) if mmap else None
            result = _read_zip(archive, names, records, _ZipStorages(archive, place, mapped))[0]
            if mapped is None:
                for member in archive.members.values():
                    if not member.name.startswith("data"):
                        archive.check(member)
        rebuilder.finish()
        return result


def inspect(file: File) -> TorchFileInfo:
    """What `file` is, whether it is whole, and what its pickle asks for. Reads every byte once, executes nothing.

    Raises `LastGoodError` only when the file cannot be opened or read.
    """
    with _opened(file) as (stream, size):
        kind = _kind(stream, size)
        damage: list[str] = []
        wanted: set[str] = set()
        refusal = ""
        checksums = False
        try:
            _refuse_kind(kind, size)
        except RefusedError as error:
            refusal = str(error)
        except LastGoodError as error:
            damage.append(str(error))
        try:
            if kind == "safetensors":
                check_safetensors(stream, size)
            elif kind == "legacy":
                wanted = read_legacy(stream, size, Rebuilder().names, "all", None)[1]
            elif kind in ("zip", "torchscript"):
                archive = ZipArchive(stream, size)
                checksums = archive.has_checksums
                for member in archive.members.values():
                    try:
                        archive.check(member)
                    except DamagedError as error:
                        damage.append(str(error))
                if kind == "zip" and not damage:
                    wanted = _read_zip(archive, Rebuilder().names(), "all", _ZipStorages(archive, None, None))[1]
        except RefusedError as error:
            refusal = str(error)
        except LastGoodError as error:
            damage.append(str(error))
        known = {".".join(name) for name in Rebuilder().names()}
        if not refusal and (unknown := sorted(wanted - known)):
            refusal = f"the file wants to use {', '.join(unknown)}, which could run code; nothing was run"
        return TorchFileInfo(kind, size, checksums, tuple(sorted(wanted)), tuple(damage), refusal)


def verify(file: File) -> list[str]:
    """A sentence for everything that is damaged in a .pt, .pth, .ckpt or .safetensors file; empty when it is whole.

    A file without checksums is not damaged: `inspect` says whether it has any.
    """
    return list(inspect(file).damage)


@contextmanager
def _opened(file: File) -> Iterator[tuple[BinaryIO, int]]:
    """The file and its size. Errors inside name the file."""
    name = os.fspath(file) if isinstance(file, str | os.PathLike) else str(getattr(file, "name", "the file"))
    try:
        if isinstance(file, str | os.PathLike):
            with disk.open_read(Path(name)) as raw:
                stream = io.BufferedReader(cast(io.RawIOBase, raw))
                yield stream, stream.seek(0, io.SEEK_END)
        else:
            yield file, file.seek(0, io.SEEK_END)
    except LastGoodError as error:
        raise type(error)(f"{name}: {error}") from error.__cause__
    except OSError as error:
        raise LastGoodError(f"{name}: cannot be read: {error.strerror or error}") from error


def _kind(stream: BinaryIO, size: int) -> Kind:
    stream.seek(0)
    head = stream.read(64)
    if head.startswith(b"PK\x03\x04"):
        try:
            members = ZipArchive(stream, size).members
        except DamagedError:
            return "zip"
        return "torchscript" if "constants.pkl" in members else "zip"
    if is_legacy(head):
        return "legacy"
    return "safetensors" if is_safetensors(head, size) else "unknown"


def _refuse_kind(kind: Kind, size: int) -> None:
    if kind == "torchscript":
        raise RefusedError(
            "a TorchScript archive, which is a program and not only data; nothing was run. Where you trust it, open it "
            "with torch.jit.load and save its state_dict()"
        )
    if kind == "unknown":
        raise LastGoodError("empty" if size == 0 else "neither a file of torch.save nor safetensors")


def _read_safetensors(stream: BinaryIO, map_location: MapLocation) -> dict[str, torch.Tensor]:
    import safetensors.torch

    stream.seek(0)
    try:
        tensors = safetensors.torch.load(stream.read())
    except safetensors.SafetensorError as error:
        raise DamagedError(f"the safetensors library does not take it: {error}") from error
    device = safetensors_device(map_location)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def safetensors_device(map_location: MapLocation) -> torch.device:
    """Where the tensors of a file go that does not say where they were. Raises LastGoodError for a function."""
    if callable(map_location):
        raise LastGoodError(
            "map_location is a function of the device that a tensor was saved from, which a safetensors file does not "
            'say: name the device instead, for instance map_location="cpu".'
        )
    if map_location is None or isinstance(map_location, Mapping):
        return torch.device("cpu")
    return torch.device(map_location)


def _read_zip(archive: ZipArchive, names: Names, records: Records, storages: _ZipStorages) -> tuple[Any, set[str]]:
    data = archive.read("data.pkl", MAX_PICKLE)
    unpickler = Unpickler(io.BytesIO(data), len(data), names, persistent_load=storages, records=records)
    result = unpickler.load()
    return result, unpickler.wanted


Placer = Callable[[torch.UntypedStorage, str], torch.UntypedStorage]


def _placer(map_location: MapLocation) -> Placer | None:
    """Moves a storage from the CPU to its device; None for the meta device, where no content is wanted."""
    if isinstance(map_location, str | torch.device) and torch.device(map_location).type == "meta":
        return None

    restore: Any = torch.serialization.default_restore_location

    def place(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        where = location
        if isinstance(map_location, str | torch.device):
            where = str(map_location)
        elif isinstance(map_location, Mapping):
            where = map_location.get(location, location)
        elif map_location is not None and (placed := map_location(storage, location)) is not None:
            return cast(torch.UntypedStorage, placed)
        if where == "cpu":
            return storage
        try:
            return cast(torch.UntypedStorage, restore(storage, where))
        except RuntimeError as error:
            hint = "" if map_location is not None else '; map_location="cpu" puts them all there'
            raise LastGoodError(f"its tensors cannot be put on {where[:50]!r}{hint}: {str(error)[:200]}") from error

    return place


def _fill(storage: torch.UntypedStorage, chunks: Iterable[bytes]) -> None:
    """Copies `chunks` into `storage`, which has room for them."""
    address, left = storage.data_ptr(), storage.nbytes()
    for chunk in chunks:
        if len(chunk) > left:
            raise DamagedError("more bytes than the storage has room for")
        ctypes.memmove(address, chunk, len(chunk))
        address += len(chunk)
        left -= len(chunk)
    if left:
        raise DamagedError(f"{left} bytes of a storage are missing")


class _ZipStorages:
    """Loads the storages of a zip file, each once. With `place` None they are on the meta device, without content."""

    def __init__(self, archive: ZipArchive, place: Placer | None, mapped: torch.UntypedStorage | None) -> None:
        self._archive, self._place, self._mapped = archive, place, mapped
        self._loaded: dict[str, torch.UntypedStorage] = {}
        self._swapped = False
        if "byteorder" in archive.members:
            order = archive.read("byteorder", 64)
            if order not in (b"little", b"big"):
                raise DamagedError("an unknown byte order")
            self._swapped = order.decode() != sys.byteorder
        elif sys.byteorder == "big":
            # Files from before the mark existed were written on little-endian machines.
            self._swapped = True

    def __call__(self, saved: Any) -> Storage:
        if type(saved) is not tuple or len(saved) != 5 or saved[0] != "storage" or type(saved[1]) is not StorageType:
            raise DamagedError("a reference to something that is no storage")
        _, kind, key, location, numel = saved
        if type(key) is not str or type(location) is not str:
            raise DamagedError("a storage without a name")
        nbytes = whole(numel, "the size of a storage") * kind.dtype.itemsize
        member = self._archive.members.get(f"data/{key}")
        if member is None:
            raise DamagedError(f"the bytes of storage {key[:100]!r} are missing")
        if member.size != nbytes:
            raise DamagedError(f"storage {key[:100]!r}: {nbytes} bytes expected, {member.size} in the file")
        if key not in self._loaded:
            if self._place is None:
                data = empty_storage(nbytes, "meta")
            elif self._mapped is not None and member.offset % ALIGNMENT == 0:
                data = self._place(self._mapped[member.offset : member.offset + nbytes], location)
            else:
                data = empty_storage(nbytes)
                _fill(data, self._archive.chunks(member))
                if self._swapped:
                    swap_bytes(data, kind.dtype)
                data = self._place(data, location)
            self._loaded[key] = data
        return Storage(self._loaded[key], kind.dtype, nbytes)


def _legacy_fill(stream: BinaryIO, place: Placer | None) -> Callable[..., torch.UntypedStorage]:
    def fill(offset: int, nbytes: int, dtype: torch.dtype, location: str) -> torch.UntypedStorage:
        if place is None:
            return empty_storage(nbytes, "meta")
        data = empty_storage(nbytes)
        stream.seek(offset)
        _fill(data, (stream.read(min(CHUNK, nbytes - at)) for at in range(0, nbytes, CHUNK)))
        if sys.byteorder == "big":
            swap_bytes(data, dtype)
        return place(data, location)

    return fill


def _mapped(file: File, size: int, archive: ZipArchive) -> torch.UntypedStorage:
    """The whole file as a private mapping, after a check of every part: a mapping is not checked when it is used."""
    if not isinstance(file, str | os.PathLike):
        raise LastGoodError("mmap needs a path, not a file object")
    for member in archive.members.values():
        if member.deflated:
            raise LastGoodError("mmap needs members that are not compressed")
        archive.check(member)
    storages = _ZipStorages(archive, None, None)
    if storages._swapped:
        raise LastGoodError("mmap needs the byte order of this machine")
    return cast(torch.UntypedStorage, torch.UntypedStorage.from_file(os.fspath(file), False, size))
