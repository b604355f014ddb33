"""The two-phase commit. A step is committed once for the whole job, when every byte of it is durable.

Rank 0 announces the attempt; every rank writes its part, syncs it and reports; rank 0 checks the reports, writes what
is missing and can be written from its own copy, makes the names durable, and puts the manifest in place. The manifest
is the commit: before it there is no checkpoint, after it the checkpoint is whole.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from pathlib import Path

from lastgood import catalog, disk
from lastgood.aside import aside
from lastgood.coordinate import Channel
from lastgood.errors import LastGoodError, SaveError
from lastgood.frozen import Frozen
from lastgood.generation import Holder
from lastgood.manifest import (
    DTYPE_BYTES,
    NAME,
    Chunk,
    Manifest,
    RankRecord,
    ShardRecord,
    TensorRecord,
    Written,
    check,
    checksum,
)
from lastgood.part import (
    Committed,
    Request,
    describe,
    described,
    difference,
    differing_names,
    message_prefix,
    some,
    tree_digest,
    write_file,
)
from lastgood.placement import Placement
from lastgood.plan import structure
from lastgood.shard import FROZEN, piece_checksum
from lastgood.values import Json
from lastgood.world import World

_log = logging.getLogger("lastgood")
_MARGIN = 4 << 20
"""Bytes beside the tensors: headers, the manifest, and what the file system needs for itself."""
_CLEAR_PATIENCE = 1.0
"""Seconds to wait for a program that has a left-over open: clearing is tried again at the next save and at the end."""
_TEMPORARY = NAME + ".tmp"
_RETRY_WIDTH = 8
"""Saves after which a writer that was left out is tried again."""


class _HeldError(SaveError):
    """Everything is written, and the manifest could not get its name: the data are kept."""


def _expected_shares(request: Request) -> dict[int, Json]:
    """By writer, what its share must be."""
    return {
        writer: [[p.label, list(p.offsets), list(p.shape), piece_checksum(p, request.buffer)] for p in pieces]
        for writer, pieces in request.layout.others.items()
    }


class Root:
    """Rank 0 in a save."""

    def __init__(
        self, run: Path, world: World, channel: Channel, holder: Holder, writers: Sequence[int], group: int | None
    ) -> None:
        self._run, self._world, self._channel, self._holder, self._group = run, world, channel, holder, group
        self._all_writers = tuple(writers)
        self._left_out: dict[int, int] = {}
        """Writers that could not write, and in how many saves they are tried again."""
        self._absent: set[int] = set()
        """Ranks that did not come to the last save."""
        self._dead: set[int] = set()
        """Ranks without whose random state training goes on."""
        self._reported: dict[int, Json] = {}
        """What each rank alone had, by its last report."""
        self._own_bytes: dict[int, int] = {}
        """How many bytes each rank wrote of its own, by its last report."""
        self._complete: list[tuple[catalog.Entry, str]] = []
        """Attempts whose data are complete, but whose manifest another program has open, and their message prefix."""
        self._litter: list[tuple[catalog.Entry, str, set[int]]] = []
        """Directories of failed attempts, their message prefix, and the ranks that may still write into them."""
        self._saves = 0
        self.frozen = Frozen()
        self._announced: frozenset[str] = frozenset()
        self._attempts: dict[int, int] = {}
        self._prefixes: list[str] = []
        self.hurried = False
        """Set when the training asks for the next save: who has not come to this one by now will not come."""

    @property
    def writers(self) -> tuple[int, ...]:
        """The ranks that share the writing of the next save."""
        able = [writer for writer in self._all_writers if writer not in self._left_out] or [0]
        # A share is compared with rank 0's copy when it is written. They go round, so that after as many saves as
        # there are writers every replica was compared as a whole.
        turn = self._saves % len(able)
        return tuple(able[turn:] + able[:turn])

    def save(self, request: Request, make_room: Callable[[int], None]) -> Committed:
        """Save and commit. Runs in the background.

        Args:
            make_room: raises SaveError when the disk cannot take so many bytes.

        Raises:
            SaveError: the save was given up; the reason names the rank, file or disk that it was.
            ReplacedError: a later job holds the run.
        """
        prefix = message_prefix(self._holder.number, request.step, request.tries)
        name: str | None = None
        try:
            self._holder.check()
            self.clear()
            make_room(self._needed(request))
            name = self._make_directory(request.step)
            result = self._save(request, prefix, name, make_room)
        except BaseException as error:
            reason = str(error) if isinstance(error, LastGoodError) else f"{type(error).__name__}: {error}"
            self._channel.post(prefix + "outcome", {"failed": reason})
            entry = catalog.entry_of(self._run, name) if name is not None else None
            if entry is not None and isinstance(error, _HeldError):
                self._complete.append((entry, prefix))
            elif entry is not None:
                writing = {rank for rank in self._channel.connected if self._came(rank, request.step)}
                self._litter.append((entry, prefix, writing))
                self.clear()
            if isinstance(error, LastGoodError):
                raise
            raise SaveError(
                f"step {request.step} was not saved: {reason}. The checkpoints before it are untouched."
            ) from error
        outcome = {"bytes": result.bytes, "missing": list(result.missing)}
        self._channel.post(prefix + "outcome", outcome)
        self._prefixes.append(prefix)
        self.clear()  # Who took part in this save has ended with those before.
        for old in self._prefixes[:-2]:
            self._channel.forget(old)
        del self._prefixes[:-2]
        return result

    def skip(self, step: int, tries: int) -> None:
        """Tell the others that this save is left out. Called by the training thread."""
        prefix = message_prefix(self._holder.number, step, tries)
        reason = f"step {step} is not saved: the save before it is still being written"
        self._channel.post(prefix + "call", {"skipped": reason})
        self._channel.post(prefix + "outcome", {"failed": reason})
        self._channel.forget(prefix)

    def _make_directory(self, step: int) -> str:
        while True:
            name = catalog.directory_name(step, self._holder.number, self._attempts.get(step, 0))
            self._attempts = {step: self._attempts.get(step, 0) + 1}
            try:
                disk.make_dir(self._run / name)
                if self._group is not None:
                    disk.give_to_group(self._run / name, self._group)
            except FileExistsError:
                continue
            except OSError:
                with contextlib.suppress(OSError):
                    disk.remove_dir(self._run / name)
                raise
            return name

    def _needed(self, request: Request) -> int:
        """Bytes that the save takes on the disk, over all ranks, as far as rank 0 can know."""
        layout, tensors = request.layout, request.tensors
        needed = layout.size + _MARGIN
        if self.frozen.may_link(layout.frozen):
            needed -= sum(piece.size for piece in layout.frozen)
        if self._world.size == 1:
            return needed
        sharded = {name: t for name, t in tensors.items() if t.placement is Placement.SHARDED}
        whole = sum(math.prod(t.shape) * DTYPE_BYTES[t.dtype] for t in sharded.values())
        mine = sum(piece.size for piece in layout.share if piece.name in sharded)
        # What else the others have of their own shows when they have saved once.
        before = sum(size for rank, size in self._own_bytes.items() if rank not in self._absent)
        return needed + max(whole - mine, before)

    def _save(self, request: Request, prefix: str, name: str, make_room: Callable[[int], None]) -> Committed:
        layout, directory = request.layout, self._run / name
        attempt = secrets.token_hex(8)
        others = self._expected(request.step)
        call = {
            "name": name,
            "attempt": attempt,
            "writers": list(layout.writers),
            "frozen": sorted(layout.still),
            "structure": structure(request.tensors),
            "compare": {
                piece.name: described(piece, request.buffer)
                for piece in (layout.compare if self._world.size > 1 else ())
            },
            "objects": {name: tree_digest(tree) for name, tree in request.objects.items()}
            if self._world.size > 1
            else {},
        }
        self._channel.post(prefix + "call", call)
        until = time.monotonic() + request.deadline
        shares = [aside(lambda: _expected_shares(request), "lastgood-shares")] if layout.others else []
        try:
            files = self._write(directory, request, make_room)
        finally:
            wait(shares)  # Nobody may read the buffer any more when this is over.
        expected_shares = shares[0].result() if shares else {}
        # Who has not come when the training asks for the next save is not waited for, unless its bytes would be lost.
        optional = {rank for rank in others if not self._only_there(request, rank)}
        reports = self._channel.collect(
            prefix + "report",
            others,
            until,
            lambda rank: (
                self._passed_by(rank, request.step)
                or (self.hurried and rank in optional and not self._came(rank, request.step))
            ),
        )
        for rank in self._absent:
            if (late := self._channel.peek(prefix + "report", rank)) is not None:
                reports[rank] = late
        missing = tuple(rank for rank in range(1, self._world.size) if rank not in reports)
        held = {rank: self._channel.peek(prefix + "holds", rank) for rank in missing}
        self._judge(request, call, reports, {rank: held[rank] or {} for rank in missing})
        for writer, expected in expected_shares.items():
            if not expected:
                continue
            share = self._accept(directory, writer, reports.get(writer), expected, layout.writers)
            if share is None:
                pieces = layout.others[writer]
                share = write_file(directory / f"{writer:05d}-by-0.safetensors", pieces, request.buffer)
            files.append(share)
        for rank, report in sorted(reports.items()):
            for file in report["own"]:
                self._see(directory, rank, file)
                files.append(file)
        manifest = self._manifest(request, attempt, reports, held, files)
        written = self._commit(directory, manifest, request)
        self._own_bytes.update({rank: sum(file["size"] for file in report["own"]) for rank, report in reports.items()})
        self._reported.update(
            {rank: {"local": report["local"], "objects": report["objects"]} for rank, report in reports.items()}
        )
        self._go_round()
        self.frozen.committed()
        return Committed(directory, manifest.tensor_bytes, missing, bool(layout.frozen), written)

    def _write(self, directory: Path, request: Request, make_room: Callable[[int], None]) -> list[Json]:
        """Rank 0's own part."""
        layout, files = request.layout, []
        if layout.frozen:
            self.frozen.begin(layout.frozen, request.buffer)
        if layout.share or not layout.frozen:
            files.append(write_file(directory / "00000.safetensors", layout.share, request.buffer))
        if layout.frozen:
            files.append(self._write_frozen(directory / FROZEN, request, make_room))
        return files

    def _write_frozen(self, path: Path, request: Request, make_room: Callable[[int], None]) -> Json:
        """The file of what does not change: by hard link where that is safe, else written."""
        pieces, buffer = request.layout.frozen, request.buffer
        uncounted = self.frozen.may_link(pieces)
        record = self.frozen.link(path.parent)
        if record is None:
            if uncounted:
                make_room(sum(piece.size for piece in pieces) + _MARGIN)
            record = write_file(path, pieces, buffer)
            self.frozen.wrote(path, record)
        buffer.keep(pieces, [row[7] for row in record["pieces"]])
        if self._announced != request.layout.still:
            self._announced = request.layout.still
            self._channel.post("frozen", sorted(request.layout.still))
        return record

    def _expected(self, step: int) -> list[int]:
        """The other ranks to wait for: those that live, and did not stay away from the last save."""
        self._absent = {rank for rank in self._absent if not self._came(rank, step)}
        return [rank for rank in range(1, self._world.size) if rank not in self._absent]

    def _here(self, rank: int) -> list[int | None]:
        """The last two steps for which a rank has called save, the later one last. It is done with all others."""
        return self._channel.peek(f"here/{self._holder.number}", rank) or [None, None]

    def _came(self, rank: int, step: int) -> bool:
        """Whether a rank has called save for this step, and may still be at it."""
        return step in self._here(rank)

    def _passed_by(self, rank: int, step: int) -> bool:
        """Whether a rank has called save for a later step without this one: it will not come."""
        last = self._here(rank)[1]
        return last is not None and last > step and not self._came(rank, step)

    def _only_there(self, request: Request, rank: int) -> list[str]:
        """What is lost without that rank, as far as rank 0 knows from its own state and the rank's last report."""
        alone = [n for n, t in request.tensors.items() if t.placement in (Placement.LOCAL, Placement.SHARDED)]
        before = self._reported.get(rank, {})
        return [*alone, *before.get("local", ()), *before.get("objects", ())]

    def _judge(self, request: Request, call: Json, reports: dict[int, Json], missing: dict[int, Json]) -> None:
        """Raise SaveError where bytes are lost; otherwise say who did not come, once.

        Args:
            missing: what the ranks that did not report had said that they hold.
        """
        for rank, report in reports.items():
            if "structure" in report:
                raise SaveError(
                    f"step {request.step} was not saved: rank {rank} has another structure than rank 0. "
                    + difference(describe(request.tensors), report["structure"], rank)
                )
            if "error" in report:
                raise SaveError(
                    f"step {request.step} was not saved: rank {rank} could not write what only it has: "
                    f"{report['error']}. The checkpoints before it are untouched."
                )
        died = []
        for rank, held in missing.items():
            why = self._channel.why_gone(rank)
            came = self._came(rank, request.step)
            if why:
                fate = f"is gone ({why})"
            elif came:
                fate = f"did not finish its part within {request.deadline:.0f} s"
            else:
                fate = f"did not call save({request.step})"
            alone = self._only_there(request, rank)
            alone += [name for what in held if what != "random" for name in differing_names(held[what], call[what])]
            if alone:
                raise SaveError(
                    f"step {request.step} was not saved: rank {rank} {fate}, and only it had {some(alone)}. All ranks "
                    "must call save. The checkpoints before it are untouched."
                )
            known = rank in self._absent
            self._absent.add(rank)
            if why and "random" not in held and rank not in self._dead:
                self._dead.add(rank)
                if not self._channel.peek("left", rank) and request.parent is not None:
                    died.append(f"rank {rank} {fate}")
                    continue
            if known:
                continue
            if why or came:
                _log.warning("rank %d %s: rank 0 completes step %d without it", rank, fate, request.step)
            else:
                _log.warning(
                    "rank %d did not call save(%d). All ranks should call save, not only rank 0: without them the "
                    "checkpoint holds rank 0's state, and no random state of rank %d. It is not waited for any more.",
                    rank,
                    request.step,
                    rank,
                )
        if died:
            # A training that ends with the rank is resumed exactly, from the checkpoint before; one that can do without
            # it is not held up for long.
            raise SaveError(
                f"step {request.step} was not saved: {'; '.join(died)} before it gave its random state, without which "
                "nothing that resumes from here could be exact. The checkpoints before it are untouched. If the "
                "training goes on, the next save is completed without."
            )

    def _accept(
        self, directory: Path, writer: int, report: Json | None, expected: Json, planned: tuple[int, ...]
    ) -> Json | None:
        """A writer's share as it reported it, or None where rank 0 has to write it."""
        if report is None:
            return None
        if "refused" in report:
            self._leave_out(writer, report["refused"])
            return None
        share = report.get("share")
        if share is None:
            return None
        wrong = [
            got[0]
            for got, own in zip(share["pieces"], expected, strict=True)
            if [got[0], got[3], got[4], got[7]] != own
        ]
        if wrong:
            _log.warning(
                "the replicas have drifted apart: %s differ between rank 0 and rank %d. Rank 0's are saved. Look for a "
                "rank that skips steps, or for weights that are changed outside of DDP.",
                some(wrong),
                writer,
            )
            return None
        try:
            self._see(directory, writer, share)
        except SaveError as error:
            self._leave_out(writer, str(error))
            return None
        return share

    def _go_round(self) -> None:
        """After a commit: shares change hands, and left-out writers are tried again after a while."""
        before = self.writers
        left = {writer: saves - 1 for writer, saves in self._left_out.items() if saves > 1}
        if len(left) != len(self._left_out):
            _log.info("the writing is shared among ranks %s again", [w for w in self._all_writers if w not in left])
        self._left_out = left
        self._saves += 1
        if self.writers != before:
            # Posted before the outcome: no rank begins the next save without it.
            self._channel.post("writers", list(self.writers))

    def _leave_out(self, writer: int, why: str) -> None:
        self._left_out[writer] = _RETRY_WIDTH
        _log.warning(
            "rank %d could not write its share (%s): rank 0 wrote it, and the next %d saves do without that writer",
            writer,
            why,
            _RETRY_WIDTH,
        )

    @staticmethod
    def _see(directory: Path, rank: int, file: Json) -> None:
        """Raise SaveError when a file that a rank reported is not the one that rank 0 sees."""
        path = directory / str(file["file"])
        try:
            size: int | str = disk.file_size(path)
        except OSError as error:
            size = str(error)
        if size != file["size"]:
            raise SaveError(
                f"rank {rank} wrote {path} ({file['size']} bytes), but rank 0 sees there: {size}. The ranks do not see "
                "the same disk."
            )

    def _manifest(
        self, request: Request, attempt: str, reports: dict[int, Json], held: dict[int, Json], files: list[Json]
    ) -> Manifest:
        tensors: dict[str, tuple[str, tuple[int, ...], list[Chunk]]] = {}
        shards = []
        for index, file in enumerate(files):
            shards.append(ShardRecord(file["file"], file["size"], file["header_size"], file["header_checksum"]))
            for label, dtype, whole, offsets, shape, begin, end, digest in file["pieces"]:
                chunk = Chunk(index, begin, end, digest, tuple(offsets), tuple(shape))
                tensors.setdefault(label, (dtype, tuple(whole), []))[2].append(chunk)
        ranks = {0: RankRecord(request.random)}
        for rank in range(1, self._world.size):
            report = reports.get(rank) or held.get(rank) or {"random": None}
            # One that did not report has nothing of its own beside its random state: else the save was given up.
            own = report if rank in reports else {"objects": {}, "local": {}}
            ranks[rank] = RankRecord(report["random"], own["objects"], own["local"])
        return Manifest(
            step=request.step,
            generation=self._holder.number,
            attempt=attempt,
            parent=request.parent,
            time=time.time(),
            world_size=self._world.size,
            metrics=request.metrics,
            versions=request.versions,
            program=request.program,
            objects=request.objects,
            kinds=request.kinds,
            tensors={
                name: TensorRecord(dtype, shape, tuple(chunks)) for name, (dtype, shape, chunks) in tensors.items()
            },
            ranks=ranks,
            shards=tuple(shards),
            strides={
                name: part.strides
                for name, part in request.tensors.items()
                if part.strides is not None and name in tensors
            },
        )

    def _commit(self, directory: Path, manifest: Manifest, request: Request) -> Written:
        # What we could not read back ourselves is not committed: a hole left by a lost rank shows here.
        check(manifest, str(directory / NAME))
        temporary = directory / _TEMPORARY
        data = manifest.to_bytes()
        with disk.NewFile(temporary) as file:
            file.write(data)
            file.sync()
        # The names of the shards and of the directory itself must be on the disk before the commit is.
        disk.sync_dir(directory)
        disk.sync_dir(self._run)
        if self._group is not None:
            for name in disk.names(directory):
                disk.give_to_group(directory / name, self._group)
        request.buffer.confirm()  # Raises when the copy turns out not to be of one moment.
        self._holder.check()
        try:
            disk.replace(temporary, directory / NAME)
        except OSError as error:
            if not disk.is_held(error):
                raise
            raise _HeldError(
                f"step {manifest.step} was not saved: another program has {temporary} open, which so could not be "
                f"renamed to {NAME} ({error}). The complete data are in {directory}: when that program lets go, the "
                "next save or close() makes a checkpoint of them. The checkpoints before it are untouched."
            ) from error
        disk.sync_dir(directory)
        return Written(manifest, checksum(data))

    def clear(self) -> None:
        """Finish the attempts that only lack the name of their manifest, and delete the directories of failed ones into
        which nobody writes any more.
        """
        self._finish_held()
        left = []
        for entry, prefix, ranks in self._litter:
            busy = {
                rank
                for rank in ranks
                if rank in self._channel.connected and self._channel.peek(prefix + "report", rank) is None
            }
            if busy:
                left.append((entry, prefix, busy))
                continue
            try:
                self._holder.check()
                if disk.exists(entry.path):
                    # It may hold a manifest, where the failure came after that was put in place.
                    catalog.delete(entry, patience=_CLEAR_PATIENCE)
                self._channel.forget(prefix)
            except (OSError, LastGoodError) as error:
                _log.warning("the left-over of a failed save, %s, could not be deleted yet: %s", entry.path, error)
                left.append((entry, prefix, set()))
        self._litter = left

    def _finish_held(self) -> None:
        left = []
        for entry, prefix in self._complete:
            try:
                self._holder.check()
                disk.replace(entry.path / _TEMPORARY, entry.path / NAME, patience=_CLEAR_PATIENCE)
                disk.sync_dir(entry.path)
            except (OSError, LastGoodError) as error:
                if entry.is_committed():
                    continue  # Somebody has renamed it by hand.
                _log.warning("%s is complete, but is no checkpoint yet: %s", entry.path, error)
                left.append((entry, prefix))
                continue
            self._channel.forget(prefix)
            _log.warning("%s, whose manifest another program had open, is a checkpoint now", entry.path)
        self._complete = left
