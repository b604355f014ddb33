"""The checkpoints of a run: what their directory names say, which are committed, and which came from which.

Newest is the highest (generation, step): a number that is counted up, never a clock. A generation begins where the
checkpoint in its ``.base`` file ends, so the generations form branches, and falling back from a damaged checkpoint
follows the branch that it is on.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lastgood import disk, generation, shard
from lastgood.errors import DamagedError
from lastgood.manifest import MAX_BYTES, NAME, Chunk, Manifest, Written, checksum, parse
from lastgood.values import Json

_DIRECTORY = re.compile(r"step-(\d{8,})(?:\.g(\d+)(?:\.(\d+))?)?", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """A directory of a checkpoint, by its name. The order is from old to new."""

    generation: int
    step: int
    attempt: int
    name: str
    run: Path

    @property
    def path(self) -> Path:
        return self.run / self.name

    def is_committed(self) -> bool:
        """Whether there is a manifest. Whether it is intact is another question."""
        return disk.exists(self.path / NAME)


def directory_name(step: int, number: int, attempt: int = 0) -> str:
    """The name of a checkpoint's directory: ``step-00000500``, in a later generation ``step-00000500.g2``."""
    if attempt:
        return f"step-{step:08d}.g{number}.{attempt}"
    return f"step-{step:08d}" + (f".g{number}" if number > 1 else "")


def entry_of(run: Path, name: str) -> Entry | None:
    """What a directory name says, or None where it is not a checkpoint's."""
    match = _DIRECTORY.fullmatch(name)
    if match is None:
        return None
    return Entry(int(match[2] or 1), int(match[1]), int(match[3] or 0), name, run)


def entry_at(path: Path) -> Entry | None:
    """The checkpoint that a directory (or its manifest) is, or None where it is not one. Copies may have any name."""
    if path.name == NAME:
        path = path.parent
    path = path.absolute()
    entry = entry_of(path.parent, path.name)
    if entry is not None or not disk.exists(path / NAME):
        return entry
    manifest = parse(disk.read_bytes(path / NAME, limit=MAX_BYTES), str(path / NAME))
    return Entry(manifest.generation, manifest.step, 0, path.name, path.parent)


def entries(run: Path) -> list[Entry]:
    """All checkpoint directories of a run, committed or not, from old to new."""
    found = (entry for name in disk.names(run) if (entry := entry_of(run, name)) is not None)
    return sorted(found, key=lambda entry: (entry.generation, entry.step, entry.attempt, entry.name))


def committed(run: Path) -> list[Entry]:
    """The committed checkpoints of a run, from old to new."""
    return [entry for entry in entries(run) if entry.is_committed()]


def newest(run: Path) -> Entry | None:
    """The newest committed checkpoint; reads no more of the others than their names."""
    # Only what is looked at becomes an entry, and mostly that is one: there may be thousands.
    matches = [match for name in disk.names(run) if (match := _DIRECTORY.fullmatch(name)) is not None]

    def age(match: re.Match[str]) -> tuple[int, int, int]:
        return int(match[2] or 1), int(match[1]), int(match[3] or 0)

    while matches:
        entry = entry_of(run, (latest := max(matches, key=age))[0])
        if entry is not None and entry.is_committed():
            return entry
        matches.remove(latest)
    return None


def lineage(start: Entry, known: Sequence[Entry], mirror: Path | None = None) -> Iterator[Entry]:
    """`start` and what it came from, newest first, as far as it is among `known` (from old to new).

    Within a generation the steps only grow; before its first one comes the base of the generation.
    """
    yield start
    places = [start.run] + ([mirror] if mirror is not None else [])
    by_generation: dict[int, list[Entry]] = {}
    by_name: dict[str, Entry] = {}
    for entry in known:
        by_generation.setdefault(entry.generation, []).append(entry)
        by_name.setdefault(entry.name, entry)
    number, step = start.generation, start.step
    visited = {number}
    while True:
        for entry in reversed(by_generation.get(number, [])):
            # Of a step with several attempts, the last one.
            if entry.step < step:
                yield entry
                step = entry.step
        base = next((note for run in places if (note := generation.base(run, number)) is not None), None)
        parent = None if base is None else entry_of(start.run, base)
        if base == "" or (parent is not None and parent.generation in visited):
            return
        if parent is None:
            # The note is lost (an old generation's, or a run restored from a backup): the newest earlier one, then.
            before = [e for e in known if e.generation < number and e.step < step]
            if not before:
                return
            parent = before[-1]
        number, step = parent.generation, parent.step
        visited.add(number)
        if parent.name in by_name:
            yield by_name[parent.name]


def read_manifest(entry: Entry) -> Manifest:
    """The manifest of a committed checkpoint.

    Raises:
        DamagedError: it is missing, altered, or belongs to another directory.
    """
    path = entry.path / NAME
    try:
        data = disk.read_bytes(path, limit=MAX_BYTES)
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    manifest = parse(data, str(path))
    if (manifest.step, manifest.generation) != (entry.step, entry.generation):
        raise DamagedError(
            f"{path} is the manifest of step {manifest.step}, generation {manifest.generation}: "
            f"it does not belong into {entry.name}"
        )
    return manifest


def main_tree(manifest: Manifest, name: str) -> Json:
    """The state of an object, of a module without the level that tells it from its gradients."""
    tree = manifest.objects[name]
    if manifest.kinds.get(name) != "module":
        return tree
    if not isinstance(tree, dict) or not isinstance(tree.get("state"), dict):
        raise DamagedError(f"the state of {name} has no valid form")
    return tree["state"]


def check_quick(entry: Entry) -> Manifest:
    """The manifest, after the quick check: every shard is there and has its length. Raises DamagedError."""
    manifest = read_manifest(entry)
    _check_sizes(entry, manifest)
    return manifest


def _check_sizes(entry: Entry, manifest: Manifest) -> None:
    for record in manifest.shards:
        shard.check_size(entry.path / record.file, record)


def check_full(entry: Entry, trusted: Sequence[str] = (), written: Written | None = None) -> Manifest:
    """The manifest, after every byte of the checkpoint was read from the disk and checked. Raises DamagedError.

    Args:
        trusted: shards that were read lately under another name: only their size is looked at.
        written: what this process wrote as the manifest: when the file still is that, it need not be parsed, which
            takes long where there are many tensors.
    """
    manifest = None
    if written is not None:
        with contextlib.suppress(OSError, ValueError):
            if checksum(disk.read_bytes(entry.path / NAME, limit=MAX_BYTES)) == written.checksum:
                manifest = written.manifest
    if manifest is None:
        manifest = read_manifest(entry)
    _check_sizes(entry, manifest)
    check_shards(entry, manifest, trusted=trusted)
    return manifest


def chunks_by_shard(manifest: Manifest) -> list[list[tuple[str, Chunk]]]:
    """For every shard, the names of the tensors in it and where they lie."""
    chunks: list[list[tuple[str, Chunk]]] = [[] for _ in manifest.shards]
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            chunks[chunk.shard].append((name, chunk))
    return chunks


def check_shards(
    entry: Entry, manifest: Manifest, advance: Callable[[int], None] | None = None, trusted: Sequence[str] = ()
) -> None:
    """Read every byte of every shard from the disk and check it. Raises DamagedError.

    Args:
        advance: is told of the bytes that were checked since it was told last, to show progress.
    """
    chunks = chunks_by_shard(manifest)
    for record, parts in zip(manifest.shards, chunks, strict=True):
        if record.file not in trusted:
            shard.check_full(entry.path / record.file, record, parts, advance)


def damage(entry: Entry, manifest: Manifest, *, full: bool, advance: Callable[[int], None] | None = None) -> list[str]:
    """A sentence for everything that is damaged, not only for the first; empty where the checkpoint is whole.

    Args:
        full: read every byte, not only the sizes.
        advance: as in :func:`check_shards`.
    """
    chunks = chunks_by_shard(manifest)
    found = []
    for record, parts in zip(manifest.shards, chunks, strict=True):
        path = entry.path / record.file
        try:
            if full:
                found += shard.damage(path, record, parts, advance)
            else:
                shard.check_size(path, record)
        except DamagedError as error:
            found.append(str(error))
    return found


def delete(entry: Entry, *, patience: float | None = None) -> None:
    """Delete a checkpoint: the manifest first, durably, so that half a checkpoint never looks like a whole one.

    Args:
        patience: seconds to wait for a program that has one of the files open (Windows).

    Raises:
        OSError: something of it is still there; the manifest is the last to stay.
    """
    disk.remove(entry.path / NAME, missing_ok=True, patience=patience)
    disk.sync_dir(entry.path)
    refused: OSError | None = None
    for name in disk.names(entry.path):
        try:
            # A file that is held keeps its own space only: the others are given back now.
            disk.remove(entry.path / name, missing_ok=True, patience=patience if refused is None else 0)
        except OSError as error:
            refused = refused or error
    if refused is not None:
        raise refused
    disk.remove_dir(entry.path, patience=patience)
