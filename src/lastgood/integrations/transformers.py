"""Hugging Face's Trainer: ``train()`` goes on by itself, from the last checkpoint of which every byte verifies.

::

    trainer = LastGoodTrainer(model=model, args=arguments, train_dataset=data)
    trainer.train()          # starts, or goes on exactly where the last good checkpoint was

The Trainer writes its ``checkpoint-N`` directories itself, one file after the other, some from every rank, and takes
the one with the highest number when it resumes, whole or not. Here each is *sealed* when all ranks have written: rank 0
syncs every file and then writes ``lastgood.json``, with the size and checksum of each, atomically. A directory without
that record does not count. The files stay the Trainer's own: ``from_pretrained`` opens them.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lastgood import disk, files
from lastgood.errors import DamagedError, LastGoodError, SaveError
from lastgood.manifest import checksum

__all__ = ["LastGoodMixin", "LastGoodTrainer", "Seal", "last_good"]

_log = logging.getLogger("lastgood")
_RECORD = "lastgood.json"
_MARK = ".lastgood-sealed"
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,15})")
_PREFIX = re.compile(rb'\{"lastgood_sealed":([0-9]{1,9}),"checksum":"([0-9a-f]{32})","record":')
_FORMAT = 1
_FAILURES = 3
_BLOCK = 8 << 20


@dataclass(frozen=True, slots=True)
class _Sealed:
    """A checkpoint directory with a record that is whole."""

    directory: Path
    step: int
    sequence: int
    """Grows with every seal: a step that was reached again is newer than what was abandoned."""
    files: dict[str, Any]
    """By path inside the directory: size and checksum."""


def last_good(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint of which every byte verifies; None where none was ever sealed.

    Raises:
        DamagedError: there are sealed checkpoints, but none verifies.
    """
    output = Path(output_dir)
    reasons = []
    for directory in _newest_first(output):
        wrong = _damage(directory)
        if wrong is None:
            return directory
        _log.warning("%s is damaged and skipped: %s", directory, wrong)
        reasons.append(wrong)
    if reasons:
        raise DamagedError(f"no checkpoint in {output} verifies. {'; '.join(reasons)}")
    return None


class Seal(TrainerCallback):
    """Seals every checkpoint that the Trainer saves. Every rank has one; they wait for each other at each save.

    Raises (in ``train``):
        SaveError: three checkpoints in a row could not be sealed. One alone is an error in the log.
    """

    def __init__(self) -> None:
        self._failures = 0

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # Every rank writes its own random states.
        if not state.is_world_process_zero:
            return
        directory = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        try:
            _seal(directory)
            self._failures = 0
            _log.info("step %d sealed: %s", state.global_step, directory)
        except (OSError, LastGoodError) as error:
            self._failures += 1
            _log.error("%s could not be sealed and does not count: %s", directory, error)
            if self._failures >= _FAILURES:
                raise SaveError(
                    f"the last {_FAILURES} checkpoints could not be sealed; the last reason: {error}. Training goes on "
                    "without a net: repair the cause, then start again."
                ) from error


class LastGoodMixin:
    """For a Trainer of one's own: ``class MyTrainer(LastGoodMixin, Trainer)``.

    Raises (when it is made):
        LastGoodError: the arguments would leave nothing to resume from.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        trainer: Any = self
        if trainer.args.save_only_model:
            raise LastGoodError("save_only_model=True saves no optimizer: training could not go on from it exactly")
        if trainer.args.save_total_limit is not None and trainer.args.save_total_limit < 2:
            # The Trainer deletes the one before when the files of the new one are not known to be on the disk.
            raise LastGoodError("save_total_limit=1 leaves nothing to fall back to: use 2 or more")
        trainer.add_callback(Seal())

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Train, from the last good checkpoint.

        Args:
            resume_from_checkpoint: None or True for that; a path rolls back to that one, which is verified too. False
                starts anew and wants a directory without checkpoints.
            options: what else ``Trainer.train`` takes.

        Raises:
            DamagedError: there are checkpoints, but none verifies, or not the one that was asked for.
            LastGoodError: the directory holds checkpoints that were saved without this class.
        """
        trainer: Any = self
        found: list[Any] = [None, None]
        if trainer.is_world_process_zero():
            try:
                found = [_choose(Path(trainer.args.output_dir), resume_from_checkpoint), None]
            except (OSError, LastGoodError) as error:
                found = [None, error]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        chosen, refusal = found
        if refusal is not None:
            raise refusal
        if chosen is not None and trainer.is_world_process_zero():
            _log.info("going on from %s", chosen)
        base: Any = super()
        return base.train(resume_from_checkpoint=chosen, **options)


class LastGoodTrainer(LastGoodMixin, Trainer):  # type: ignore[misc]
    """The Trainer, resuming by itself."""


def _choose(output: Path, wanted: str | bool | None) -> str | None:
    """Rank 0: what to resume from; puts out of the Trainer's way what does not count."""
    disk.make_dirs(output)
    present = _checkpoints(output)
    if wanted is False and present:
        raise LastGoodError(f"{output} has checkpoints ({present[0].name}): use another directory to start anew")
    if present and not disk.exists(output / _MARK) and not isinstance(wanted, str):
        raise LastGoodError(
            f"{output} has checkpoints that were saved without seals ({present[0].name}), so nobody knows whether they "
            "are whole. Name the one to go on from: train(resume_from_checkpoint=PATH)."
        )
    if isinstance(wanted, str):
        chosen: Path | None = Path(wanted)
        assert chosen is not None
        if disk.exists(chosen / _RECORD) and (wrong := _damage(chosen)) is not None:
            raise DamagedError(f"{wrong}. Leave resume_from_checkpoint out to go on from the last good one.")
    else:
        chosen = last_good(output)
    if chosen is not None and not disk.is_dir(chosen):
        raise LastGoodError(f"{chosen}: there is no such checkpoint")
    step = -1 if chosen is None else _step(chosen)
    for directory in present:
        if _step(directory) > step:
            _set_aside(directory)
    if not disk.exists(output / _MARK):
        files.replace_file(output / _MARK, lambda file: _write_all(file, b"checkpoints here are sealed by lastgood\n"))
    return None if chosen is None else str(chosen)


def _set_aside(directory: Path) -> None:
    """Give what lies after the chosen checkpoint a name that the Trainer's own deletion does not count."""
    number = 0
    while disk.exists(target := directory.with_name(f"old-{directory.name}-{number}")):
        number += 1
    disk.replace(directory, target)
    disk.sync_dir(directory.parent)
    _log.warning("%s is damaged, unfinished or abandoned; it is now %s and may be deleted", directory, target.name)


def _checkpoints(output: Path) -> list[Path]:
    return [output / name for name in disk.names(output) if _CHECKPOINT.fullmatch(name)]


def _step(directory: Path) -> int:
    match = _CHECKPOINT.fullmatch(directory.name)
    return int(match[1]) if match else -1


def _newest_first(output: Path) -> Iterator[Path]:
    """Sealed checkpoints, without what a roll-back abandoned; those whose record is damaged by their step."""
    known = []
    for directory in _checkpoints(output):
        if disk.exists(directory / _RECORD):
            sealed = _read_record(directory)
            known.append((-1 if isinstance(sealed, str) else sealed.sequence, _step(directory), directory))
    lowest: int | None = None
    for sequence, step, directory in sorted(known, reverse=True):
        if lowest is None or step < lowest or sequence < 0:
            lowest = step if sequence >= 0 else lowest
            yield directory


def _seal(directory: Path) -> None:
    """Sync every file, then write the record."""
    found = {}
    for path in _files(directory):
        disk.sync_file(path)
        size, digest = _sum(path)
        found[path.relative_to(directory).as_posix()] = [size, digest]
        for parent in path.relative_to(directory).parents:
            disk.sync_dir(directory / parent)
    disk.sync_dir(directory.parent)
    before = [_read_record(other) for other in _checkpoints(directory.parent) if disk.exists(other / _RECORD)]
    sequence = 1 + max((sealed.sequence for sealed in before if isinstance(sealed, _Sealed)), default=0)
    body = json.dumps({"sequence": sequence, "files": found}, separators=(",", ":")).encode()
    data = b'{"lastgood_sealed":%d,"checksum":"%s","record":%s}\n' % (_FORMAT, checksum(body).encode(), body)
    files.replace_file(directory / _RECORD, lambda file: _write_all(file, data))


def _files(directory: Path) -> Iterator[Path]:
    for name in disk.names(directory):
        path = directory / name
        if disk.is_dir(path):
            yield from _files(path)
        elif name != _RECORD and not files.is_temporary(name) and not files.is_of_macos(name):
            yield path


def _read_record(directory: Path) -> _Sealed | str:
    """The record, or what is wrong with it."""
    path = directory / _RECORD
    try:
        data = disk.read_bytes(path, limit=1 << 28)
        match = _PREFIX.match(data)
        body = data[match.end() : -2] if match else b""
        if match is None or not data.endswith(b"}\n") or checksum(body) != match[2].decode():
            return f"{path} is short or was altered: its checksum does not match"
        record = json.loads(body)
        return _Sealed(directory, _step(directory), int(record["sequence"]), dict(record["files"]))
    except (OSError, TypeError, ValueError, LookupError) as error:
        return f"{path} cannot be read: {error}"


def _damage(directory: Path) -> str | None:
    """What is wrong with a sealed checkpoint; None where every byte is as it was."""
    sealed = _read_record(directory)
    if isinstance(sealed, str):
        return sealed
    here = {path.relative_to(directory).as_posix() for path in _files(directory)}
    for name, (size, digest) in sealed.files.items():
        if files.is_of_macos(Path(name).name):
            continue  # Of a record of before they were left out.
        if name not in here:
            return f"{directory / name} is missing"
        try:
            found = _sum(directory / name)
        except OSError as error:
            return f"{directory / name} cannot be read: {error}"
        if found != (size, digest):
            return f"{directory / name} was altered: size or checksum does not match"
    return None


def _sum(path: Path) -> tuple[int, str]:
    state, size = xxhash.xxh3_128(), 0
    with disk.open_read(path) as file:
        disk.drop_cache(file)
        while block := file.read(_BLOCK):
            state.update(block)
            size += len(block)
    return size, state.hexdigest()


def _write_all(file: Any, data: bytes) -> None:
    file.write(data)
