"""Storage for ``torch.distributed.checkpoint``: saves that are whole, durable and verified, FSDP2 and DTensor included.

::

    dcp.save(state_dict, storage_writer=Writer("runs/voice", step=step))
    dcp.load(state_dict, storage_reader=Reader("runs/voice"))

A checkpoint exists when its record does, and the coordinator writes the record only after every rank has written,
synced and read back its part (:mod:`lastgood.integrations.dcp_record` has the layout). The reader takes the newest
checkpoint of which every byte verifies, the same one on all ranks. Nothing in a file is executed: objects that are not
tensors are read with :func:`lastgood.torchfile.read`. One job at a time may write a run.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from lastgood import disk, files, torchfile
from lastgood.dtypes import dtype_name
from lastgood.errors import DamagedError, LastGoodError, SaveError
from lastgood.integrations import dcp_record
from lastgood.integrations.dcp_record import Item, Place
from lastgood.manifest import checksum

__all__ = ["Reader", "Writer", "newest_step"]

_log = logging.getLogger("lastgood")
_ALIGNMENT = 64
"""Bytes: items begin at multiples of it, so that a tensor can be used where it was read."""


def newest_step(run: str | os.PathLike[str]) -> int | None:
    """The step of the newest committed checkpoint of a run; None in a new one, which has nothing to load."""
    return next((place.step for place in dcp_record.branch(dcp_record.committed(Path(run)))), None)


class Writer(StorageWriter):
    """Writes checkpoints of ``dcp.save`` and ``dcp.async_save``. Every rank makes one, with the same arguments.

    Args:
        run: directory of the run; made where it does not exist. All ranks must see the same one.
        step: the step to save; without it, one more than the highest in the run. A ``checkpoint_id`` given to
            ``dcp.save`` goes before both: it is the path of the checkpoint's own directory and ends in its step
            (``outputs/checkpoint/step-10``).
        keep: how many checkpoints to keep, 2 or more; by default all.
        allow: classes that objects in the state may be of, beyond tensors and plain containers.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | None = None,
        step: int | None = None,
        *,
        keep: int | None = None,
        allow: Iterable[Any] = (),
    ) -> None:
        super().__init__()
        if step is not None and (type(step) is not int or step < 0):
            raise LastGoodError(f"Writer(step={step!r}): a step is a whole number of steps done, 0 or more")
        if keep is not None and (type(keep) is not int or keep < 2):
            raise LastGoodError(f"Writer(keep={keep!r}): with fewer than 2 there is nothing to fall back to")
        self._run = None if run is None else Path(run).absolute()
        self._step, self._keep, self._allow = step, keep, tuple(allow)
        self._given: Path | None = None
        self._directory = Path()
        self._last = -1

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        return self._given or self._run or ""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._given = None if checkpoint_id is None else Path(checkpoint_id).absolute()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise LastGoodError("lastgood saves one checkpoint for all ranks: call dcp.save with use_collectives=True")
        self._rank = _rank(kwargs)
        if self._given is not None:
            self._directory = self._given
        elif self._run is not None:
            self._directory = self._run / f"step-{self._next_step(self._run):08d}"
        else:
            raise LastGoodError("Writer() needs a run directory, or dcp.save a checkpoint_id")
        step = dcp_record.step_of(self._directory.name)
        if step is None:
            raise LastGoodError(f"checkpoint_id={self._directory}: its name must end in the step, as in step-10")
        self._last = step

    def _next_step(self, run: Path) -> int:
        if self._step is not None:
            return self._step
        # No rank makes a directory before all ranks have planned, so all find the same.
        return max([self._last, *dcp_record.steps(run)]) + 1

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        disk.make_dirs(self._directory)
        disk.sync_names(self._directory)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write, sync and read back this rank's part.

        Raises:
            SaveError: the disk refused, or gave back other bytes than it was given. Nothing is left behind.
        """
        name = f"part-{self._rank:05d}-{secrets.token_hex(8)}.bin"
        path = self._directory / name
        results: list[WriteResult] = []
        try:
            if plan.items:
                with disk.NewFile(path) as file:
                    results = [self._write_item(file, name, item, planner) for item in plan.items]
                    file.sync()
                disk.sync_dir(self._directory)
                wrong = dcp_record.damage(self._directory, [result.storage_data[1] for result in results])
                if wrong is not None:
                    raise SaveError(f"{wrong}. It was just written: the disk does not keep what it is given.")
        except BaseException as error:
            with contextlib.suppress(OSError):
                disk.remove(path, missing_ok=True, patience=0)
            if isinstance(error, OSError):
                raise SaveError(f"{self._directory} was not saved: {error}. Earlier checkpoints are whole.") from error
            raise
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_item(self, file: disk.NewFile, name: str, item: WriteItem, planner: SavePlanner) -> WriteResult:
        value: Any = planner.resolve_data(item)
        if item.type is WriteItemType.BYTE_IO:
            data = memoryview(value.getbuffer())
            self._check_object(item.index.fqn, data)
        else:
            value = _plain(item.index.fqn, value)
            data = memoryview((ctypes.c_char * value.nbytes).from_address(value.data_ptr() or 1)).cast("B")
        if padding := -file.size % _ALIGNMENT:
            file.write(bytes(padding))
        place = Item(name, file.size, len(data), checksum(data))
        file.write(data)
        return WriteResult(item.index, len(data), (str(self._directory), place))

    def _check_object(self, name: str, data: memoryview) -> None:
        """What could not be read back is refused now, not when it is needed."""
        try:
            torchfile.read(io.BytesIO(data), allow=self._allow)
        except LastGoodError as error:
            raise SaveError(
                f"{name} cannot be saved: {error}. Turn it into numbers, strings, lists, dicts or tensors, or pass its "
                "class in Writer(allow=[...]) and Reader(allow=[...])."
            ) from error

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit: the record is written when all parts are on the disk. The coordinator only."""
        items: dict[MetadataIndex, Item] = {}
        for result in (result for part in results for result in part):
            where, item = result.storage_data
            if where != str(self._directory):
                raise SaveError(
                    f"one rank wrote to {where}, the coordinator to {self._directory}. Nothing was committed. Give all "
                    "ranks the same step."
                )
            items[result.index] = item
        directory, run = self._directory, self._directory.parent
        if missing := {item.file for item in items.values()} - set(disk.names(directory)):
            raise SaveError(f"{directory}: the coordinator does not see {sorted(missing)[0]}: another disk?")
        before = [*dcp_record.committed(run)]
        sequence = 1 + max((place.sequence for place in before), default=0)
        data = dcp_record.encode(metadata, items, self._last)
        try:
            files.replace_file(directory / dcp_record.record_name(sequence), lambda file: _write_all(file, data))
        except OSError as error:
            raise SaveError(f"{directory} was not saved: {error}. Earlier checkpoints are whole.") from error
        _log.info("step %d committed: %s", self._last, directory)
        dcp_record.clean(directory, sequence, {item.file for item in items.values()})
        if self._keep is not None:
            for place in dcp_record.expired(run, self._keep):
                dcp_record.clean(place.directory, None, set())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return dcp_record.step_of(Path(checkpoint_id).name) is not None


class Reader(StorageReader):
    """Reads the newest checkpoint of which every byte verifies. Every rank makes one, with the same arguments.

    The ranks share the verifying, and skip together what is damaged, each with a warning. :attr:`step` says after the
    load which one it was.

    Args:
        run: directory of the run.
        step: this step and no other. A ``checkpoint_id`` given to ``dcp.load`` means the same, by its directory.
        allow: as for the :class:`Writer`.
        process_group: as given to ``dcp.load``.
        no_dist: as given to ``dcp.load``: this process reads alone.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | None = None,
        step: int | None = None,
        *,
        allow: Iterable[Any] = (),
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
    ) -> None:
        super().__init__()
        self._run = None if run is None else Path(run).absolute()
        self._wanted, self._allow = step, tuple(allow)
        self._group, self._alone = process_group, no_dist
        self._given: Path | None = None
        self._items: dict[MetadataIndex, Item] = {}
        self._directory = Path()
        self.step: int | None = None

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        return self._given or self._run or ""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._given = None if checkpoint_id is None else Path(checkpoint_id).absolute()

    # Not **kwargs: by that name torch sees that a reader takes a rank, and would ask again after a failure.
    def read_metadata(self, *args: Any, **_: Any) -> Metadata:
        """Choose the checkpoint, together with the other ranks.

        Raises:
            DamagedError: there are checkpoints, but none verifies, or not the one that was asked for.
            LastGoodError: there is none.
        """
        together = not self._alone and dist.is_available() and dist.is_initialized()
        rank, size = (dist.get_rank(self._group), dist.get_world_size(self._group)) if together else (0, 1)
        candidates = self._candidates()
        if together:
            heard: list[Any] = [None] * size
            dist.all_gather_object(heard, candidates, group=self._group)
            candidates = heard[0]  # Network file systems show a new file to some machines later than to others.
        if not candidates:
            raise LastGoodError(f"{self.checkpoint_id} has no checkpoint: there is nothing to load")
        reasons = []
        for place in candidates:
            wrong, found = self._check(place, rank, size)
            if together:
                verdicts: list[str | None] = [None] * size
                dist.all_gather_object(verdicts, wrong, group=self._group)
                wrong = next((text for text in verdicts if text is not None), None)
            if wrong is None and found is not None:
                self._directory, self.step = place.directory, place.step
                metadata, self._items = found
                return cast(Metadata, metadata)
            reasons.append(f"step {place.step}: {wrong}")
            if rank == 0:
                _log.warning("%s is damaged and skipped: %s", place.directory, wrong)
        raise DamagedError(f"no checkpoint in {self.checkpoint_id} verifies. {'; '.join(reasons)}")

    def _candidates(self) -> list[Place]:
        if self._given is not None:
            return [place for place in dcp_record.committed(self._given.parent) if place.directory == self._given]
        if self._run is None:
            raise LastGoodError("Reader() needs a run directory, or dcp.load a checkpoint_id")
        places = dcp_record.committed(self._run)
        found = list(dcp_record.branch(places))
        if found and self._wanted is None:
            self._report_unfinished(self._run, found[0])
        wanted = self._wanted
        return found if wanted is None else [place for place in reversed(places) if place.step == wanted]

    def _report_unfinished(self, run: Path, newest: Place) -> None:
        unfinished = [
            name
            for name in disk.names(run)
            if (step := dcp_record.step_of(name)) is not None
            and step > newest.step
            and disk.is_dir(run / name)
            and not dcp_record.sequences(run / name)
        ]
        if unfinished:
            _log.warning("%s was not finished and is skipped", ", ".join(str(run / name) for name in unfinished))

    @staticmethod
    def _check(place: Place, rank: int, size: int) -> tuple[str | None, Any]:
        try:
            metadata, items = dcp_record.decode(place)
        except DamagedError as error:
            return str(error), None
        parts = sorted({item.file for item in items.values()})
        share = set(parts[rank::size])
        return dcp_record.damage(place.directory, [i for i in items.values() if i.file in share]), (metadata, items)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._tensors = metadata.state_dict_metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Give the planner what it asks for; each item is checked once more, before it is used."""
        by_item: dict[MetadataIndex, list[ReadItem]] = {}
        for request in plan.items:
            by_item.setdefault(request.storage_index, []).append(request)
        for index, requests in by_item.items():
            raw = self._read(self._items[index])
            for request in requests:
                if request.type is LoadItemType.BYTE_IO:
                    planner.load_bytes(request, self._safe_bytes(raw))
                else:
                    self._give_tensor(raw, index, request, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read(self, item: Item) -> bytearray:
        raw = bytearray(item.length)
        try:
            with disk.open_read(self._directory / item.file) as file:
                got = disk.read_into(file, item.offset, memoryview(raw))
        except OSError as error:
            raise DamagedError(f"{self._directory / item.file} cannot be read: {error}") from error
        if (wrong := dcp_record.mismatch(self._directory, item, memoryview(raw), got)) is not None:
            raise DamagedError(f"{wrong}. It was whole when the load began: load again, from an earlier checkpoint.")
        return raw

    def _safe_bytes(self, raw: bytearray) -> io.BytesIO:
        # torch's planner unpickles what it is given, with whatever code it names. It gets bytes that were made here,
        # from an object that was read without running any.
        again = io.BytesIO()
        torch.save(torchfile.read(io.BytesIO(raw), allow=self._allow), again)
        again.seek(0)
        return again

    def _give_tensor(self, raw: bytearray, index: MetadataIndex, request: ReadItem, planner: LoadPlanner) -> None:
        entry: Any = self._tensors[index.fqn]
        box = next(chunk for chunk in entry.chunks if index.offset is None or chunk.offsets == index.offset)
        dtype = entry.properties.dtype
        if box.sizes.numel() * dtype.itemsize != len(raw):
            raise DamagedError(f"{self._directory}: {index.fqn} has {len(raw)} bytes, which do not fit its shape")
        saved = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype, device="cpu")
        saved = saved.reshape(box.sizes)
        for dimension, (begin, length) in enumerate(zip(request.storage_offsets, request.lengths, strict=True)):
            saved = saved.narrow(dimension, begin, length)
        target = planner.resolve_tensor(request).detach()
        if target.shape != saved.shape:
            raise LastGoodError(f"{index.fqn}: shape {tuple(saved.shape)} was saved, {tuple(target.shape)} is wanted")
        target.copy_(saved)
        planner.commit_tensor(request, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Writer.validate_checkpoint_id(checkpoint_id)


def _rank(options: dict[str, Any]) -> int:
    rank = options.get("rank")  # torch tells it since 2.8.
    if rank is None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return int(rank)


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory, without gaps."""
    dtype_name(tensor.dtype, name)
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise SaveError(f"{name}: a sparse or nested tensor cannot be saved. Convert it to a dense one.")
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _write_all(file: Any, data: bytes) -> None:
    file.write(data)
