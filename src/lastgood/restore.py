"""Which checkpoint a job continues from: the newest committed one that verifies, the same on every rank.

Rank 0 proposes a checkpoint; every rank compares and loads it, checking each byte, and votes. Where one rank cannot
read it, all go back to the same older one, which overwrites every tensor. Where none is left, `restore` raises.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lastgood import catalog, disk
from lastgood.catalog import Entry
from lastgood.coordinate import Channel
from lastgood.errors import DamagedError, LastGoodError, MismatchError, PeerError
from lastgood.loading import Loading
from lastgood.manifest import Manifest
from lastgood.retain import Keep, Known, best_first
from lastgood.values import Json
from lastgood.world import World

_log = logging.getLogger("lastgood")
LOAD_SECONDS = 3600.0
"""How long rank 0 waits for a rank that lives to have loaded a checkpoint."""


@dataclass(slots=True)
class Restored:
    """What a restore came to, on one rank."""

    entry: Entry | None
    """None in a new run."""
    manifest: Manifest | None
    values: dict[str, Any]
    """The plain values, by object name."""
    random: Json
    rolled_back: bool
    """Whether an older checkpoint was asked for, so that what came after it is history."""


@dataclass(slots=True)
class Restore:
    """One call of ``restore``."""

    run: Path
    mirror: Path | None
    world: World
    channel: Channel
    objects: dict[str, Any]
    strict: bool
    key: str
    """Message prefix of this call."""
    deadline: float
    """Seconds for which a rank waits for the others to call restore."""
    report: Callable[[str, Entry, str], None]
    leave_out: Sequence[str] = ()
    replicated: Sequence[str] = ()

    def run_root(self, step: int | Literal["best"] | None, keep: Keep) -> Restored:
        """Rank 0: choose, load, and let the others load the same."""
        try:
            self._meet()
            return self._choose_and_load(step, keep)
        except BaseException as error:
            self.channel.post(f"{self.key}/failed", str(error))
            raise

    def _meet(self) -> None:
        """Rank 0: all ranks must have called restore before anything happens."""
        self.channel.post(f"{self.key}/begin", True)
        others = range(1, self.world.size)
        here = self.channel.collect(f"{self.key}/here", others, time.monotonic() + self.deadline)
        for rank in others:
            if rank not in here:
                why = self.channel.why_gone(rank) or f"it did not come within {self.deadline:.0f} s"
                raise PeerError(
                    f"rank {rank} did not call restore(): {why}. Every rank must call it. Nothing was changed."
                )

    def _choose_and_load(self, step: int | Literal["best"] | None, keep: Keep) -> Restored:
        self._check_mirror()
        newest = self._newest()
        if newest is None:
            if step is not None:
                raise LastGoodError(f"{self.run} has no checkpoint yet: restore(step={step!r}) has nothing to restore")
            self.channel.post(f"{self.key}/0", {"fresh": True})
            return Restored(None, None, {}, None, False)
        damage: list[str] = []
        proposals = itertools.count()
        for entry in self._candidates(step, keep, newest):
            try:
                manifest = catalog.check_quick(entry)
                # Counted here, not with the candidates: the others never hear of one that fails the quick check.
                restored = self._try(entry, manifest, next(proposals))
            except DamagedError as error:
                damage.append(str(error))
                self.report("skip", entry, str(error))
                continue
            restored.rolled_back = step is not None and entry.name != newest.name
            return restored
        found, asked = "\n  ".join(damage), "" if step is None else f" for step {step!r}"
        raise DamagedError(
            f"{self.run} has checkpoints, but none that can be restored{asked}:\n  {found}\nNothing was deleted. The "
            "objects of this job may be partly overwritten: do not train on with them. `lastgood verify --full` shows "
            "the damage; to start anew, use another run directory."
        )

    def _check_mirror(self) -> None:
        """Leave out a mirror that cannot be read, where the run has checkpoints. Raises LastGoodError where not."""
        try:
            if self.mirror is not None:
                disk.names(self.mirror)
        except OSError as error:
            if catalog.newest(self.run) is None:
                raise LastGoodError(
                    f"{self.run} holds no checkpoint, and the mirror {self.mirror} cannot be read: {error}. It may "
                    "hold the training's past, so nothing is started anew."
                ) from error
            _log.warning("the mirror %s cannot be read (%s): restoring from the run alone", self.mirror, error)
            self.mirror = None

    def _known(self) -> list[Entry]:
        """Committed checkpoints here and in the mirror, from old to new; of both places, the run's first."""
        here = catalog.committed(self.run)
        names = {entry.name for entry in here}
        there = catalog.committed(self.mirror) if self.mirror is not None else []
        return sorted([*here, *(entry for entry in there if entry.name not in names)])

    def _newest(self) -> Entry | None:
        places = [self.run] + ([self.mirror] if self.mirror is not None else [])
        return max((entry for run in places if (entry := catalog.newest(run)) is not None), default=None)

    def _candidates(self, step: int | Literal["best"] | None, keep: Keep, newest: Entry) -> Iterator[Entry]:
        if step is None:
            # The newest is nearly always good: all the others, maybe thousands, are looked at only where it is not.
            yield from self._places(newest)
        known = self._known()
        branch = list(catalog.lineage(newest, known, self.mirror))
        if step is None:
            branch = branch[1:]
        elif step == "best":
            branch = self._by_metric(branch, keep)
        else:
            branch = [e for e in branch if e.step == step] or [e for e in reversed(known) if e.step == step][:1]
            if not branch:
                steps = ", ".join(str(entry.step) for entry in known)
                raise LastGoodError(f"{self.run} has no checkpoint of step {step}; there are {steps}")
        for entry in branch:
            yield from self._places(entry)

    def _places(self, entry: Entry) -> Iterator[Entry]:
        """A checkpoint, and its copy in the mirror."""
        yield entry
        if self.mirror is not None and entry.run != self.mirror:
            copy = Entry(entry.generation, entry.step, entry.attempt, entry.name, self.mirror)
            if copy.is_committed():
                yield copy

    def _by_metric(self, branch: list[Entry], keep: Keep) -> list[Entry]:
        if keep.metric is None:
            raise LastGoodError('restore(step="best") needs Keep(metric=...): the name of the value to compare')
        rated = []
        for entry in reversed(branch):
            try:
                rated.append(Known(entry, catalog.read_manifest(entry).metrics, 0))
            except DamagedError as error:
                self.report("skip", entry, str(error))
        best = [k.entry for k in best_first(rated, keep)]
        if not best:
            raise LastGoodError(f"no checkpoint in {self.run} has the metric {keep.metric!r}")
        return best

    def _try(self, entry: Entry, manifest: Manifest, number: int) -> Restored:
        """Load one checkpoint on all ranks. Raises DamagedError where one of them cannot read it."""
        place = "run" if entry.run == self.run else "mirror"
        self.channel.post(f"{self.key}/{number}", {"name": entry.name, "place": place, "attempt": manifest.attempt})
        end = time.monotonic() + LOAD_SECONDS
        others = range(1, self.world.size)
        loading = Loading(entry, manifest, self.objects, self.world, self.strict, self.leave_out, self.replicated)
        # First vote: does it fit? Nothing is changed before every rank said yes.
        vote = self._vote(loading.prepare)
        self._count(vote, self.channel.collect(f"{self.key}/{number}/fits", others, end), entry)
        self.channel.post(f"{self.key}/{number}/load", True)
        values: dict[str, Any] = {}
        vote = self._vote(lambda: values.update(loading.run()))
        self._count(vote, self.channel.collect(f"{self.key}/{number}/loaded", others, end), entry)
        self.channel.post(f"{self.key}/{number}/done", True)
        self._tell(loading)
        return Restored(entry, manifest, values, loading.random(), False)

    @staticmethod
    def _vote(work: Callable[[], None]) -> Json:
        try:
            work()
        except MismatchError as error:
            return {"mismatch": str(error)}
        except DamagedError as error:
            return {"damaged": str(error)}
        except (KeyboardInterrupt, SystemExit):
            raise
        except LastGoodError as error:
            return {"failed": str(error)}
        except BaseException as error:
            # torch's CheckpointException is no Exception.
            return {"failed": f"{type(error).__name__}: {error}"}
        return {}

    def _count(self, own: Json, votes: dict[int, Json], entry: Entry) -> None:
        """Raise what the worst vote says."""
        votes = {0: own, **votes}
        silent = [rank for rank in range(self.world.size) if rank not in votes]
        if silent:
            raise PeerError(
                f"rank {silent[0]} did not load {entry.path}: "
                f"{self.channel.why_gone(silent[0]) or 'it did not answer in time'}. Every rank must call restore()."
            )
        for kind, error in (("failed", LastGoodError), ("mismatch", MismatchError), ("damaged", DamagedError)):
            for rank, vote in votes.items():
                if kind in vote:
                    raise error(vote[kind] if rank == 0 else f"rank {rank}: {vote[kind]}")

    def run_member(self) -> Restored:
        """Another rank: load what rank 0 proposes, until all could."""
        self.channel.post(f"{self.key}/here", True)
        try:
            self.channel.receive_any([f"{self.key}/begin", f"{self.key}/failed"], time.monotonic() + self.deadline)
        except PeerError as error:
            raise PeerError(f"rank 0 did not call restore(): {error}. Every rank must call it.") from error
        number = 0
        while True:
            proposal = self._hear(str(number))
            if "fresh" in proposal:
                return Restored(None, None, {}, None, False)
            place = self.run if proposal["place"] == "run" else self.mirror
            restored = self._follow(proposal, place, number)
            if restored is not None:
                return restored
            number += 1

    def _follow(self, proposal: Json, place: Path | None, number: int) -> Restored | None:
        key = f"{self.key}/{number}"
        loading: Loading | None = None
        values: dict[str, Any] = {}

        def prepare() -> None:
            nonlocal loading
            entry = catalog.entry_of(place, proposal["name"]) if place is not None else None
            if entry is None:
                raise LastGoodError(f"rank 0 restores {proposal['name']} from a mirror that this rank does not have")
            manifest = catalog.check_quick(entry)
            if manifest.attempt != proposal["attempt"]:
                raise LastGoodError(f"{entry.path} is another checkpoint here than on rank 0: another disk?")
            loading = Loading(entry, manifest, self.objects, self.world, self.strict, self.leave_out, self.replicated)
            loading.prepare()

        self.channel.post(f"{key}/fits", self._vote(prepare))
        if not self._hear(f"{number}/load", or_next=number + 1) or loading is None:
            return None
        ready: Loading = loading
        self.channel.post(f"{key}/loaded", self._vote(lambda: values.update(ready.run())))
        if not self._hear(f"{number}/done", or_next=number + 1):
            return None
        self._tell(ready)
        return Restored(ready.entry, ready.manifest, values, ready.random(), False)

    def _hear(self, what: str, or_next: int | None = None) -> Json:
        """The next word of rank 0; None when it went on to proposal `or_next`. Raises when it gave up."""
        end = time.monotonic() + LOAD_SECONDS
        keys = [f"{self.key}/{what}", f"{self.key}/failed"]
        if or_next is not None:
            keys.append(f"{self.key}/{or_next}")
        key, value = self.channel.receive_any(keys, end)
        if key.endswith("/failed"):
            raise LastGoodError(f"rank 0 could not restore: {value}")
        return value if key == keys[0] else None

    def _tell(self, loading: Loading) -> None:
        for note in loading.notes:
            _log.warning("restore of step %d: %s", loading.manifest.step, note)
