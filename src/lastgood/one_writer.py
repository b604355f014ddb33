"""One writer for a path that every rank of a job saves, without messages between the ranks.

A training script calls ``save(obj, "weights.pth")`` in every rank, or in one; and ``save(rng, "rng_1.pth")`` in rank 1
alone. The call itself cannot tell these apart, and it may come before the process group exists. What decides is a lock
of the operating system for each path, and a small record of who wrote the path in which round; the round is the number
of this process's calls for this path. The rules, each chosen so that a doubt ends in one write too many, never in data
that nobody wrote:

- A process that belongs to no job, and rank 0, always write. So the last word is rank 0's.
- Another rank of a known number waits a moment (:data:`GRACE`) for rank 0 to begin, and for its end when it has begun;
  then it returns. When rank 0 does not come, the path is this rank's own: it writes, and does not wait the next time.
  A name that holds the rank's number (``rng_1.pth`` in rank 1) is not waited for at all.
- Children of one parent whose ranks are unknown: the first to come writes. Another returns when the same round was
  written while it called, or less than :data:`SAME_ROUND` seconds before.

What this cannot know: children with unknown ranks that save *different* data to one path within those seconds, in
calls of the same count. There, and wherever the caller knows better, ``rank=`` decides; ``rank=0`` always writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lastgood import disk

GRACE = 2.0
"""Seconds for which another rank waits for rank 0 to begin with the same path."""

SAME_ROUND = 2.0
"""Seconds between two calls of children with unknown ranks that still count as one round."""

_RECORD_LIMIT = 1 << 16
_RANK_VARIABLES = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
_JOB_VARIABLES = (
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
    "MASTER_ADDR",
    "MASTER_PORT",
)

_started = time.time()
_calls: dict[tuple[str, str], int] = {}
_own: dict[str, Path] = {}
# For each family of paths that only this rank saved so far: the record in which rank 0 would show up after all.
_threads: dict[str, threading.Lock] = {}


def _after_fork() -> None:
    global _started
    _started = time.time()
    _threads.clear()  # A lock that another thread of the parent held would never be released in the child.


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class Member:
    """This process as a member of a job of several processes."""

    job: str
    rank: int | None
    """None: one of several children of a parent, before anything told it its rank."""
    one_host: bool


def membership(rank: int | None = None) -> Member | None:
    """The job that this process belongs to, or None when it is alone. `rank` overrides what the process can see."""
    found, world = _rank_and_world()
    child = _is_rank_like_child()
    if rank is None:
        rank = found
    elif world is None and not child:
        world = 2  # Whoever passes a rank has others.
    if world == 1 or (world is None and not child):
        return None
    environment = {name: os.environ[name] for name in _JOB_VARIABLES if name in os.environ}
    if child and "MASTER_PORT" not in environment:
        environment["parent"] = f"{socket.gethostname()} {os.getppid()}"
    return Member(json.dumps(environment, sort_keys=True), rank, _is_one_host(child))


def _rank_and_world() -> tuple[int | None, int | None]:
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    for rank, world in _RANK_VARIABLES:
        with contextlib.suppress(KeyError, ValueError):
            return int(os.environ[rank]), int(os.environ[world])
    # torch.multiprocessing.spawn passes the index of the child: its rank, unless the job has several hosts.
    process: Any = multiprocessing.current_process()
    if getattr(getattr(process, "_target", None), "__module__", None) == "torch.multiprocessing.spawn":
        with contextlib.suppress(AttributeError, IndexError, TypeError, ValueError):
            return int(process._args[1]), None
    return None, None


def _is_rank_like_child() -> bool:
    """Whether a parent started this process through multiprocessing, as it would a rank.

    Workers of a pool or of a DataLoader get tasks of their own: what they save is never a copy of another's.
    """
    if multiprocessing.parent_process() is None:
        return False
    process: Any = multiprocessing.current_process()
    target = getattr(process, "_target", None)
    module = str(getattr(target, "__module__", ""))
    return not module.startswith(("multiprocessing.pool", "concurrent.futures", "torch.utils.data"))


def _is_one_host(child: bool) -> bool:
    environment = os.environ
    if "LOCAL_WORLD_SIZE" in environment and environment["LOCAL_WORLD_SIZE"] == environment.get("WORLD_SIZE"):
        return True
    if environment.get("MASTER_ADDR") in ("localhost", "127.0.0.1", "::1"):
        return True
    if environment.get("SLURM_JOB_NUM_NODES") == "1":
        return True
    return child and "MASTER_ADDR" not in environment


def write_once(path: Path, write: Callable[[], None], *, rank: int | None = None, timeout: float = 300.0) -> bool:
    """Call `write` in one of the processes that call this for `path` in the same round.

    Args:
        path: absolute, with links resolved.
        rank: the rank of this process, when the caller knows better than the environment.
        timeout: seconds to wait for another process that is writing; after that this one writes too.

    Returns:
        True where this process wrote; False where the path has been written by another when this returns.
    """
    member = membership(rank)
    if member is None:
        write()
        return True
    try:
        record = _record_path(path, member)
    except OSError:
        # No place for the record (a read-only temporary directory): every rank writes, each a whole file.
        write()
        return True
    round_ = _calls[member.job, str(path)] = _calls.get((member.job, str(path)), 0) + 1
    return _take_turn(_Turn(path, member, round_, record, time.time()), write, timeout)


def _record_path(path: Path, member: Member) -> Path:
    """Where the ranks of one job all look: in the temporary directory on one host, else beside the file."""
    name = hashlib.sha256(os.path.normcase(str(path)).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    if not member.one_host:
        directory = path.parent / ".lastgood"
        disk.make_dirs(directory)
        return directory / f"{name}.round"
    if sys.platform == "win32":
        user = os.environ.get("USERNAME", "")
    else:
        user = str(os.getuid())
    directory = Path(tempfile.gettempdir()) / f"lastgood-{user}"
    disk.make_private_dir(directory)
    return directory / f"{name}.round"


@dataclass(frozen=True)
class _Turn:
    path: Path
    member: Member
    round: int
    record: Path
    called: float

    @property
    def family(self) -> str:
        """The path without its numbers: ``checkpoint-500/state.bin`` and ``checkpoint-600/state.bin`` are one."""
        return self.member.job + re.sub(r"\d+", "#", str(self.path))

    def read(self) -> dict[str, Any]:
        return _read(self.record, self.member.job)

    def is_written(self, record: dict[str, Any]) -> bool:
        """Whether another member wrote this round. An entry older than this process is an earlier job's."""
        when = record["rounds"].get(str(self.round), 0.0)
        if self.member.rank is None:
            return bool(when >= _started and when >= self.called - SAME_ROUND)
        return bool((record["zero"][0] >= self.round and record["zero"][1] >= _started) or when >= _started)

    def grace(self) -> float:
        """Seconds to wait for rank 0."""
        rank = self.member.rank
        if rank is None or rank == 0:
            return 0.0
        if re.search(rf"(?<!\d)0*{rank}(?!\d)", self.path.name):
            return 0.0
        previous = _own.get(self.family)
        if previous is not None and _read(previous, self.member.job)["zero"][0] == 0:
            return 0.0
        return GRACE

    def note(self) -> None:
        """Record this round, for the others."""
        record = self.read()
        now = time.time()
        rounds = {number: when for number, when in record["rounds"].items() if int(number) > self.round - 16}
        rounds[str(self.round)] = now
        zero = [self.round, now] if self.member.rank == 0 else record["zero"]
        content = {"job": self.member.job, "path": str(self.path), "rounds": rounds, "zero": zero}
        with contextlib.suppress(OSError):  # Without the record another rank writes too: one write too many.
            disk.overwrite(self.record, json.dumps(content).encode())


def _read(record: Path, job: str) -> dict[str, Any]:
    """The record of a job, empty when it is missing, another job's, or being written at this moment."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(disk.read_bytes(record, limit=_RECORD_LIMIT))
        if isinstance(content, dict) and content.get("job") == job:
            return content
    return {"rounds": {}, "zero": [0, 0.0]}


def _take_turn(turn: _Turn, write: Callable[[], None], timeout: float) -> bool:
    begin = time.monotonic()
    grace = turn.grace()
    pause = 0.002
    while True:
        if turn.member.rank != 0 and turn.is_written(turn.read()):
            _own.pop(turn.family, None)
            return False
        waited = time.monotonic() - begin
        if waited >= timeout:
            write()
            return True
        with _locked(turn.record) as locked:
            # The record is read again under the lock: the last holder may have written just before.
            if locked and waited >= grace and (turn.member.rank == 0 or not turn.is_written(turn.read())):
                write()
                turn.note()
                if turn.member.rank:
                    _own[turn.family] = turn.record
                return True
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


@contextlib.contextmanager
def _locked(record: Path) -> Iterator[bool]:
    """Hold the lock of a path, unless another process or thread has it. No locks count as held."""
    within = _threads.setdefault(str(record), threading.Lock())
    if not within.acquire(blocking=False):
        yield False
        return
    try:
        try:
            lock = disk.FileLock.try_acquire(record.with_suffix(".lock"))
        except OSError:
            yield True
            return
        if lock is None:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
    finally:
        within.release()
