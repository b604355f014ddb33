"""The background part of saving, on one rank: write, commit, say so, copy, clean up."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lastgood import catalog, commit, disk, member, part
from lastgood.errors import DamagedError, LastGoodError, PeerError, ReplacedError, SaveError
from lastgood.handle import SaveHandle
from lastgood.log import format_bytes
from lastgood.mirror import Copier, Mirror
from lastgood.program import Events
from lastgood.retain import Keep, Retention
from lastgood.session import Session
from lastgood.values import Json
from lastgood.world import World

_log = logging.getLogger("lastgood")
_NAMED = 6
"""So many checkpoints that are kept the log names; of more it says the number."""


class Saver:
    """Runs one save after the other. Its public attributes are read by the training thread."""

    def __init__(
        self,
        run: Path,
        world: World,
        session: Session,
        *,
        keep: Keep,
        writers: Sequence[int],
        mirror: Mirror | None,
        group: int | None,
        tensorboard: str | os.PathLike[str] | None,
    ) -> None:
        self._run, self._session = run, session
        # A thread that is kept: to start one takes milliseconds of the training's time when it is busy. A program that
        # just ends waits for it, and so for what it was promised, for at most the deadlines.
        self._background = ThreadPoolExecutor(1, thread_name_prefix="lastgood-save")
        self.failures = 0
        """How many saves in a row have failed."""
        self.parent: str | None = None
        """Directory name of the checkpoint before the next one."""
        self.buffer_free = threading.Event()
        """Set while no save reads the host buffer."""
        self.buffer_free.set()
        self._events = Events(run, session.generation, group)
        self._scalars = None
        self._copier: Copier | None = None
        self.root: commit.Root | None = None
        self._writers = tuple(writers)
        holder = session.holder
        if holder is None:
            self._member = member.Member(run, world, session.channel)
            return
        self.root = commit.Root(run, world, session.channel, holder, writers, group)
        self.retention = Retention(run, keep, holder, self.report)
        session.clear_left_overs(self._events)
        if mirror is not None:
            self._copier = Copier(run, mirror, keep, holder, self._events)
        if tensorboard is not None:
            from lastgood.integrations.tensorboard import Scalars

            self._scalars = Scalars(tensorboard)

    @property
    def writers(self) -> tuple[int, ...]:
        """The ranks that share the writing of the next save, as far as this rank knows."""
        if self.root is not None:
            return self.root.writers
        announced = self._session.channel.peek("writers", 0)
        return self._writers if announced is None else tuple(announced)

    @property
    def announced_frozen(self) -> list[str] | None:
        """On the other ranks: the tensors that rank 0 took for frozen at its last save, as far as is known."""
        return None if self.root is not None else self._session.channel.peek("frozen", 0)

    def event(self, event: str, **fields: Json) -> None:
        """Rank 0: add a line to the event log, under the present generation."""
        self._events.generation = self._session.generation
        self._events.write(event, **fields)

    def report(self, event: str, entry: catalog.Entry, why: str) -> None:
        """Rank 0: a checkpoint was skipped or deleted."""
        self._events.generation = self._session.generation
        self._events.report(event, entry, why)

    def skips(self, step: int, tries: int, deadline: float) -> bool:
        """Whether a save is left out because the one before it is being written: rank 0 decides that for all ranks."""
        if self.root is not None:
            if self.buffer_free.is_set():
                return False
            self.root.skip(step, tries)
            return True
        key = part.message_prefix(self._session.generation, step, tries) + "call"
        end = time.monotonic() + deadline
        while not self.buffer_free.wait(0.005) and time.monotonic() < end:
            if "skipped" in (self._session.channel.peek(key, 0) or {}):
                return True
        return False  # Or rank 0 has not decided yet: the save itself will hear of it.

    def hurry(self) -> None:
        """The training asks for the next save: ranks that have not come to this one are not waited for."""
        if self.root is not None:
            self.root.hurried = True
            self._session.channel.nudge()

    def close(self, seconds: float) -> None:
        """Clean up and bring the mirror up to date, for at most `seconds`."""
        if self.root is not None:
            self.root.clear()
            try:
                self.retention.finish(last=True)
            except LastGoodError as error:
                _log.warning("%s", error)
        if self._copier is not None and not self._copier.close(seconds):
            _log.warning("the mirror is not up to date; the next job catches it up")
        if self._scalars is not None:
            self._scalars.close()
        self._background.shutdown(wait=False)

    def start(self, request: part.Request, handle: SaveHandle) -> Future[None]:
        """Write in the background, after the save before. The future is done when all that follows the save is, too."""
        turn: Future[None] = Future()
        self.buffer_free.clear()
        if self.root is not None:
            self.root.hurried = False  # Here: the training may be in a hurry before this save's turn has come.
        try:
            self._background.submit(self._take_turn, turn, request, handle)
        except BaseException as error:
            if not turn.cancel():
                raise  # A Ctrl-C, but it is under way.
            if isinstance(error, RuntimeError):
                # No more threads, or the interpreter is ending: in the foreground, then.
                self.write(request, handle)
                turn = Future()
                turn.set_result(None)
                return turn
            self.buffer_free.set()
            handle._decide("failed", None, error)
            raise
        return turn

    def _take_turn(self, turn: Future[None], request: part.Request, handle: SaveHandle) -> None:
        if not turn.set_running_or_notify_cancel():
            return
        try:
            self.write(request, handle)
        finally:
            turn.set_result(None)

    def write(self, request: part.Request, handle: SaveHandle) -> None:
        """The background part of a save."""
        began = time.monotonic()
        try:
            done = self.root.save(request, self._make_room) if self.root else self._follow(request)
        except part.SkippedError as decision:
            _log.info("%s", decision)
            self.buffer_free.set()
            handle._decide("skipped", None, None)
            return
        except BaseException as error:
            self.failures += 1
            known = not isinstance(error, PeerError)
            _log.error("step %d was not saved: %s", request.step, error)
            if self.root:
                self.event("save-failed", step=request.step, why=str(error))
            self.buffer_free.set()
            handle._decide("failed" if known else "unknown", None, error)
            return
        self.failures = 0
        self.parent = done.path.name
        self.buffer_free.set()
        handle._decide("committed", done.path, None)
        if self.root:
            self._after(request, handle, done, time.monotonic() - began)

    def _follow(self, request: part.Request) -> part.Committed:
        try:
            return self._member.save(request, self._session.generation)
        except PeerError as error:
            # Rank 0 is silent. If it had committed before, the disk says so.
            name = self._member.directory
            entry = catalog.entry_of(self._run, name) if name else None
            if entry is not None and entry.is_committed():
                manifest = catalog.read_manifest(entry)
                if manifest.attempt == self._member.attempt:
                    return part.Committed(entry.path, manifest.tensor_bytes)
            raise PeerError(f"nobody can say whether step {request.step} was saved: {error}") from error

    def _make_room(self, needed: int) -> None:
        """Raise SaveError when the disk cannot take a save, after retention has given back what it may."""
        if disk.free_bytes(self._run) >= needed:
            return
        self.retention.make_room(needed, lambda: disk.free_bytes(self._run))
        free = disk.free_bytes(self._run)
        if free < needed:
            raise SaveError(
                f"{self._run} has {format_bytes(free)} left, and the save needs {format_bytes(needed)}. Nothing was "
                "committed, and the last good checkpoint stays. Free some space, or keep fewer checkpoints (Keep)."
            )

    def _after(self, request: part.Request, handle: SaveHandle, done: part.Committed, seconds: float) -> None:
        """Rank 0, after a commit: say so, copy, clean up."""
        deleted: list[str] = []
        try:
            entry = catalog.entry_of(self._run, done.path.name)
            assert entry is not None
            if not done.frozen:
                self.retention.learn(entry, request.metrics, done.bytes)
            deleted = self.retention.apply(entry, done.written)
        except ReplacedError as error:
            _log.error("%s", error)
        except (LastGoodError, OSError) as error:
            if self.root is not None:
                self.root.frozen.forget()  # It may be a file that was linked on.
            kind = "reads back damaged" if isinstance(error, DamagedError) else "retention failed"
            _log.error("step %d: %s: %s. Nothing was deleted.", request.step, kind, error)
            self.event("retention-failed", step=request.step, why=str(error))
        self.event(
            "save",
            checkpoint=done.path.name,
            step=request.step,
            bytes=done.bytes,
            stall=handle.stall,
            seconds=seconds,
            missing=list(done.missing),
            metrics=request.metrics,
            deleted=deleted,
            kept=len(self.retention.kept),
        )
        _log.info(
            "saved step %d: %s in %.2f s (%s/s), training held up %.1f ms, kept %s%s",
            request.step,
            format_bytes(done.bytes),
            seconds,
            format_bytes(int(done.bytes / max(seconds, 1e-9))),
            handle.stall * 1e3,
            _kept(self.retention.kept),
            f", deleted {', '.join(deleted)}" if deleted else "",
        )
        if self._scalars is not None:
            self._scalars.write(request.step, done.bytes, seconds, handle.stall)
        if self._copier is not None:
            self._copier.notify()


def _kept(entries: Sequence[catalog.Entry]) -> str:
    if len(entries) > _NAMED:
        return f"{len(entries)} checkpoints"
    return f"{'steps' if len(entries) > 1 else 'step'} {', '.join(str(entry.step) for entry in entries)}"
