"""Which checkpoints are kept, and the deletion of the others.

Nothing is deleted before something newer is committed and was read back from the disk and verified.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lastgood import catalog, disk
from lastgood.catalog import Entry
from lastgood.errors import DamagedError, LastGoodError
from lastgood.generation import Holder
from lastgood.manifest import Written, checksum
from lastgood.shard import FROZEN

_READ_AGAIN = 16
"""A file that several checkpoints share is read back in full at every so many verifications."""
_log = logging.getLogger("lastgood")
_POLICY = "the retention policy"
_PATIENCE = 1.0
"""Seconds to wait for a program that has open what is to be deleted: it is tried again after every save."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Keep:
    """Which checkpoints are kept. A checkpoint that any of the rules wants is kept; the newest always is."""

    last: int = 3
    """How many of the newest on the present branch. With 1 there is nothing to fall back to."""
    best: int = 0
    """How many of those with the best value of `metric`."""
    metric: str | None = None
    """The name under which the value is given to ``save(metrics={...})``."""
    mode: Literal["min", "max"] = "min"
    """Whether the lowest or the highest value is the best."""
    every: int | None = None
    """Keep for good each step that is a multiple of this."""
    max_bytes: int | None = None
    """Delete the oldest until the run has at most so many bytes, whatever the other rules say. The two newest of the
    present branch always stay, where the other rules keep them (with ``last=1`` it is one)."""

    def __post_init__(self) -> None:
        for name, value in (
            ("last", self.last),
            ("best", self.best),
            ("every", self.every),
            ("max_bytes", self.max_bytes),
        ):
            if type(value) is not int and (value is not None or name in ("last", "best")):
                raise LastGoodError(f"Keep({name}={value!r}): it is a whole number")
        if self.last < 0 or self.best < 0:
            raise LastGoodError("Keep(last=, best=) count checkpoints: they cannot be negative")
        if self.last == 0 and self.best == 0 and self.every is None:
            raise LastGoodError(
                "Keep(last=0) without best= or every= would keep nothing. At least last=2 is recommended: then there "
                "is a checkpoint to fall back to when the newest is damaged."
            )
        if self.best and not self.metric:
            raise LastGoodError("Keep(best=...) needs metric=: the name of the value by which checkpoints are compared")
        if self.mode not in ("min", "max"):
            raise LastGoodError(f'Keep(mode={self.mode!r}): it is "min" or "max"')
        if self.every is not None and self.every < 1:
            raise LastGoodError("Keep(every=...) is a number of steps: at least 1")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise LastGoodError("Keep(max_bytes=...) is a number of bytes: at least 1")


@dataclass(frozen=True, slots=True)
class Known:
    """What retention needs to know of a checkpoint."""

    entry: Entry
    metrics: Mapping[str, float]
    bytes: int
    content: str = ""
    """What is in its file that other checkpoints may share; empty where it has none."""
    copy: tuple[int, int] | None = None
    """The identity of that file: links have the same."""


def known_of(entry: Entry) -> Known:
    """What its manifest says of a committed checkpoint.

    With a damaged manifest it counts as one without metrics: it is neither trusted nor deleted out of turn.
    """
    try:
        manifest = catalog.read_manifest(entry)
    except DamagedError as error:
        _log.warning("%s", error)
        return Known(entry, {}, 0)
    known = Known(entry, manifest.metrics, manifest.tensor_bytes)
    numbers = [number for number, record in enumerate(manifest.shards) if record.file == FROZEN]
    if numbers:
        parts = [f"{n} {c.checksum}" for n, t in manifest.tensors.items() for c in t.chunks if c.shard == numbers[0]]
        try:
            copy = disk.identity(entry.path / FROZEN)
        except OSError:
            return known  # Gone or unreadable: it is no copy of anything.
        return replace(known, content=checksum("\n".join(sorted(parts)).encode()), copy=copy)
    return known


def spare(known: Sequence[Known], doomed: Sequence[Known]) -> list[Known]:
    """What may be deleted of `doomed`, so that no two that stay depend on one physical copy of the same bytes.

    Where they would, the newest of `doomed` with another copy stays too, until a newer checkpoint has one.
    """
    doomed = list(doomed)
    staying = [k for k in known if k not in doomed]
    for content in {k.content for k in staying if k.content}:
        sharing = [k for k in staying if k.content == content]
        if len(sharing) < 2 or len({k.copy for k in sharing}) > 1:
            continue
        others = [k for k in doomed if k.content == content and k.copy != sharing[0].copy]
        if others:
            doomed.remove(max(others, key=lambda k: k.entry))
    return doomed


def best_first(known: Sequence[Known], keep: Keep) -> list[Known]:
    """The checkpoints that have the metric, the best first; of equal ones the newer first."""
    metric = keep.metric or ""
    rated = [k for k in known if not math.isnan(k.metrics.get(metric, math.nan))]
    sign = 1 if keep.mode == "min" else -1
    return sorted(rated, key=lambda k: (sign * k.metrics[metric], -k.entry.generation, -k.entry.step))


def choose(known: Sequence[Known], branch: Sequence[str], keep: Keep) -> list[Known]:
    """The checkpoints to delete, from old to new.

    Args:
        known: all committed checkpoints of the run, from old to new.
        branch: names on the present branch, the newest first.
        keep: the policy.
    """
    if not known:
        return []
    on_branch = set(branch)
    wanted = set(branch[: max(keep.last, 1)])
    if len([name for name in branch if any(k.entry.name == name for k in known)]) < keep.last:
        # The new branch is still short: what was there before a roll-back is not given up for it yet.
        wanted |= {k.entry.name for k in known if k.entry.name not in on_branch}
    wanted |= {k.entry.name for k in best_first([k for k in known if k.entry.name in on_branch], keep)[: keep.best]}
    if keep.every is not None:
        wanted |= {k.entry.name for k in known if k.entry.step % keep.every == 0 and k.entry.name in on_branch}
    doomed = [k for k in known if k.entry.name not in wanted]
    if keep.max_bytes is not None:
        kept = [k for k in known if k.entry.name in wanted]
        untouchable = set(branch[:2])
        total = sum(k.bytes for k in kept)
        for k in kept:
            if total <= keep.max_bytes:
                break
            if k.entry.name not in untouchable:
                doomed.append(k)
                total -= k.bytes
    return sorted(doomed, key=lambda k: k.entry)


class Retention:
    """Applies the policy to one run. Belongs to rank 0 of the job that holds it."""

    def __init__(self, run: Path, keep: Keep, holder: Holder, report: Callable[[str, Entry, str], None]) -> None:
        self._run, self._keep, self._holder, self._report = run, keep, holder, report
        self._known: dict[str, Known] = {}
        self._unfinished: list[Entry] = []
        """What could not be deleted, or only its manifest."""
        self._read: dict[tuple[int, int], int] = {}
        """Files that several checkpoints may share: how many were verified since it was read back."""
        self._decision: tuple[str | None, set[str]] = None, set()
        """The newest checkpoint when the policy was applied last, and those that it did not want."""
        self.kept: list[Entry] = []
        """What was there when the policy had been applied last, from old to new."""
        self.verified: str | None = None
        """The newest checkpoint that was read back, or that this life was restored from."""

    def known(self) -> list[Known]:
        """The committed checkpoints, from old to new. Each manifest is read once."""
        found = []
        for entry in catalog.committed(self._run):
            if entry.name not in self._known:
                self._known[entry.name] = known_of(entry)
            found.append(self._known[entry.name])
        return found

    def learn(self, entry: Entry, metrics: Mapping[str, float], size: int) -> None:
        """Note what was just committed: its manifest need not be read again for that."""
        self._known[entry.name] = Known(entry, metrics, size)

    def apply(self, newest: Entry, written: Written | None = None) -> list[str]:
        """Verify the newest checkpoint and delete what the policy does not want. Returns the deleted names.

        Args:
            newest: the checkpoint.
            written: its manifest, where this process wrote it.

        Raises:
            DamagedError: the newest checkpoint reads back damaged. Nothing was deleted.
        """
        self.finish()
        known = self.known()
        self.kept = [k.entry for k in known]
        branch = [entry.name for entry in catalog.lineage(newest, [k.entry for k in known])]
        doomed = spare(known, choose(known, branch, self._keep))
        if not doomed:
            return []
        self._read_back(newest, written)
        self.verified = newest.name
        self._decision = newest.name, {k.entry.name for k in doomed}
        gone = self._delete(doomed, _POLICY)
        self.kept = [entry for entry in self.kept if entry.name not in gone]
        return gone

    def _read_back(self, newest: Entry, written: Written | None) -> None:
        """Verify every byte of a checkpoint, but for a linked file that was read back lately under another name."""
        copy = next((k.copy for k in self.known() if k.entry == newest), None)
        self._read = {key: saves + 1 for key, saves in self._read.items() if saves < _READ_AGAIN}
        lately = copy is not None and copy in self._read
        catalog.check_full(newest, (FROZEN,) if lately else (), written)
        if copy is not None and not lately:
            self._read[copy] = 0

    def make_room(self, needed: int, free: Callable[[], int]) -> list[str]:
        """Delete old checkpoints until `needed` bytes are free; the last good one and its predecessor stay.

        Nothing is deleted before this life has verified a checkpoint. Returns the deleted names.
        """
        known = self.known()
        good = next((k.entry for k in known if k.entry.name == self.verified), None)
        if good is None:
            return []
        safe = [entry.name for entry in catalog.lineage(good, [k.entry for k in known])][:2]
        gone: list[str] = []
        for k in known:
            if free() >= needed:
                break
            if k.entry.name not in safe and k.entry < good and spare(self.known(), [k]):
                gone += self._delete([k], "the disk has too little space for the next save")
        return gone

    def finish(self, last: bool = False) -> None:
        """Try again to delete what another program had open.

        Args:
            last: no save follows, with which the policy would decide anew about what still is a checkpoint.
        """
        left, self._unfinished = self._unfinished, []
        decided, unwanted = self._decision
        for entry in left:
            whole = entry.is_committed()
            # After a roll-back it may be wanted again.
            still_unwanted = last and entry.name in unwanted and decided == self.verified
            if not disk.exists(entry.path) or (whole and not still_unwanted):
                continue
            self._holder.check()
            try:
                catalog.delete(entry, patience=_PATIENCE)
                if whole:
                    self._report("delete", entry, _POLICY)
            except OSError as error:
                _log.warning("%s could not be deleted yet: %s", entry.path, error)
                self._unfinished.append(entry)

    def _delete(self, doomed: Sequence[Known], why: str) -> list[str]:
        gone = []
        for k in doomed:
            self._holder.check()
            try:
                catalog.delete(k.entry, patience=_PATIENCE)
            except OSError as error:
                # Another program has it open (Windows), or the disk refuses. It is tried again after the next save.
                _log.warning("%s could not be deleted yet: %s", k.entry.path, error)
                self._unfinished.append(k.entry)
                continue
            self._known.pop(k.entry.name, None)
            self._report("delete", k.entry, why)
            gone.append(k.entry.name)
        return gone
