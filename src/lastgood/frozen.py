"""Tensors that do not change from save to save: written twice, and from then on shared by hard link.

Large tensors that no registered optimizer changes (the weights under a LoRA, a frozen quantizer) go to a data file of
their own. A checkpoint whose contents of that file are known gets it by hard link, so that every directory is complete
by itself and nobody counts references. Links share their fate, so there are rules: a file is linked on only while
another physical copy of the same bytes exists, and neighbouring checkpoints take different ones; a source is read back
in turns, a part of it at each save, before it is linked on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from lastgood import disk
from lastgood.aside import aside
from lastgood.errors import DamagedError
from lastgood.manifest import Chunk, ShardRecord
from lastgood.shard import FROZEN, Piece, check_full
from lastgood.values import Json

if TYPE_CHECKING:
    from lastgood.snapshot import Snapshot

_log = logging.getLogger("lastgood")
_TURN_BYTES = 8 << 20
"""So much of a source, or one tensor, is read back at every save. Retention reads all of it now and then."""


class Frozen:
    """The physical copies of the frozen data file that rank 0 knows, and the linking."""

    def __init__(self) -> None:
        self._copies: dict[object, list[Path]] = {}
        """By identity of the file, its names, the newest last."""
        self._content: list[Json] = []
        """Checksums of the header and of every tensor that the copies have."""
        self._record: Json = None
        self._turns: dict[object, int] = {}
        self._source: tuple[object, Path, Future[None]] | None = None
        """The copy that this save links: identity, name, and the reading of a part of it."""
        self._pending: tuple[Path, Json] | None = None
        """The file of the save under way, until that is committed, and its record."""

    def begin(self, pieces: Sequence[Piece], buffer: Snapshot) -> None:
        """Choose the file that :meth:`link` will link, if there is one, and begin to read a part of it back."""
        self._source = self._pending = None
        copies = self._alive()
        if len(copies) < 2:
            return
        content = [[p.label, p.dtype, list(p.offsets), list(p.shape), buffer.checksum_of(p)] for p in pieces]
        if content != self._content:
            self.forget()
            return
        # The one that the newest checkpoint does not have: a single bad sector never takes two neighbours.
        identity, paths = min(copies.items(), key=lambda item: item[1][-1].parent.name)
        self._source = identity, paths[-1], self._read_back(identity, paths[-1])

    def link(self, directory: Path) -> Json | None:
        """Link the chosen file into `directory`. Returns its record, or None where it has to be written."""
        if self._source is None:
            return None
        identity, path, read_back = self._source
        try:
            read_back.result()
        except DamagedError as error:
            _log.error("%s. It is not linked on; the bytes are written anew.", error)
            del self._copies[identity]
            return None
        try:
            disk.link(path, directory / FROZEN)
        except OSError as error:
            # Too many links, a file system without them, or one that is mounted in parts.
            _log.info("%s cannot be linked (%s): its bytes are written again", path, error)
            return None
        self._pending = directory / FROZEN, self._record
        return self._record

    def may_link(self, pieces: Sequence[Piece]) -> bool:
        """Whether the file will be linked, if the content is what it was. The bytes may still be on their way."""
        form = [[p.label, p.dtype, list(p.offsets), list(p.shape)] for p in pieces]
        return len(self._alive()) > 1 and form == [row[:4] for row in self._content]

    def wrote(self, path: Path, record: Json) -> None:
        """A new physical copy was written."""
        self._pending = path, record

    def committed(self) -> None:
        """The checkpoint with the last file is committed: from now on it may be linked on."""
        if self._pending is None:
            return
        path, record = self._pending
        content = [[row[0], row[1], row[3], row[4], row[7]] for row in record["pieces"]]
        if content != self._content:
            self.forget()
            self._content, self._record = content, record
        self._copies.setdefault(disk.identity(path), []).append(path)

    def forget(self) -> None:
        """Link nothing that is there now: it is damaged, or of no use any more."""
        self._copies, self._content, self._record = {}, [], None

    def _alive(self) -> dict[object, list[Path]]:
        alive: dict[object, list[Path]] = {}
        for identity, paths in self._copies.items():
            left = []
            for path in paths:
                try:
                    if disk.identity(path) == identity:
                        left.append(path)
                except OSError:
                    continue  # Deleted by retention.
            if left:
                alive[identity] = left
        self._copies = alive
        return alive

    def _read_back(self, identity: object, path: Path) -> Future[None]:
        """Read the next part of a source from the disk, while other bytes are written. Its result: DamagedError."""
        rows = self._record["pieces"]
        budget = _TURN_BYTES
        at = self._turns.get(identity, 0) % len(rows)
        parts: list[tuple[str, Chunk]] = []
        while budget > 0 and len(parts) < len(rows):
            label, _, _, offsets, shape, begin, end, digest = rows[at]
            parts.append((label, Chunk(0, begin, end, digest, tuple(offsets), tuple(shape))))
            budget -= end - begin
            at = (at + 1) % len(rows)
        self._turns = {key: turn for key, turn in self._turns.items() if key in self._copies} | {identity: at}
        whole = self._record
        record = ShardRecord(FROZEN, whole["size"], whole["header_size"], whole["header_checksum"])
        return aside(lambda: check_full(path, record, parts), "lastgood-read-back")
