"""A disk as POSIX promises it, and no better: what a power cut may leave of a history of operations.

The rules, which are those of fsync(2) and of no file system in particular:

* Bytes of a file are durable after ``fsync`` of the file. Bytes written since are, in any combination over the files,
  lost, there, cut off in the middle, or there in length with zeros for content.
* A name in a directory (made, replaced, removed) is durable after ``fsync`` of the directory. Changes since are kept or
  lost, each by itself, in any combination. A file's own fsync does not make its name durable.
* A rename is one change: the new name is there and the old one gone, or neither. It may be kept when the file's data
  are not.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal, TypeAlias

ALL_BELOW = 9
"""With at most so many open questions, every combination of answers is a state."""
_DRAWN = 40
"""With more, all states with at most two changes kept, or at most two lost, and so many drawn at random."""

Effect = Literal[
    "create", "write", "sync", "replace", "link", "remove", "mkdir", "rmdir", "sync_dir", "truncate", "report"
]
Tree: TypeAlias = "dict[str, bytes | None]"
"""A state: by path, the content of a file, or None for a directory."""


@dataclass(frozen=True)
class Event:
    """One operation of the history, or the moment at which a save was reported done."""

    effect: Effect
    path: str
    """Relative to the directory that is the whole disk. For "report": the name of the checkpoint."""
    source: str = ""
    """For a replace or link: the name that exists."""
    data: bytes = b""
    site: str = ""
    """The line of code that asked for it."""


@dataclass(eq=False)
class File:
    durable: bytes = b""
    unsynced: list[bytes] = field(default_factory=list)
    promised: bool = True
    """Whether anybody relies on the content: logs and heartbeats are never synced."""

    def variants(self) -> list[bytes]:
        """Every content that may be found after the cut."""
        new = b"".join(self.unsynced)
        if not new:
            return [self.durable]
        found = [self.durable, self.durable + new, self.durable + new[: len(new) // 2], self.durable + bytes(len(new))]
        return list(dict.fromkeys(found))


@dataclass(eq=False)
class Directory:
    durable: dict[str, File | Directory] = field(default_factory=dict)
    now: dict[str, File | Directory] = field(default_factory=dict)
    pending: list[tuple[str | None, str | None, File | Directory | None]] = field(default_factory=list)
    """Changes that are not yet durable: the name that goes, the name that comes, and what it names."""

    def change(self, gone: str | None, comes: str | None, node: File | Directory | None) -> None:
        _apply(self.now, gone, comes, node)
        self.pending.append((gone, comes, node))


def _apply(
    entries: dict[str, File | Directory], gone: str | None, comes: str | None, node: File | Directory | None
) -> None:
    if gone is not None:
        entries.pop(gone, None)
    if comes is not None and node is not None:
        entries[comes] = node


class Disk:
    """The disk while the history goes on."""

    def __init__(self) -> None:
        self.root = Directory()

    def _directory(self, path: PurePosixPath) -> Directory:
        node: File | Directory = self.root
        for part in path.parts:
            assert isinstance(node, Directory)
            node = node.now[part]
        assert isinstance(node, Directory), path
        return node

    def _file(self, path: PurePosixPath) -> File:
        node = self._directory(path.parent).now[path.name]
        assert isinstance(node, File), path
        return node

    def play(self, event: Event) -> None:
        """Let one operation happen."""
        path = PurePosixPath(event.path)
        if event.effect == "report":
            return
        if event.effect == "sync_dir":
            directory = self._directory(path)
            directory.durable, directory.pending = dict(directory.now), []
            return
        parent = self._directory(path.parent)
        if event.effect == "mkdir":
            parent.change(None, path.name, Directory())
        elif event.effect in ("rmdir", "remove"):
            parent.change(path.name, None, None)
        elif event.effect == "create":
            parent.change(None, path.name, File())
        elif event.effect == "replace":
            source = PurePosixPath(event.source)
            assert source.parent == path.parent, "a rename between directories is two changes"
            parent.change(source.name, path.name, parent.now[source.name])
        elif event.effect == "link":
            parent.change(None, path.name, self._file(PurePosixPath(event.source)))
        elif event.effect == "write":
            if path.name not in parent.now:
                parent.change(None, path.name, File(promised=False))  # The log, which is appended to.
            self._file(path).unsynced.append(event.data)
        elif event.effect == "truncate":
            # Written anew in place, and never synced: what was there may be gone as well.
            parent.change(None, path.name, File(unsynced=[event.data], promised=False))
        elif event.effect == "sync":
            file = self._file(path)
            file.durable, file.unsynced = file.durable + b"".join(file.unsynced), []

    def states(self, seed: int) -> Iterator[Tree]:
        """What may be found when the power fails now."""
        directories, files = self._all(self.root)
        changes = [(directory, index) for directory in directories for index in range(len(directory.pending))]
        relied = [file for file in files if file.promised and len(file.variants()) > 1]
        loose = [file for file in files if not file.promised and len(file.variants()) > 1]
        draw = random.Random(seed)
        for kept in _subsets(len(changes), draw):
            chosen = {(id(changes[i][0]), changes[i][1]) for i in kept}
            for contents in itertools.product(*(file.variants() for file in relied[:3])):
                content = {id(file): data for file, data in zip(relied, contents, strict=False)}
                content |= {id(file): draw.choice(file.variants()) for file in [*relied[3:], *loose]}
                tree: Tree = {}
                self._lay_out(self.root, "", chosen, content, tree)
                yield tree

    def _all(self, directory: Directory) -> tuple[list[Directory], list[File]]:
        """Every directory and file that some state may show, in the order in which names came."""
        directories: dict[int, Directory] = {}
        files: dict[int, File] = {}
        left: list[File | Directory] = [directory]
        while left:
            node = left.pop(0)
            if isinstance(node, File):
                files[id(node)] = node
            elif id(node) not in directories:
                directories[id(node)] = node
                left += [*node.durable.values(), *(new for _, _, new in node.pending if new is not None)]
        return list(directories.values()), list(files.values())

    def _lay_out(
        self, directory: Directory, path: str, chosen: set[tuple[int, int]], content: dict[int, bytes], tree: Tree
    ) -> None:
        entries = dict(directory.durable)
        for index, change in enumerate(directory.pending):
            if (id(directory), index) in chosen:
                _apply(entries, *change)
        for name, node in entries.items():
            here = f"{path}/{name}" if path else name
            if isinstance(node, File):
                tree[here] = content.get(id(node), node.durable)
            else:
                tree[here] = None
                self._lay_out(node, here, chosen, content, tree)


def _subsets(count: int, draw: random.Random) -> list[tuple[int, ...]]:
    everything = tuple(range(count))
    if count <= ALL_BELOW:
        return [kept for size in range(count + 1) for kept in itertools.combinations(everything, size)]
    few = [kept for size in range(3) for kept in itertools.combinations(everything, size)]
    most = [tuple(i for i in everything if i not in lost) for lost in few]
    drawn = [tuple(i for i in everything if draw.random() < 0.5) for _ in range(_DRAWN)]
    return list(dict.fromkeys([*few, *most, *drawn]))
