"""The promises as ``lastgood demo`` looks at them: what was seen of each, and whether it was kept."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lastgood import catalog, disk, files
from lastgood.catalog import Entry
from lastgood.checkpointer import Checkpointer
from lastgood.cli.i18n import _
from lastgood.demo.train import EVERY, Digits, accuracy
from lastgood.errors import DamagedError, RefusedError
from lastgood.loading import nbytes, read_tensors
from lastgood.manifest import Manifest
from lastgood.program import read_events

_SLOW = 0.5
"""Seconds that every sync takes on the disk that is made slow."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A promise, what was seen of it, and whether it was kept."""

    promise: str
    seen: str
    kept: bool


def all_or_nothing(torn: Entry, run: Path) -> Finding:
    """After a kill in the middle of the save `torn`."""
    size = sum(disk.file_size(torn.path / name) for name in disk.names(torn.path))
    good = catalog.committed(run)
    for entry in good:
        catalog.check_full(entry)
    seen = _(
        "step {step} was torn ({size:,} bytes, no manifest): it is no checkpoint; the {count} before it verify",
        step=torn.step,
        size=size,
        count=len(good),
    )
    return Finding(_("all or nothing"), seen, not torn.is_committed() and bool(good))


def compare(run: Path, reference: Path, damaged: Entry, nproc: int, output: str) -> list[Finding]:
    """What the resumed training came to, beside the undisturbed one.

    Args:
        run: killed, damaged and resumed.
        reference: undisturbed.
        damaged: the checkpoint of `run` in which a bit was flipped.
        nproc: how many processes trained.
        output: what the resumed training printed; the accuracy is its last word.
    """
    events = read_events(run)
    skipped = [event["checkpoint"] for event in events if event["event"] == "skip"]
    restored = [event["step"] for event in events if event["event"] == "restore"]
    last, wanted = catalog.newest(run), catalog.newest(reference)
    assert last is not None and wanted is not None
    mine, theirs = catalog.check_full(last), catalog.check_full(wanted)
    written = sum(shard.size - shard.header_size for shard in mine.shards)
    ratio = written / nbytes(mine)
    try:
        catalog.check_full(damaged)
        noticed = False
    except DamagedError:
        noticed = True
    equal, total = _equal_tensors(last, mine, wanted, theirs)
    random = all(mine.ranks[rank].random == theirs.ranks[rank].random for rank in range(nproc))
    alone = f"{_alone(run):.4f}"
    printed = output.split()[-1]
    return [
        Finding(
            _("one commit"),
            _(
                "{nproc} processes called save, step {step} has 1 manifest and {ratio:.2f} copies of the state",
                nproc=nproc,
                step=mine.step,
                ratio=ratio,
            ),
            ratio == 1.0,
        ),
        Finding(
            _("last good"),
            _(
                "the flipped bit was noticed: {noticed}; skipped: {skipped}; resumed at step {step}",
                noticed=_("yes") if noticed else _("NO"),
                skipped=", ".join(skipped) or "-",
                step=restored[-1],
            ),
            noticed and skipped == [damaged.name] and restored[-1] == damaged.step - EVERY,
        ),
        Finding(
            _("same in one process and in many"),
            _(
                "saved by {nproc}, restored by 1: accuracy {alone}; the training printed: {printed}",
                nproc=nproc,
                alone=alone,
                printed=printed,
            ),
            alone == printed,
        ),
        Finding(
            _("exact resume"),
            _(
                "{equal} of {total} tensors (weights, moments, statistics) equal the undisturbed run's bit by bit; "
                "random states: {random}",
                equal=equal,
                total=total,
                random=_("equal") if random else _("different"),
            ),
            equal == total and random,
        ),
    ]


def _equal_tensors(last: Entry, mine: Manifest, wanted: Entry, theirs: Manifest) -> tuple[int, int]:
    names = sorted(mine.tensors.keys() | theirs.tensors.keys())
    a = read_tensors(last, mine, [name for name in names if name in mine.tensors])
    b = read_tensors(wanted, theirs, [name for name in names if name in theirs.tensors])
    return sum(name in a and name in b and torch.equal(a[name], b[name]) for name in names), len(names)


def _alone(run: Path) -> float:
    """The accuracy of the checkpoint that many processes saved, restored in this one."""
    model = Digits()
    with Checkpointer(run, model=model, rank=0, world_size=1) as ckpt:
        ckpt.restore()
    return accuracy(model)


def never_in_the_way(directory: Path) -> Finding:
    """One save on a disk that is made slow: how long it takes, and how much of that training waits for."""
    with Checkpointer(directory, model=Digits(), rank=0, world_size=1) as ckpt:
        ckpt.save(1).result()
        with _disk_that(_is_slow):
            began = time.monotonic()
            handle = ckpt.save(2)
            stall = time.monotonic() - began
            handle.result()
            seconds = time.monotonic() - began
    seen = _(
        "on a disk that is made slow, a save takes {seconds:.2f} s and holds training up {stall:.1f} ms",
        seconds=seconds,
        stall=stall * 1e3,
    )
    return Finding(_("never in the way"), seen, seconds >= _SLOW and stall < seconds / 10)


def nothing_lost(directory: Path, run: Path) -> Finding:
    """One save that meets a full disk, between two others; and what the retention of `run` deleted."""
    with Checkpointer(directory, model=Digits(), rank=0, world_size=1) as ckpt:
        ckpt.save(1).result()
        with _disk_that(_is_full):
            handle = ckpt.save(2)
            handle.wait()
        left = [entry for entry in catalog.entries(directory) if entry.step == 2]
        ckpt.save(3).result()
    good = catalog.committed(directory)
    for entry in good:
        catalog.check_full(entry)
    steps = [entry.step for entry in good]
    saves = [event for event in read_events(run) if event["event"] == "save"]
    deleted = [(_place(name), _place(event["checkpoint"])) for event in saves for name in event["deleted"]]
    older = all(gone < newer for gone, newer in deleted)
    seen = _(
        "a save that met a full disk: {fate}, {left} directories of it left; steps {steps} verify. In the training, "
        "{deleted} checkpoints were deleted, each after a newer one was read back",
        fate=_("refused") if handle.state == "failed" else _("NOT refused"),
        left=len(left),
        steps=", ".join(map(str, steps)),
        deleted=len(deleted),
    )
    return Finding(_("nothing lost"), seen, handle.state == "failed" and not left and steps == [1, 3] and older)


def _place(name: str) -> tuple[int, int, int]:
    """Of a checkpoint in the order of all."""
    entry = catalog.entry_of(Path(), name)
    assert entry is not None
    return entry.generation, entry.step, entry.attempt


class _Payload:
    """Makes a directory when it is unpickled: code in a file of weights, as an attacker would hide it."""

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self._directory,)


def nothing_executed(directory: Path, run: Path) -> Finding:
    """A file of weights that runs code when it is loaded, and what the checkpoints of `run` consist of."""
    file, mark = directory / "weights.pth", directory / "code-was-run"
    torch.save({"weight": torch.ones(3), "extra": _Payload(mark)}, file)
    torch.load(file, weights_only=False)  # To see that the code works. It is our own.
    works = disk.exists(mark)
    if works:
        mark.rmdir()
    try:
        files.load(file)
        refused = False
    except RefusedError:
        refused = True
    ran = disk.exists(mark)
    kinds = sorted({Path(name).suffix for entry in catalog.committed(run) for name in disk.names(entry.path)})
    seen = _(
        "code hidden in a file of weights, which torch.load(weights_only=False) runs: lastgood.load {fate}; "
        "a checkpoint has files of these kinds only: {kinds}",
        fate=_("RAN IT") if ran else _("refuses the file") if refused else _("does not run it"),
        kinds=", ".join(kinds),
    )
    return Finding(_("nothing executed"), seen, works and refused and not ran and kinds == [".json", ".safetensors"])


@contextmanager
def _disk_that(fault: Callable[[disk.Operation, Literal["before", "after"]], None]) -> Iterator[None]:
    before, disk.observer = disk.observer, fault
    try:
        yield
    finally:
        disk.observer = before


def _is_slow(operation: disk.Operation, when: str) -> None:
    if operation.name == "sync" and when == "before":
        time.sleep(_SLOW)


def _is_full(operation: disk.Operation, when: str) -> None:
    if operation.name == "write" and when == "before" and operation.path.parent.name.startswith("step-"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(operation.path))
