"""The commit record of a checkpoint, and the checks that a file must pass before any of it is believed.

The bytes are those of one JSON object,

    {"lastgood":1,"checksum":"<32 hex digits>","manifest":{...}}

with the checksum (xxh3-128) over exactly the bytes of the inner object. docs/format.md describes every field.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

import xxhash

from lastgood.errors import DamagedError
from lastgood.placement import is_dense
from lastgood.values import Json, tensor_names

FORMAT = 1
"""Version of the format that is written. Every older one stays readable."""

NAME = "manifest.json"
MAX_BYTES = 1 << 30
"""A manifest larger than this is refused before it is read."""

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one element, by the name that safetensors gives the type."""

_PREFIX = re.compile(rb'\{"lastgood":([0-9]{1,9}),"checksum":"([0-9a-f]{32})","manifest":')
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}")


def checksum(data: bytes | bytearray | memoryview) -> str:
    """xxh3-128 of `data`, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, stored contiguously (row-major) in one shard."""

    shard: int
    """Index into :attr:`Manifest.shards`."""
    begin: int
    """First byte in the shard file."""
    end: int
    """One past the last byte."""
    checksum: str
    offsets: tuple[int, ...]
    """Where the box begins in the tensor, an index for each dimension."""
    shape: tuple[int, ...]
    """The size of the box."""


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor of the state: the whole one, however many shards its chunks are in."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A data file of the checkpoint. Its header and its chunks together cover every byte."""

    file: str
    size: int
    """Bytes."""
    header_size: int
    """Bytes before the first tensor: the length field and the JSON header of safetensors."""
    header_checksum: str


@dataclass(frozen=True, slots=True)
class RankRecord:
    """What belongs to one rank alone."""

    random: Json
    """Its random state, or None where the rank did not take part in the save."""
    objects: dict[str, Json] = field(default_factory=dict)
    """The objects whose values differ from rank 0's."""
    local: dict[str, str] = field(default_factory=dict)
    """Tensors of which this rank has a version of its own: the common name, and the name of its version."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that a checkpoint is."""

    step: int
    generation: int
    attempt: str
    """Names one try to save, worldwide: a random number."""
    parent: str | None
    """Directory name of the checkpoint that this life of the job had saved, or was restored from, before this one."""
    time: float
    """Seconds since 1970, for people; no decision depends on it."""
    world_size: int
    metrics: dict[str, float]
    versions: dict[str, str]
    program: dict[str, Json]
    objects: dict[str, Json]
    """By name, each object's state as :mod:`lastgood.values` encodes it, tensors by name."""
    kinds: dict[str, str]
    """By name, what the object was: module, optimizer, stateful, generator, value."""
    tensors: dict[str, TensorRecord]
    ranks: dict[int, RankRecord]
    shards: tuple[ShardRecord, ...]
    strides: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By name, those in memory of tensors that did not lie there row by row, as they do in the shards."""

    @property
    def tensor_bytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    def to_bytes(self) -> bytes:
        body = compact(self._to_json()).encode()
        return b'{"lastgood":%d,"checksum":"%s","manifest":%s}\n' % (FORMAT, checksum(body).encode(), body)

    def _to_json(self) -> Json:
        return {
            "step": self.step,
            "generation": self.generation,
            "attempt": self.attempt,
            "parent": self.parent,
            "time": self.time,
            "world_size": self.world_size,
            "metrics": {
                name: value if math.isfinite(value) else {"$": "float", "v": repr(value)}
                for name, value in self.metrics.items()
            },
            "versions": self.versions,
            "program": self.program,
            "objects": self.objects,
            "kinds": self.kinds,
            "tensors": {
                name: [t.dtype, t.shape, [[c.shard, c.begin, c.end, c.checksum, c.offsets, c.shape] for c in t.chunks]]
                for name, t in self.tensors.items()
            },
            "ranks": {
                str(rank): {"random": r.random, "objects": r.objects, "local": r.local}
                for rank, r in self.ranks.items()
            },
            "shards": [[s.file, s.size, s.header_size, s.header_checksum] for s in self.shards],
            "strides": self.strides,
        }


@dataclass(frozen=True, slots=True)
class Written:
    """A manifest as it was written."""

    manifest: Manifest
    checksum: str
    """Of the bytes of its file."""


def compact(tree: Json) -> str:
    """JSON without spaces, encoded in small parts.

    The encoder holds the interpreter's lock: over a large tree in one call, training would stand still for its time.
    """
    if type(tree) is not dict:
        return _encode(tree)
    parts: list[str] = []
    few: dict[str, Json] = {}
    for key, item in tree.items():
        large = type(item) is dict and (len(item) > _FEW or any(_is_large(value) for value in item.values()))
        if not large:
            few[key] = item
        if few and (large or len(few) == _FEW):
            parts.append(_encode(few)[1:-1])
            few = {}
        if large:
            parts.append(f"{_encode(str(key))}:{compact(item)}")
    if few:
        parts.append(_encode(few)[1:-1])
    return "{" + ",".join(parts) + "}"


_FEW = 64


def _is_large(value: Json) -> bool:
    return type(value) in (dict, list) and len(value) > 8


_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def parse(data: bytes, where: str) -> Manifest:
    """Read a manifest and check all that can be checked without its shards.

    Args:
        data: the file's bytes.
        where: its path, for error messages.

    Raises:
        DamagedError: truncated, altered, of an unknown version, or inconsistent in itself.
    """
    head = _PREFIX.match(data)
    if head is None or not data.endswith(b"}\n"):
        state = "is empty" if not data else "is cut off or was altered"
        raise DamagedError(f"{where} {state}: it is not a complete lastgood manifest")
    version, digest = int(head[1]), head[2].decode()
    if version != FORMAT:
        raise DamagedError(
            f"{where} has format version {version}, and this lastgood knows {FORMAT}: "
            f"{'update lastgood to read it' if version > FORMAT else 'it was altered'}"
        )
    body = data[head.end() : -2]
    if checksum(body) != digest:
        raise DamagedError(f"{where} was altered: its checksum does not match")
    try:
        manifest = _from_json(json.loads(body))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise DamagedError(f"{where} has a valid checksum but no valid content: {error!r}") from error
    check(manifest, where)
    return manifest


def check(manifest: Manifest, where: str) -> None:
    """Raise DamagedError where a manifest is inconsistent in itself."""
    try:
        _check(manifest)
        _check_values(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{where} is inconsistent: {error}") from error


def _from_json(body: Json) -> Manifest:
    def whole(value: Any) -> int:
        if type(value) is not int or not 0 <= value < 1 << 63:
            raise ValueError(f"{value!r} is no size")
        return value

    def sizes(values: Any) -> tuple[int, ...]:
        return tuple(whole(value) for value in values)

    def text(value: Any) -> str:
        if type(value) is not str:
            raise ValueError(f"{value!r} is no text")
        return value

    def mapping(value: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise ValueError(f"{value!r} is no object")
        return value

    return Manifest(
        step=whole(body["step"]),
        generation=whole(body["generation"]),
        attempt=text(body["attempt"]),
        parent=None if body["parent"] is None else text(body["parent"]),
        time=float(body["time"]),
        world_size=whole(body["world_size"]),
        metrics={
            text(name): float(value["v"] if isinstance(value, dict) else value)
            for name, value in mapping(body["metrics"]).items()
        },
        versions={name: text(value) for name, value in mapping(body["versions"]).items()},
        program=mapping(body["program"]),
        objects=mapping(body["objects"]),
        kinds={name: text(kind) for name, kind in mapping(body["kinds"]).items()},
        tensors={
            name: TensorRecord(
                text(dtype),
                sizes(shape),
                tuple(
                    Chunk(whole(shard), whole(begin), whole(end), text(digest), sizes(offsets), sizes(box))
                    for shard, begin, end, digest, offsets, box in chunks
                ),
            )
            for name, (dtype, shape, chunks) in mapping(body["tensors"]).items()
        },
        ranks={
            int(rank): RankRecord(
                record["random"],
                mapping(record["objects"]),
                {name: text(own) for name, own in mapping(record["local"]).items()},
            )
            for rank, record in mapping(body["ranks"]).items()
        },
        shards=tuple(
            ShardRecord(text(file), whole(size), whole(header), text(digest))
            for file, size, header, digest in body["shards"]
        ),
        strides={name: sizes(strides) for name, strides in mapping(body.get("strides", {})).items()},
    )


def _check(manifest: Manifest) -> None:
    """What a hostile or broken writer could get wrong although the checksum is right. Raises ValueError."""
    names = [shard.file for shard in manifest.shards]
    for name in names:
        if not _FILE_NAME.fullmatch(name) or name.lower() == NAME:
            raise ValueError(f"the shard name {name!r} is not a plain file name")
    if len({name.lower() for name in names}) != len(names):
        raise ValueError("two shards have the same name")
    if manifest.parent is not None and not _FILE_NAME.fullmatch(manifest.parent):
        raise ValueError(f"the parent {manifest.parent!r} is not a plain directory name")
    ranges: list[list[tuple[int, int]]] = [[] for _ in manifest.shards]
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in DTYPE_BYTES:
            raise ValueError(f"tensor {name!r} has the unknown type {tensor.dtype!r}")
        for chunk in tensor.chunks:
            if chunk.shard >= len(ranges) or not len(chunk.shape) == len(tensor.shape) == len(chunk.offsets):
                raise ValueError(f"tensor {name!r} has a chunk of the wrong form")
            if chunk.end - chunk.begin != math.prod(chunk.shape) * DTYPE_BYTES[tensor.dtype]:
                raise ValueError(f"tensor {name!r} has a chunk whose byte range does not fit its shape")
            ranges[chunk.shard].append((chunk.begin, chunk.end))
        _check_cover(name, tensor)
    for shard, parts in zip(manifest.shards, ranges, strict=True):
        at = shard.header_size
        for begin, end in sorted(parts):
            if begin != at:
                raise ValueError(f"the tensors of {shard.file} overlap or leave a hole at byte {at}")
            at = end
        if at != shard.size:
            raise ValueError(f"the tensors of {shard.file} end at byte {at}, the file at {shard.size}")
    for name, strides in manifest.strides.items():
        shape = manifest.tensors[name].shape if name in manifest.tensors else None
        if shape is None or len(shape) != len(strides) or not is_dense(shape, strides):
            raise ValueError(f"tensor {name!r} cannot have the strides {list(strides)}")
    for rank, record in manifest.ranks.items():
        if not 0 <= rank < manifest.world_size:
            raise ValueError(f"there is no rank {rank} among {manifest.world_size}")
        for own in record.local.values():
            if own not in manifest.tensors:
                raise ValueError(f"rank {rank} names the tensor {own!r}, which is not in the checkpoint")


def _check_values(manifest: Manifest) -> None:
    """Whether the values name only tensors that are there. Raises ValueError, or what a wrong form leads to."""
    if manifest.objects.keys() != manifest.kinds.keys():
        raise ValueError("the objects and their kinds are not the same")
    if 0 not in manifest.ranks:
        raise ValueError("nothing is said of rank 0")
    for record in (RankRecord(None, manifest.objects), *manifest.ranks.values()):
        for name in tensor_names(record.objects):
            if record.local.get(name, name) not in manifest.tensors:
                raise ValueError(f"a value names the tensor {name!r}, which is not in the checkpoint")


def _check_cover(name: str, tensor: TensorRecord) -> None:
    """The chunks of a tensor must fill it, without overlap: else a part would keep whatever was in memory."""
    if len(tensor.chunks) == 1 and tensor.chunks[0].shape == tensor.shape:
        if any(tensor.chunks[0].offsets):
            raise ValueError(f"tensor {name!r} has a chunk outside its shape")
        return
    for chunk in tensor.chunks:
        if any(o + s > n for o, s, n in zip(chunk.offsets, chunk.shape, tensor.shape, strict=True)):
            raise ValueError(f"tensor {name!r} has a chunk outside its shape")
    if sum(math.prod(chunk.shape) for chunk in tensor.chunks) != math.prod(tensor.shape):
        raise ValueError(f"the chunks of tensor {name!r} do not fill it")
    if len(tensor.chunks) > 16384:
        raise ValueError(f"tensor {name!r} has {len(tensor.chunks)} chunks")
    # A sweep along the first dimension: only boxes that share a row can overlap.
    open_boxes: list[Chunk] = []
    compared = 0
    for chunk in sorted((c for c in tensor.chunks if math.prod(c.shape)), key=lambda c: c.offsets):
        open_boxes = [c for c in open_boxes if c.offsets[0] + c.shape[0] > chunk.offsets[0]]
        compared += len(open_boxes)
        if compared > 1_000_000:
            raise ValueError(f"tensor {name!r} is cut into too many pieces to check")
        for other in open_boxes:
            if all(
                a < b + n and b < a + m
                for a, m, b, n in zip(chunk.offsets, chunk.shape, other.offsets, other.shape, strict=True)
            ):
                raise ValueError(f"two chunks of tensor {name!r} overlap")
        open_boxes.append(chunk)
