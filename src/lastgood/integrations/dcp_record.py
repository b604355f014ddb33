"""The record of one checkpoint of :mod:`lastgood.integrations.dcp`: what is in it, where, and with which checksum.

A run directory holds one directory a checkpoint, whose name ends in the step::

    run/step-00000010/part-00000-3f2a9c11d0e4b587.bin     what rank 0 wrote: its items, one after the other
    run/step-00000010/part-00001-90c1d2aa4e55f017.bin
    run/step-00000010/dcp-00000004.json                   the record, written last: with it, the checkpoint exists

The number in the record's name grows with every commit in the run, so that the newest is known without a clock: of two
records in one directory the higher counts, and a step that was reached again after a roll-back is newer than the steps
that were abandoned. The JSON is ``{"lastgood_dcp":1,"checksum":"<xxh3-128>","record":{...}}``, the checksum being that
of exactly the bytes of the inner object.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lastgood import disk, files, values
from lastgood.dtypes import DTYPES, dtype_name
from lastgood.errors import DamagedError, LastGoodError
from lastgood.manifest import checksum

_log = logging.getLogger("lastgood")
_PREFIX = re.compile(rb'\{"lastgood_dcp":([0-9]{1,9}),"checksum":"([0-9a-f]{32})","record":')
_RECORD = re.compile(r"dcp-([0-9]{8,12})\.json")
_PART = re.compile(r"part-[0-9]{5,9}-[0-9a-f]{16}\.bin")
_STEP = re.compile(r"(?:.*[^0-9])?([0-9]{1,15})")
_FORMAT = 1
_MAX_RECORD = 1 << 30
_BLOCK = 16 << 20


@dataclass(frozen=True, slots=True)
class Item:
    """Where one piece of the state is."""

    file: str
    offset: int
    length: int
    """Bytes."""
    checksum: str
    """xxh3-128 of the bytes."""


@dataclass(frozen=True, order=True, slots=True)
class Place:
    """A committed checkpoint."""

    sequence: int
    step: int
    directory: Path

    @property
    def record(self) -> Path:
        return self.directory / record_name(self.sequence)


def record_name(sequence: int) -> str:
    return f"dcp-{sequence:08d}.json"


def is_part(name: str) -> bool:
    """Whether a file has the name of a data file."""
    return _PART.fullmatch(name) is not None


def step_of(name: str) -> int | None:
    """The number in which the name of a checkpoint's directory ends."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def steps(run: Path) -> list[int]:
    """The steps of all directories of a run, committed or not."""
    return sorted(step for name in disk.names(run) if (step := step_of(name)) is not None and disk.is_dir(run / name))


def sequences(directory: Path) -> list[int]:
    """The numbers of the records in one checkpoint's directory; more than one after a crash in between."""
    return sorted(int(match[1]) for name in disk.names(directory) if (match := _RECORD.fullmatch(name)))


def committed(run: Path) -> list[Place]:
    """The checkpoints of a run, oldest first, also those that a roll-back abandoned."""
    found = []
    for name in disk.names(run):
        step = step_of(name)
        if step is not None:
            found += [Place(sequence, step, run / name) for sequence in sequences(run / name)[-1:]]
    return sorted(found)


def branch(places: list[Place]) -> Iterator[Place]:
    """Newest first, without what was abandoned: a later commit of a lower step makes the higher steps history."""
    lowest: int | None = None
    for place in sorted(places, reverse=True):
        if lowest is None or place.step < lowest:
            lowest = place.step
            yield place


def encode(metadata: Metadata, items: dict[MetadataIndex, Item], step: int) -> bytes:
    """The content of the file. Raises LastGoodError where the planner keeps data that JSON cannot hold."""
    tensors: dict[str, Any] = {}
    plain = []
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            chunks = [[list(chunk.offsets), list(chunk.sizes)] for chunk in entry.chunks]
            tensors[name] = [dtype_name(entry.properties.dtype, name), list(entry.size), chunks]
        else:
            plain.append(name)
    record = {
        "step": step,
        "tensors": tensors,
        "objects": plain,
        "planner": values.encode(metadata.planner_data, "planner_data", _no_tensor),
        "items": [
            [index.fqn, None if index.offset is None else list(index.offset), i.file, i.offset, i.length, i.checksum]
            for index, i in items.items()
        ],
    }
    body = json.dumps(record, separators=(",", ":")).encode()
    return b'{"lastgood_dcp":%d,"checksum":"%s","record":%s}\n' % (_FORMAT, checksum(body).encode(), body)


def decode(place: Place) -> tuple[Metadata, dict[MetadataIndex, Item]]:
    """Read and check a record. Raises DamagedError."""
    path = place.record
    try:
        data = disk.read_bytes(path, limit=_MAX_RECORD)
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    match = _PREFIX.match(data)
    body = data[match.end() : -2] if match else b""
    if match is None or not data.endswith(b"}\n") or checksum(body) != match[2].decode():
        raise DamagedError(f"{path} is short or was altered: its checksum does not match")
    if int(match[1]) > _FORMAT:
        raise DamagedError(f"{path} has format {int(match[1])}, newer than this version of lastgood reads ({_FORMAT})")
    try:
        return _parse(json.loads(body))
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} has a valid checksum but no valid content: {error!r}") from error


def _parse(record: dict[str, Any]) -> tuple[Metadata, dict[MetadataIndex, Item]]:
    entries: dict[str, Any] = {name: BytesStorageMetadata() for name in record["objects"]}
    for name, (dtype, size, chunks) in record["tensors"].items():
        boxes = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=DTYPES[dtype]), torch.Size(size), boxes)
    items = {}
    for name, offset, file, begin, length, digest in record["items"]:
        if not is_part(file) or type(begin) is not int or type(length) is not int or begin < 0 or length < 0:
            raise ValueError(f"{name} has no valid place: {file!r}, {begin!r}, {length!r}")
        items[MetadataIndex(name, offset)] = Item(file, begin, length, str(digest))
    planner = values.decode(record["planner"], _no_tensor)
    return Metadata(entries, planner_data=planner, storage_data=items), items


def _no_tensor(*_: Any) -> Any:
    raise LastGoodError("planner_data with tensors in it cannot be saved; use a planner that keeps names and numbers")


def damage(directory: Path, items: list[Item]) -> str | None:
    """Read every byte of `items` from the disk; says what is wrong with the first that is."""
    block = memoryview(bytearray(_BLOCK))
    by_file: dict[str, list[Item]] = {}
    for item in items:
        by_file.setdefault(item.file, []).append(item)
    for name, parts in by_file.items():
        try:
            with disk.open_read(directory / name) as file:
                disk.drop_cache(file)
                for item in sorted(parts, key=lambda item: item.offset):
                    buffer = block if item.length <= len(block) else memoryview(bytearray(item.length))
                    view = buffer[: item.length]
                    got = disk.read_into(file, item.offset, view)
                    if (text := mismatch(directory, item, view, got)) is not None:
                        return text
        except OSError as error:
            return f"{directory / name} cannot be read: {error.strerror or error}"
    return None


def mismatch(directory: Path, item: Item, data: memoryview, got: int) -> str | None:
    """What is wrong with `got` bytes that were read for an item; None where they are what was saved."""
    where = f"{directory / item.file}, bytes {item.offset} to {item.offset + item.length}"
    if got != item.length:
        return f"{where}: the file ends {item.length - got} bytes too early"
    return None if checksum(data) == item.checksum else f"{where}: altered, the checksum does not match"


def expired(run: Path, keep: int) -> list[Place]:
    """What may go when the newest `keep` stay."""
    places = committed(run)
    kept = list(branch(places))[:keep]
    return [place for place in places if place < kept[-1]] if len(kept) == keep else []


def clean(directory: Path, sequence: int | None, named: set[str]) -> None:
    """Delete what the record `sequence` does not name; with None, the whole checkpoint."""
    try:
        # Records first: a crash in between must not leave one that names deleted parts.
        for old in sequences(directory):
            if old != sequence:
                disk.remove(directory / record_name(old), missing_ok=True)
        disk.sync_dir(directory)
        for name in disk.names(directory):
            ours = is_part(name) and name not in named
            if ours or files.is_temporary(name) or (sequence is None and files.is_of_macos(name)):
                disk.remove(directory / name, missing_ok=True)
        if sequence is None and not disk.names(directory):
            disk.remove_dir(directory)
    except OSError as error:
        _log.warning("%s could not be cleaned up: %s. The checkpoints are not affected.", directory, error)
