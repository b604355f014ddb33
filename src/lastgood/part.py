"""One rank's part in a save: what it brings, how it writes it, and how it is described to the other ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lastgood import disk
from lastgood.errors import LastGoodError
from lastgood.manifest import Written, checksum, compact
from lastgood.placement import LocalTensor, Placement
from lastgood.plan import Layout
from lastgood.shard import Buffer, Piece, piece_checksum
from lastgood.shard import write as write_shard
from lastgood.values import Json

if TYPE_CHECKING:
    from lastgood.snapshot import Snapshot


class Described(Protocol):
    """A state, as far as it is not in the buffer."""

    @property
    def tensors(self) -> dict[str, LocalTensor]:
        """By name."""


@dataclass(slots=True)
class Request:
    """One rank's part in a save: everything is in host memory, and nothing of it changes any more."""

    step: int
    tries: int
    """How often this rank tried to save this step before."""
    objects: dict[str, Json]
    kinds: dict[str, str]
    encode_random: Callable[[], Json]
    """Gives the random state of the moment of the save, as JSON. That takes its time."""
    metrics: dict[str, float]
    program: dict[str, Json]
    versions: dict[str, str]
    parent: str | None
    state: Described
    """Of its tensors only names, placements and shapes are read: the values have gone on."""
    layout: Layout
    buffer: Snapshot
    deadline: float
    """Seconds."""
    _random: Json = None

    @property
    def random(self) -> Json:
        """The random state. Asked for in the background only."""
        if self._random is None:
            self._random = self.encode_random()
        return self._random

    @property
    def tensors(self) -> dict[str, LocalTensor]:
        return self.state.tensors


@dataclass(frozen=True, slots=True)
class Committed:
    """What a save came to."""

    path: Path
    bytes: int
    """Of the whole checkpoint, over all ranks."""
    missing: tuple[int, ...] = ()
    """Ranks that did not write their part: rank 0 did. Of one that never called save there is no random state."""
    frozen: bool = False
    """Whether it has a file that other checkpoints may share."""
    written: Written | None = None
    """On rank 0, its manifest."""


class SkippedError(LastGoodError):
    """Rank 0 decided to leave this save out."""


def message_prefix(generation: int, step: int, tries: int) -> str:
    """Of all messages about one try to save one step."""
    return f"save/{generation}/{step}/{tries}/"


def await_directory(path: Path, seconds: float, given_up: Callable[[], bool]) -> None:
    """A network file system may show a new directory late.

    Raises FileNotFoundError after `seconds`, or as soon as the save is `given_up` and the directory so deleted.
    """
    end = time.monotonic() + seconds
    while not disk.exists(path):
        if given_up():
            raise FileNotFoundError(f"{path} is deleted: rank 0 gave the save up")
        if time.monotonic() > end:
            raise FileNotFoundError(f"{path}, which rank 0 made, is not visible here: another disk?")
        time.sleep(0.01)


def write_file(path: Path, pieces: Sequence[Piece], buffer: Buffer) -> Json:
    """Write a shard; returns its record as it travels in a report."""
    record, digests = write_shard(path, pieces, buffer)
    rows, at = [], record.header_size
    for piece, digest in zip(pieces, digests, strict=True):
        shape, whole = list(piece.shape), list(piece.tensor_shape)
        rows.append([piece.label, piece.dtype, whole, list(piece.offsets), shape, at, at + piece.size, digest])
        at += piece.size
    return {
        "file": record.file,
        "size": record.size,
        "header_size": record.header_size,
        "header_checksum": record.header_checksum,
        "pieces": rows,
    }


def described(piece: Piece, buffer: Buffer) -> str:
    """What two ranks compare of a tensor."""
    return piece_checksum(piece, buffer) + f" {piece.dtype} {list(piece.shape)}"


def differing_names(mine: Json, theirs: Json) -> list[str]:
    """The names under which this rank has something else than the other."""
    return [name for name, digest in mine.items() if theirs.get(name) != digest]


def tree_digest(tree: Json) -> str:
    return checksum(compact(tree).encode())


def describe(tensors: dict[str, LocalTensor]) -> dict[str, str]:
    """The replicated tensors in words, to say where two ranks differ."""
    return {
        name: f"{str(t.tensor.dtype).removeprefix('torch.')} {list(t.shape)}"
        for name, t in tensors.items()
        if t.placement is Placement.REPLICATED
    }


def difference(mine: dict[str, str], theirs: dict[str, str], rank: int) -> str:
    parts = [f"only rank 0 has {some(only)}" for only in [[n for n in mine if n not in theirs]] if only]
    parts += [f"only rank {rank} has {some(only)}" for only in [[n for n in theirs if n not in mine]] if only]
    parts += [
        f"{name} is {mine[name]} on rank 0 and {theirs[name]} on rank {rank}"
        for name in [n for n in mine if n in theirs and mine[n] != theirs[n]][:5]
    ]
    return "; ".join(parts or ["the order of the tensors differs"]) + "."


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
