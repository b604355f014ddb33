"""The one object that a training loop talks to."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from lastgood import arguments, catalog, disk, generation, part, program, random_state, stop
from lastgood.errors import LastGoodError, SaveError
from lastgood.garbage import uncollected
from lastgood.handle import SaveHandle
from lastgood.log import format_bytes, show_log
from lastgood.loop import Loop
from lastgood.meeting import Meeting
from lastgood.mirror import Mirror
from lastgood.restore import Restore, Restored
from lastgood.retain import Keep
from lastgood.saver import Saver
from lastgood.session import Session
from lastgood.snapshot import Snapshot
from lastgood.state import Flattener, State, unsaved_parameters
from lastgood.steady import Steady
from lastgood.still import Still
from lastgood.world import detect_world

_log = logging.getLogger("lastgood")
_FAILURES = 3
"""So many failed saves in a row, and ``save`` raises: the training is running without a net."""
_GIVE_UP = 10
"""So many deadlines does a blocking save, or the end, wait for a disk that takes the bytes: then it is said to hang."""
_SAY_SO = 30.0
"""Seconds after which such a wait is first spoken of."""
_EXIT_CODE = 74
"""Of a program that ends although its last save failed and nobody asked (sysexits: input/output error)."""

_live: weakref.WeakValueDictionary[tuple[Path, int], Checkpointer] = weakref.WeakValueDictionary()
_hung: list[Checkpointer] = []
"""Those that were closed while the disk held their save up: they keep their runs until the process ends."""


class Checkpointer:
    """Saves the state of a training job and restores it, alike in one process and in many.

    Every rank makes one, on the same directory and with the same arguments, and calls the same methods.

    Args:
        run: the run directory; made where it does not exist. All ranks must see the same one.
        objects: what belongs to the state, by name (keyword arguments): modules, also in DDP or compiled, optimizers,
            schedulers, scalers, samplers, whatever else has ``state_dict`` and ``load_state_dict``, generators,
            tensors, dicts, lists and plain values.
        keep: which checkpoints are kept.
        every: :meth:`steps` saves after each so many steps.
        minutes: :meth:`steps` saves after each so many minutes.
        mirror: a second directory that receives copies, in the background.
        gradients: save the gradients too: for saves inside an accumulation window.
        replicated: patterns (fnmatch) of tensor names that are the same on every rank, beside what DDP holds.
        local: patterns of tensor names of which every rank has its own.
        leave_out: patterns of state paths that are neither saved nor changed by a restore.
        writers: how many ranks share the writing of replicated tensors; all by default.
        deadline: seconds for which a save waits for a rank.
        busy: what :meth:`save` does while the save before it is still being written: "wait" for it, or "skip" this one.
            A save with ``blocking=True``, such as the last one of :meth:`steps`, is never skipped.
        stop_code: exit code of the program when :meth:`steps` was asked to stop. 75 means "try again later" (sysexits).
        group: name or number of a group that may read and write what is made (POSIX).
        tensorboard: directory for scalars about the saves; needs the extra ``tensorboard``.
        stale: seconds for which the heartbeat of a job on another machine must stand still before its run is taken.
        rank: of this process, where neither the process group nor the launcher says it.
        world_size: likewise.

    Raises:
        RunHeldError: another job uses the run.
        PeerError: a rank did not come within `deadline` (rank 0: within `stale` more, where the job before did not give
            the run back), or does not see the same directory.
        LastGoodError: an argument cannot be used.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        *,
        keep: Keep | None = None,
        every: int | None = None,
        minutes: float | None = None,
        mirror: str | os.PathLike[str] | Mirror | None = None,
        gradients: bool = False,
        replicated: Sequence[str] = (),
        local: Sequence[str] = (),
        leave_out: Sequence[str] = (),
        writers: int | None = None,
        deadline: float = 120.0,
        busy: Literal["wait", "skip"] = "wait",
        stop_code: int = 75,
        group: str | int | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
        stale: float = generation.STALE_SECONDS,
        rank: int | None = None,
        world_size: int | None = None,
        **objects: Any,
    ) -> None:
        self.run = disk.absolute(run)
        self.world = detect_world(rank, world_size)
        self.keep = arguments.check_keep(keep)
        self.deadline = deadline
        self.stop_file_seen = False
        self.metrics: dict[str, float] = {}
        """Values that the next save of :meth:`steps` records; change it freely."""
        arguments.check_options(
            every=every,
            minutes=minutes,
            writers=writers,
            deadline=deadline,
            busy=busy,
            stop_code=stop_code,
            stale=stale,
        )
        arguments.check_objects(objects)
        self._every, self._minutes, self._busy, self._stop_code = every, minutes, busy, stop_code
        self._objects: dict[str, Any] = dict(objects)
        self._patterns = {
            name: arguments.check_patterns(name, patterns)
            for name, patterns in (("replicated", replicated), ("local", local), ("leave_out", leave_out))
        }
        self._gradients = gradients
        self._flattener = Flattener(self._objects, world_size=self.world.size, **self._patterns)
        state = self._flattener.flatten()  # What cannot be saved is refused now, not after hours of training.
        self._mirror = None if mirror is None else mirror if isinstance(mirror, Mirror) else Mirror(path=Path(mirror))
        self._program, self._versions = program.describe(), program.versions()
        self._snapshot = Snapshot(self.world.rank)
        self._steady = Steady(self._snapshot.wait)
        self._steady.watch(self._objects)
        self._still = Still()
        self._handle: SaveHandle | None = None
        self._saved_objects: object = None
        self._saving: futures.Future[None] | None = None
        self._tries: dict[int, int] = {}
        self._restores = 0
        self._last_step = -1
        self._restored = False
        self._closed = False
        self._gave_up = False
        self._forked = False
        show_log(self.world.rank)
        for name, labels in unsaved_parameters(self._objects, state).items() if self.world.rank == 0 else ():
            _log.warning(
                "%s optimizes %d parameters that belong to no registered module, first %s: their values are not saved. "
                "Register the module too.",
                name,
                len(labels),
                labels[0],
            )
        # The same directory under another name is the same run: its lock cannot tell.
        self._key = (disk.real_path(self.run), self.world.rank)
        former = _live.get(self._key)
        if former is not None and not former._closed:
            _log.info("%s: the Checkpointer made before in this process gives it up", self.run)
            former._abandon()
        mirror_path = Path(self._mirror.path) if self._mirror else None
        self._session = Session(self.run, self.world, deadline, mirror_path, arguments.group_number(group), stale)
        self.channel = self._session.channel
        self.meeting = Meeting(self.world, self.channel, deadline)
        _live[self._key] = self
        try:
            self._saver = Saver(
                self.run,
                self.world,
                self._session,
                keep=self.keep,
                writers=range(min(writers or self.world.size, self.world.size)),
                mirror=self._mirror,
                group=arguments.group_number(group),
                tensorboard=tensorboard,
            )
            if self.world.rank == 0:
                if stop.withdraw(self.run):
                    _log.warning("%s held a stop file from before this job; it is removed", self.run)
                self.channel.every(1.0, self._look_for_stop_file)
        except BaseException:
            self._session.close()
            self._closed = True
            raise

    # -- properties -----------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """The number of this life of the job."""
        return self._session.generation

    @property
    def last_step(self) -> int | None:
        """The step of the last save or restore of this life."""
        return self._last_step if self._last_step >= 0 else None

    def __getitem__(self, name: str) -> Any:
        """A registered object; for a plain value (a number, a string) its present value."""
        return self._objects[name]

    def __setitem__(self, name: str, value: Any) -> None:
        """Register an object, or change a plain value."""
        arguments.check_objects({name: value})
        self._objects[name] = value
        self._steady.watch({name: value})

    # -- restore --------------------------------------------------------------------------------------------------

    def restore(self, step: int | Literal["best"] | None = None, *, strict: bool = True) -> int:
        """Continue from a checkpoint: the newest that verifies, in the run or its mirror. Every rank calls it.

        Args:
            step: a step to roll back to, or "best" (by the metric of `keep`). The first save after a roll-back makes
                what came after that step history.
            strict: False loads what fits and reports the rest in the log.

        Returns:
            The step from which training goes on: 0 in a new run.

        Raises:
            DamagedError: there are checkpoints, but none verifies.
            MismatchError: names, shapes or types differ; all are listed. Nothing was changed.
            PeerError: a rank did not take part.
        """
        self._check_open()
        arguments.check_restore_step(step)
        self._finish_save()
        self._still = Still()
        self._snapshot.forget()
        key = f"restore/{self.generation}/{self._restores}"
        self._restores += 1
        began = time.monotonic()
        mirror = Path(self._mirror.path) if self._mirror else None
        restore = Restore(
            self.run,
            mirror,
            self.world,
            self.channel,
            self._objects,
            strict,
            key,
            self.deadline,
            self._saver.report,
            self._patterns["leave_out"],
            self._patterns["replicated"],
        )
        restored = restore.run_root(step, self.keep) if self.world.rank == 0 else restore.run_member()
        self._objects.update(restored.values)
        self._settle(restored, key)
        self._restored = True
        if restored.entry is None or restored.manifest is None:
            if self.world.rank == 0:
                _log.info("%s is a new run: starting at step 0", self.run)
            return 0
        self._saver.parent, self._last_step = restored.entry.name, restored.manifest.step
        self._handle, self._saver.failures = None, 0
        self._restore_random(restored)
        if self.world.rank == 0:
            seconds = time.monotonic() - began
            size = restored.manifest.tensor_bytes
            self._saver.event(
                "restore", checkpoint=restored.entry.name, step=self._last_step, bytes=size, seconds=seconds
            )
            _log.info(
                "restored step %d from %s (%s in %.2f s)",
                self._last_step,
                restored.entry.path,
                format_bytes(size),
                seconds,
            )
        return self._last_step

    def _settle(self, restored: Restored, key: str) -> None:
        """Agree on the generation that goes on from here, and note where it started."""
        holder = self._session.holder
        if holder is not None:
            name = restored.entry.name if restored.entry else ""
            if restored.rolled_back or self._saver.parent not in (None, name):
                self._session.advance()
            holder.set_base(name)
            self._saver.retention.verified = name or None
            self.channel.post(f"{key}/generation", holder.number)
        else:
            self._session.generation = self.channel.receive(f"{key}/generation", time.monotonic() + self.deadline)

    def _restore_random(self, restored: Restored) -> None:
        manifest = restored.manifest
        assert manifest is not None
        if restored.random is not None:
            for note in random_state.apply(restored.random):
                _log.warning("random state: %s", note)
            return
        seed = random_state.derive(manifest.ranks[0].random, self.world.rank, self.world.size, manifest.step)
        _log.warning(
            "rank %d has no random state in this checkpoint (saved by %d ranks): it is seeded with %d, which follows "
            "from rank 0's state, the rank and the step",
            self.world.rank,
            manifest.world_size,
            seed,
        )

    # -- save -----------------------------------------------------------------------------------------------------

    def save(self, step: int, *, metrics: dict[str, float] | None = None, blocking: bool = False) -> SaveHandle:
        """Save the state as it is now. Every rank calls it; it returns as soon as the state is copied.

        Args:
            step: the number of steps done; it grows from save to save.
            metrics: numbers to store with the checkpoint, by name; rank 0's count.
            blocking: return only when the checkpoint is on the disk, or the save has failed.

        Returns:
            The handle of this save; ``handle.result()`` raises where it failed.

        Raises:
            SaveError: the last three saves failed, or the disk hangs.
            LastGoodError: the state holds something that cannot be saved, or the step does not grow.
        """
        began = time.monotonic()
        self._check_open()
        self._check_step(step)
        metrics = arguments.check_metrics(self.metrics if metrics is None else metrics)
        with uncollected():
            state = self._flattener.flatten(gradients=self._gradients)
        if step == self._last_step and self._handle is not None:
            if blocking:
                # Rank 0 may have left it out (busy="skip"), of which this rank hears later.
                self._await(self._handle.wait)
            if self._handle.state in ("pending", "committed"):
                return self._same_again(step, state)
        if self.world.size > 1:
            # With the save before, which may still be under way: of any other one rank 0 knows that this rank passed
            # it by.
            before = self._last_step if self._handle is not None else None
            self.channel.post(f"here/{self.generation}", [before, step])
        handle = SaveHandle(step)
        tries = self._tries.get(step, 0)
        if self._busy == "skip" and not blocking and self._saver.skips(step, tries, self.deadline):
            self._tries = {step: tries + 1}
            handle._decide("skipped", None, None)
            _log.info("step %d is not saved: the save before it is still being written", step)
            return handle
        self._wait_for_save()
        self._check_failures()
        # What is made in inference mode, such as the buffer, could not be used outside of it.
        with uncollected(), torch.inference_mode(False):
            held, steady = self._steady.look(state.places if self._watches_only(state) else None)
            still, unchanged = self._still.take(state, held, self._saver.announced_frozen)
            self._snapshot.take(state, self._saver.writers, steady, still, unchanged)
            request = part.Request(
                step=step,
                tries=tries,
                objects=state.objects,
                kinds=state.kinds,
                encode_random=functools.partial(random_state.as_json, random_state.take()),
                metrics=metrics,
                program=self._program,
                versions=self._versions,
                parent=self._saver.parent,
                state=state,
                layout=self._snapshot.layout,
                buffer=self._snapshot,
                deadline=self.deadline,
            )
            self._tries = {step: tries + 1}
            self._last_step, self._saved_objects, self._handle = step, state.objects, handle
            handle.stall = time.monotonic() - began
            self._saving = self._saver.start(request, handle)
            self._snapshot.begin()
        if blocking:
            self._await(handle.wait)
        return handle

    def wait_snapshot(self) -> None:
        """Return when the last ``save`` has copied all it needs: call it before changing weights by hand.

        Steps of registered optimizers, and their ``load_state_dict``, do it by themselves.
        """
        if not self._forked:
            self._snapshot.wait()

    def wait(self) -> None:
        """Wait until the last save is on the disk. Raises SaveError where it failed, or the disk hangs."""
        self._check_forked()
        if self._handle is not None:
            self._await(self._handle.wait)
            self._handle.result()

    def _watches_only(self, state: State) -> bool:
        """Whether the state shows all that the watched optimizers hold: not of one that a wrapper hides."""
        shown = {id(self._objects[name]) for name, kind in state.kinds.items() if kind == "optimizer"}
        return all(id(optimizer) in shown for optimizer in self._steady.watched)

    def _check_step(self, step: int) -> None:
        if type(step) is not int or step < 0:
            raise LastGoodError(f"save(step={step!r}): a step is a whole number of steps done, 0 or more")
        if step < self._last_step:
            raise LastGoodError(
                f"save(step={step}): this job was at step {self._last_step} already, and steps grow. To go back, call "
                f"restore(step={step})."
            )
        if not self._restored and self._last_step < 0:
            # Of an earlier life: a rank that is late may find the first checkpoints of this one.
            found = next((e for e in catalog.committed(self.run) if e.generation < self.generation), None)
            if found is not None:
                raise LastGoodError(
                    f"{self.run} already has checkpoints of an earlier job ({found.name}): call restore() before the "
                    "first save, so that the job continues from them, or use another directory to start anew."
                )

    def _same_again(self, step: int, state: State) -> SaveHandle:
        """A step that is saved twice: the first save serves, when nothing has changed since."""
        assert self._handle is not None
        if state.objects != self._saved_objects or not self._snapshot.holds(state):
            raise LastGoodError(
                f"save(step={step}): this step was already saved, and the state has changed since. Count the steps up, "
                "or save each one once."
            )
        return self._handle

    def _check_failures(self) -> None:
        failures = self._saver.failures
        if failures < _FAILURES:
            return
        assert self._handle is not None
        self._handle.seen = True
        # Who catches this goes on: the next save is tried, and if it fails, this is raised again.
        self._saver.failures = _FAILURES - 1
        raise SaveError(
            f"the last {failures} saves failed; the last reason: {self._handle.error}. Training goes on without a net: "
            "repair the cause, or catch this error to go on all the same."
        ) from self._handle.error

    def _wait_for_save(self) -> None:
        """Wait until the host buffer is free again; rank 0 stops waiting for ranks that did not come to that save."""
        self._saver.hurry()
        began = time.monotonic()
        # The save has its own deadlines for the other ranks; what can exceed them is a disk that hangs.
        if not self._saver.buffer_free.wait(4 * self.deadline):
            raise SaveError(
                f"the save of step {self._last_step} is still being written after {4 * self.deadline:.0f} s: the disk "
                f"of {self.run} hangs. Training goes on when this error is caught."
            )
        waited = time.monotonic() - began
        if waited > 1.0:
            _log.warning(
                "training waited %.1f s for the save before this one: save less often, or pass busy='skip'", waited
            )

    def _finish_save(self) -> None:
        """Wait until the save under way is over, with what follows it. Raises SaveError where the disk hangs."""
        saving = self._saving
        if saving is not None:
            self._await(lambda seconds: bool(futures.wait([saving], seconds).done))

    def _await(self, done: Callable[[float], bool]) -> None:
        """Wait for a save to be written, at most `_GIVE_UP` deadlines, and not silently.

        Args:
            done: waits for so many seconds; returns whether the save is over.

        Raises:
            SaveError: it is not; nothing can end a write that the disk does not answer.
        """
        most = _GIVE_UP * self.deadline
        began = time.monotonic()
        pause = min(_SAY_SO, self.deadline)
        while not done(0.0 if self._gave_up else pause):
            waited = time.monotonic() - began
            if self._gave_up or waited >= most:
                self._gave_up = True
                raise SaveError(self._held_up(most))
            _log.warning(
                "waiting since %.0f s for %s: at most %.0f s (%d deadlines)", waited, self._under_way(), most, _GIVE_UP
            )
            pause = min(self.deadline, most - waited)

    def _under_way(self) -> str:
        if self._handle is not None and self._handle.state == "committed":
            return f"what follows the save of step {self._last_step} (verifying it, deleting old ones) in {self.run}"
        return f"the save of step {self._last_step} to be written to {self.run}"

    def _held_up(self, seconds: float) -> str:
        kept = self._saver.parent
        return (
            f"waited {seconds:.0f} s in vain for {self._under_way()}: the disk hangs. "
            + (f"The last good checkpoint is {kept}" if kept else "There is no checkpoint of this life yet")
            + f"; nothing of it is touched. This process keeps {self.run} until it ends, since the disk may still "
            "write; what it leaves unfinished is cleared away by the next job. A disk that is only slow needs a longer "
            "deadline."
        )

    # -- the loop -------------------------------------------------------------------------------------------------

    def steps(
        self, total: int | None = None, *, every: int | None = None, minutes: float | None = None
    ) -> Iterator[int]:
        """The training loop: restores, yields the number of each step to do, saves on schedule and at the end.

        On SIGTERM, SIGINT, SIGUSR1, on Windows CTRL_BREAK, and when ``lastgood stop RUN`` was called, it finishes the
        step, all ranks save at the same one, and the program ends with the exit code `stop_code`. A second signal ends
        it at once.

        Args:
            total: number of steps of the whole training; None goes on until it is stopped.
            every: save after each so many steps; by default what the Checkpointer was given.
            minutes: save after each so many minutes, likewise.
        """
        start = max(self._last_step, 0) if self._restored else self.restore()
        return Loop(self, every or self._every, minutes or self._minutes).run(start, total)

    def stop(self, step: int, reason: str) -> None:
        """End the program as :meth:`steps` does when it is asked to: close, and exit with `stop_code`."""
        if self.world.rank == 0:
            stop.withdraw(self.run)
            self._saver.event("stop", step=step, why=reason)
        self.close()
        raise SystemExit(self._stop_code)

    def _look_for_stop_file(self) -> None:
        self.stop_file_seen = self.stop_file_seen or stop.is_asked(self.run)

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Wait for the save under way, give the run back, and raise what failed. May be called twice.

        Raises:
            SaveError: the last save failed, or the disk did not take it within ten deadlines. In the latter case the
                run is not given back before the process ends.
        """
        self._close(finished=True)

    def _close(self, finished: bool) -> None:
        if self._closed or self._forked:
            return
        try:
            self._finish_save()
        except SaveError:
            # The thread that hangs may still write: the run is held, and the buffer kept, until the process ends.
            self._closed = True
            self._steady.close()
            _hung.append(self)
            raise
        self._closed = True
        if finished:
            self._session.leave()
        self._steady.close()
        self._snapshot.close()
        try:
            self._saver.close(self.deadline)
        finally:
            self._session.close()
            _live.pop(self._key, None)
        handle = self._handle
        if handle is not None and handle.state in ("failed", "unknown") and not handle.seen:
            handle.result()

    def _abandon(self) -> None:
        """Close without raising: an error ended the training, or another Checkpointer of this process takes the run."""
        try:
            self._close(finished=False)
        except LastGoodError as error:
            _log.error("%s", error)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        if value is None or (isinstance(value, SystemExit) and value.code in (None, 0)):
            # A program that says that all is well must not end so when its last save failed.
            self.close()
        else:
            # The program's own error is the one to show.
            self._abandon()

    # -- parts ----------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        self._check_forked()
        if self._closed:
            raise LastGoodError("the Checkpointer is closed")

    def _check_forked(self) -> None:
        if self._forked:
            raise LastGoodError(
                "this process was forked from the one that made the Checkpointer (a data loader's worker?); only the "
                "training process itself can save and restore"
            )


def _at_exit() -> None:
    """The program ends without close(): give the runs back, and be loud where a promise was not kept."""
    failed: BaseException | None = None
    for checkpointer in list(_live.values()):
        if not checkpointer._closed and not checkpointer._forked:
            try:
                checkpointer._close(finished=getattr(sys, "last_value", None) is None)
            except BaseException as error:
                failed = error
    if failed is not None:
        _end_loudly(failed)


def _before_threads_are_joined() -> None:
    """The program ends: Python is about to wait for all threads, for ever for one that a disk holds up."""
    for checkpointer in [*_hung, *_live.values()]:
        if not checkpointer._forked:
            try:
                checkpointer._finish_save()
            except SaveError as error:
                _end_loudly(error)


def _end_loudly(failed: BaseException) -> None:
    print(f"lastgood: the program ends, and its last save failed: {failed}", file=sys.stderr)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # A program without a console (pythonw) has none.
            stream.flush()
    os._exit(_EXIT_CODE)


def _after_fork() -> None:
    """In a forked child: let go of the connections and the optimizers, and refuse to act for the parent."""
    for checkpointer in [*_hung, *_live.values()]:
        checkpointer._forked = True
        checkpointer._steady.close()  # The thread for which a step would wait does not exist here.
        checkpointer.channel.abandon()


atexit.register(_at_exit)
if (_register := getattr(threading, "_register_atexit", None)) is not None:
    # Not public, but there from 3.9 on, and the only thing that runs before the threads of executors are waited for.
    _register(_before_threads_are_joined)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
