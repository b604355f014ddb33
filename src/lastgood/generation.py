"""Who holds a run. A job takes it by creating the next generation's file, which only one can do.

    runs/voice/
      lock                         held through the operating system while the job lives (same machine: decisive)
      generations/00000003.json    who holds it, and how its ranks reach rank 0
      generations/00000003.beat    a counter that grows while the job lives (another machine: watch it)
      generations/00000003.base    the checkpoint that this life started from
      generations/00000003.end     the job gave the run back

No decision depends on a clock that two machines would have to share, on a process id, or on a host name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import sys
import time
from pathlib import Path

from lastgood import disk
from lastgood.errors import LastGoodError, ReplacedError, RunHeldError
from lastgood.files import is_temporary, replace_file, temporary_name
from lastgood.values import Json
from lastgood.world import World, machine_id

_log = logging.getLogger("lastgood")

BEAT_SECONDS = 2.0
STALE_SECONDS = 60.0
"""A job on another machine whose counter has stood still for so long is taken for gone."""

_RECORD = re.compile(r"(\d{8,})\.json")
_BASE = re.compile(r"(\d{8,})\.base")
_KEEP_RECORDS = 16
_LOOK_SECONDS = 0.3
_READ_LIMIT = 1 << 20


def generations(run: Path) -> list[int]:
    """The numbers that were taken, ascending."""
    found = (_RECORD.fullmatch(name) for name in disk.names(run / "generations"))
    return sorted(int(match[1]) for match in found if match)


def highest_note(run: Path) -> int:
    """The highest generation of which a note of its base is there: all that a mirror has of them."""
    found = (_BASE.fullmatch(name) for name in disk.names(run / "generations"))
    return max((int(match[1]) for match in found if match), default=0)


def record(run: Path, number: int) -> Json | None:
    """What a generation's file says, or None where it says nothing: it is being written, or damaged."""
    try:
        who = json.loads(disk.read_bytes(_path(run, number, "json"), limit=_READ_LIMIT))
    except (OSError, ValueError, RecursionError):
        return None
    return who if isinstance(who, dict) else None


def base(run: Path, number: int) -> str | None:
    """The directory name of the checkpoint that a generation started from, "" for a fresh start, None if unknown."""
    try:
        return disk.read_bytes(_path(run, number, "base"), limit=1000).decode("ascii", "replace")
    except (OSError, ValueError):
        return None


def _path(run: Path, number: int, kind: str) -> Path:
    return run / "generations" / f"{number:08d}.{kind}"


def is_open(run: Path) -> bool:
    """Whether the last job on a run did not give it back: it lives, or ended without a word."""
    taken = generations(run)
    return bool(taken) and not disk.exists(_path(run, taken[-1], "end"))


def holder(run: Path, *, patience: float = 3 * BEAT_SECONDS) -> Json | None:
    """What the file of the job that holds the run says, or None where no job seems to. Takes nothing.

    Not for the process that holds it: closing the lock file would drop its lock.

    Args:
        patience: seconds for which the counter of a job on another machine is watched.
    """
    taken = generations(run)
    if not taken or disk.exists(_path(run, taken[-1], "end")):
        return None
    who = record(run, taken[-1]) or {}
    if who.get("machine") == machine_id():
        try:
            lock = disk.FileLock.try_acquire(run / "lock")
        except OSError:
            pass  # A user who may only read: the counter tells.
        else:
            if lock is None:
                return who
            lock.release()
            return None
    try:
        _watch(run, taken[-1], who, patience)
    except RunHeldError:
        return who
    return None


class Holder:
    """The hold of this process (rank 0 of its job) on a run."""

    def __init__(self, run: Path, number: int, identity: str, lock: disk.FileLock, group: int | None) -> None:
        self.run = run
        self._identity = identity
        self._beat_failed = False
        self.number = number
        self._lock = lock
        self._group = group
        self._beats = 0

    @classmethod
    def take(
        cls,
        run: Path,
        world: World,
        invitation: Json,
        *,
        at_least: int = 1,
        group: int | None = None,
        stale: float = STALE_SECONDS,
    ) -> Holder:
        """Take the run.

        Args:
            run: its directory; it exists.
            invitation: how the other ranks reach this process; goes into the generation's file.
            at_least: the lowest number that the generation may have.
            stale: seconds of standing still after which a holder on another machine is taken for gone.

        Raises:
            RunHeldError: another job holds it, or took it first.
        """
        directory = run / "generations"
        try:
            disk.make_dir(directory)  # Durable with the name of the first checkpoint.
        except FileExistsError:
            if not disk.is_dir(directory):
                raise
        lock = _acquire(run)
        taken = generations(run)
        last = taken[-1] if taken else 0
        who = record(run, last) if last else None
        ended = last and disk.exists(_path(run, last, "end"))
        if lock is None:
            raise RunHeldError(_held(run, who))
        if last and not ended and (who is None or who.get("machine") != machine_id()):
            # On this machine the lock has just decided. For another one it may mean nothing.
            try:
                _watch(run, last, who, stale)
            except BaseException:
                lock.release()
                raise
        number = max(last + 1, at_least)
        identity = secrets.token_hex(8)
        me = {
            "identity": identity,
            "host": socket.gethostname(),
            "machine": machine_id(),
            "pid": os.getpid(),
            "started": time.time(),
            "command": " ".join(sys.argv)[:500],
            "world_size": world.size,
            **invitation,
        }
        try:
            _write_record(_path(run, number, "json"), me)
        except FileExistsError:
            lock.release()
            raise RunHeldError(_held(run, record(run, number))) from None
        except BaseException:
            # A record without a job behind it would be waited for on another machine.
            with contextlib.suppress(OSError):
                disk.remove(_path(run, number, "json"), missing_ok=True)
            lock.release()
            raise
        holder = cls(run, number, identity, lock, group)
        if group is not None:
            for path in (directory, run / "lock"):
                disk.give_to_group(path, group)
        holder.beat()
        holder._tidy(taken)
        return holder

    def advance(self, world: World) -> None:
        """Begin the next generation of the same job: after a roll-back the old branch is history."""
        self.check()
        number = self.number + 1
        me = {**(record(self.run, self.number) or {}), "identity": self._identity, "world_size": world.size}
        try:
            _write_record(_path(self.run, number, "json"), me)
        except FileExistsError:
            raise ReplacedError(_replaced(self.run, number)) from None
        self.number = number
        self.beat()

    def set_base(self, name: str | None) -> None:
        """Note the checkpoint from which this generation starts."""
        replace_file(_path(self.run, self.number, "base"), lambda file: _write(file, (name or "").encode()))

    def check(self) -> None:
        """Before every commit and every deletion: raise ReplacedError when a later job has taken the run."""
        taken = generations(self.run)
        if not taken:
            raise ReplacedError(
                f"{self.run}/generations is empty: the run directory was moved or deleted while this job used it. "
                "Nothing was committed or deleted."
            )
        if taken[-1] != self.number:
            raise ReplacedError(_replaced(self.run, taken[-1]))
        who = record(self.run, self.number)
        if who is not None and who.get("identity") != self._identity:
            raise ReplacedError(
                f"{self.run} is another run than the one that this job has taken: that was moved away, and a new one "
                f"({holder_name(who)}) has its name. Nothing more is committed or deleted by this job."
            )

    def beat(self) -> None:
        """Show that the job lives."""
        self._beats += 1
        try:
            # Not patiently: the next beat comes soon, and the thread that beats moves the messages too.
            disk.overwrite(_path(self.run, self.number, "beat"), str(self._beats).encode(), patience=0)
        except OSError as error:
            if not self._beat_failed and not disk.is_held(error):
                _log.warning("the heartbeat of %s could not be written: %s", self.run, error)
            self._beat_failed = True
        else:
            self._beat_failed = False

    def release(self) -> None:
        """Give the run back: the next job need not wait."""
        try:
            if generations(self.run)[-1:] == [self.number]:
                with disk.NewFile(_path(self.run, self.number, "end")):
                    pass
        except OSError as error:
            raise LastGoodError(
                f"{self.run} could not be given back cleanly ({error}); the next job on another machine will wait "
                f"{STALE_SECONDS:.0f} s before it takes the run."
            ) from error
        finally:
            self._lock.release()

    def _tidy(self, taken: list[int]) -> None:
        """Delete the records of lives long over, and what a life that was killed had begun to write."""
        # The notes of the bases stay, a few bytes each: the branches of old checkpoints hang on them.
        for number in taken[:-_KEEP_RECORDS]:
            for kind in ("beat", "end", "json"):
                _remove(_path(self.run, number, kind))
        directory = self.run / "generations"
        for name in disk.names(directory):
            if is_temporary(name):
                _remove(directory / name)


def _write_record(path: Path, content: Json) -> None:
    """Write a generation's file, all at once. Raises FileExistsError where another job has that number.

    Its name need not be durable: a later job counts on from the checkpoints as well.
    """
    data = json.dumps(content).encode()
    temporary = temporary_name(path)
    try:
        _write_new(temporary, data)
        try:
            disk.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:
            # No hard links here. A job that is killed in this moment leaves half a record, which looks like a job on
            # another machine: the next one waits for it.
            _write_new(path, data)
    finally:
        _remove(temporary)


def _write_new(path: Path, data: bytes) -> None:
    with disk.NewFile(path) as file:
        file.write(data)
        file.sync()


def _remove(path: Path) -> None:
    """Delete what is of no use. Where the system refuses, because a program has it open, the next job tries again."""
    try:
        disk.remove(path, missing_ok=True, patience=0)
    except OSError as error:
        _log.info("%s could not be deleted yet: %s", path, error)


def _acquire(run: Path) -> disk.FileLock | None:
    """The lock of a run, or None where another job holds it. A command that looks has it for a moment only."""
    end = time.monotonic() + _LOOK_SECONDS
    try:
        while (lock := disk.FileLock.try_acquire(run / "lock")) is None and time.monotonic() < end:
            time.sleep(0.02)
    except OSError as error:
        raise LastGoodError(
            f"{run / 'lock'} cannot be locked ({error}), so nobody could tell whether another job uses this run. If "
            "it is no plain file of yours, delete it while no job uses the run; it holds nothing."
        ) from error
    return lock


def _write(file: object, data: bytes) -> None:
    file.write(data)  # type: ignore[attr-defined]


def _watch(run: Path, number: int, who: Json | None, stale: float) -> None:
    """Raise RunHeldError when the counter of another machine's job moves within `stale` seconds."""
    path = _path(run, number, "beat")

    def counter() -> bytes | None:
        try:
            return disk.read_bytes(path, limit=100)
        except (OSError, ValueError):
            return None

    first = counter()
    end = time.monotonic() + stale
    while time.monotonic() < end:
        if counter() != first or generations(run)[-1:] != [number]:
            raise RunHeldError(_held(run, who))
        time.sleep(min(0.5, stale / 20))


def _held(run: Path, who: Json | None) -> str:
    holder = "another job"
    if who is not None:
        try:
            started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(who.get("started", 0)))
        except (TypeError, ValueError, OverflowError, OSError):
            started = "a time that its record does not tell"
        holder = (
            f"process {who.get('pid')} on {who.get('host')} (since {started}, {who.get('world_size')} rank(s), "
            f"command: {who.get('command')})"
        )
    return (
        f"{run} is held by {holder}. Two jobs cannot save into one run: stop the other one, or use another directory. "
        "If both are ranks of the same job, call torch.distributed.init_process_group() before making the "
        "Checkpointer, or pass it rank= and world_size=. Reading (ls, show, verify, export) needs no hold."
    )


def _replaced(run: Path, number: int) -> str:
    return (
        f"{run} was taken over by generation {number} ({holder_name(record(run, number))}) while this job stood "
        "still. Nothing more is committed or deleted by this job; the checkpoints of both are intact."
    )


def holder_name(who: Json | None) -> str:
    """Which process a generation's file was written by, for messages."""
    return f"process {who.get('pid')} on {who.get('host')}" if who else "another job"
