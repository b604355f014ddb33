"""The filling of the host buffer in the background: copying while training goes on, and the waiting for it."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import torch

from lastgood.errors import SaveError
from lastgood.manifest import checksum
from lastgood.watch import Watch, memory

THREADS = 2
"""To compare what is frozen, which one core does more slowly than the memory gives it."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What the buffer holds already, if a tensor is what it was."""

    name: str
    storage: torch.UntypedStorage
    """Keeps the memory alive whatever becomes of the tensor."""
    address: int
    size: int
    checksum: str


@dataclass(slots=True)
class Late:
    """What is done in the background."""

    watch: Watch | None = None
    """Keeps the memory of what is to be copied alive."""
    todo: Sequence[tuple[int, int, int]] = ()
    """What is to be copied, in the order of the buffer: place in it, address, bytes."""
    kept: list[list[Kept]] = field(default_factory=list)
    """What is to be compared, for each thread."""


class _Once:
    """A task that runs once, in whichever thread comes first."""

    def __init__(self, task: Callable[[], None]) -> None:
        self._task = task
        self._first = threading.Lock()

    def __call__(self) -> None:
        if self._first.acquire(blocking=False):
            self._task()


class Filling:
    """Fills the buffer of one rank, save after save."""

    def __init__(self) -> None:
        self.overlap = True
        """Cleared for good when a tensor was changed while it was being copied."""
        # Kept: to start a thread takes milliseconds of the training's time when the thread is busy.
        self._background = ThreadPoolExecutor(THREADS, thread_name_prefix="lastgood-snapshot")
        self._news = threading.Condition()
        self._buffer = self._size = 0
        """Address of the buffer, and its bytes."""
        self._filled = 0
        """So many of them may be written."""
        self._wanted = 0
        """For so many somebody waits: to be woken for less would take a core from those who copy."""
        self._late = Late()
        """What has not begun yet."""
        self._todo: deque[tuple[int, int, int]] = deque()
        """What is left to copy of what has."""
        self._moving = 0
        """Threads that copy a part of it now."""
        self._copying = False
        self._comparing = 0
        """Threads that still compare what the buffer holds since an earlier save."""
        self._waited_for = False
        """Whether training waits."""
        self._failure: str | None = None

    def reset(self, buffer: int, size: int) -> None:
        """Another save begins, whose buffer lies at the address `buffer`. Nobody reads it yet."""
        self._buffer, self._size, self._filled, self._failure = buffer, size, size, None

    def put_off(self, late: Late) -> None:
        """What :meth:`begin` begins with. All else is in the buffer."""
        with self._news:
            self._late = late
            # What is kept is there: whether it still is what it should be shows later, and in time for the commit.
            self._filled = late.todo[0][0] if late.todo else self._size
            self._wanted = self._size
            self._copying, self._comparing = bool(late.todo), len(late.kept)

    def begin(self) -> None:
        """Begin in the background, where nobody has yet. From then on it competes for the interpreter."""
        tasks: list[_Once] = []
        try:
            with self._news:
                late, none = self._late, Late()
                todo = deque([*self._todo, *late.todo])
                new = [_Once(functools.partial(self._copy, late.watch))] if late.watch is not None else []
                new += [_Once(functools.partial(self._compare, share)) for share in late.kept]
                # All or nothing: a signal comes before or after this.
                self._late, self._todo, tasks = none, todo, new
            for task in tasks:
                try:
                    self._background.submit(task)
                except RuntimeError:
                    task()  # No more threads, or the interpreter is ending; it may be queued all the same.
        except BaseException:  # A signal. The save does not suffer from it.
            for task in tasks:
                task()
            raise

    def wait(self) -> None:
        """Help, and return when nothing is left to do: training waits."""
        self._waited_for = True
        try:
            # Who waits has a core to spare. It begins at the end: the writer follows what is copied from the beginning.
            while self._move(-1):
                continue
            with self._news:
                while self._copying or self._comparing:
                    self._news.wait()
        finally:
            with self._news:
                self._waited_for = False
                self._news.notify_all()

    def await_bytes(self, end: int, *, patient: bool) -> None:
        """As :meth:`Snapshot.await_bytes`, for what is copied by the processor."""
        with self._news:
            while self._failure is None:
                later = patient and self._waited_for and bool(self._todo)
                if self._filled >= end and not later:
                    return
                self._wanted = min(self._wanted, self._size if later else end)
                self._news.wait()
            raise SaveError(self._failure)

    def confirm(self) -> None:
        """Return when nothing is left to do. Raises SaveError where the buffer is not of one moment."""
        with self._news:
            while (self._copying or self._comparing) and self._failure is None:
                self._news.wait()
            if self._failure is not None:
                raise SaveError(self._failure)

    def check(self, changed: Callable[[], str | None]) -> None:
        """Ask which tensor was changed, if any, before another thread can find that all is well."""
        with self._news:
            name = changed()
            if name is not None:
                self._fail(name)

    def close(self) -> None:
        """Let the threads go, and the save that was filled last."""
        self._background.shutdown(wait=False)
        self._filled = 0

    def _copy(self, watch: Watch) -> None:
        """Copy in the order of the buffer, so that the writer can follow. Runs in the background."""
        try:
            moving = True
            while moving:
                while self._move(0):
                    continue
                with self._news:
                    while self._moving and not self._todo:
                        self._news.wait()
                    moving = bool(self._todo)  # A part comes back where a signal interrupted who copied it.
            # Not before: an operation that was under way raises the version counters only at its end.
            changed = watch.changed()
            if changed is not None:
                return self._fail(changed)
            with self._news:
                self._filled = self._size
        except BaseException as error:
            self._fail(f"({error})")
            with self._news:
                # Nobody keeps the memory of what is left alive after this.
                self._todo.clear()
                while self._moving:
                    self._news.wait()
            raise
        finally:
            with self._news:
                self._copying = False
                self._news.notify_all()

    def _move(self, end: Literal[0, -1]) -> bool:
        """Copy the first or the last part of what is to be copied. False where nothing is left."""
        with self._news:
            if not self._todo:
                return False
            at, address, size = self._todo[end]
            del self._todo[end]
            self._moving += 1
        copied = False
        try:
            # It releases the GIL, and takes one core: torch's copy would start a pool of threads of its own.
            ctypes.memmove(self._buffer + at, address, size)
            copied = True
        finally:
            with self._news:
                self._moving -= 1
                if not copied:  # A signal, such as Ctrl-C: whoever copies next takes it.
                    self._todo.insert(len(self._todo) if end else 0, (at, address, size))
                elif end == 0:
                    self._filled = self._todo[0][0] if self._todo else at + size
                if self._filled >= self._wanted or not self._todo or not copied:
                    self._wanted = self._size
                    self._news.notify_all()
        return True

    def _compare(self, kept: list[Kept]) -> None:
        """Whether the tensors are what the buffer holds since an earlier save: looking is cheaper than copying."""
        try:
            for item in kept:
                if checksum(memory(item.address, item.size)) != item.checksum:
                    return self._fail(item.name)
        except BaseException as error:
            self._fail(f"({error})")
            raise
        finally:
            with self._news:
                self._comparing -= 1
                self._news.notify_all()

    def _fail(self, name: str) -> None:
        with self._news:
            self.overlap = False
            self._failure = (
                f"{name} was changed while it was being copied, by something that is no step of a registered "
                "optimizer: this save is given up, and from now on everything is copied at once. Call "
                "Checkpointer.wait_snapshot() before changing weights by hand, and copies stay in the background."
            )
            self._filled = self._size
            self._news.notify_all()
