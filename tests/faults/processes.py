"""Forked children: a process that has imported torch once makes each life of a job in milliseconds."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# The first optimizer of a process imports it, which takes more than a second: here it is once for all children.
import torch._dynamo  # noqa: F401

LIMIT_SECONDS = 240.0
"""For one life of a job. A life takes a fraction of a second; this is reached only when something hangs."""


def fork(action: Callable[[], int], log: Path) -> int:
    """Run `action` in a child that writes its standard error to `log`. Returns the process id.

    The child ends with os._exit: nothing of the parent's runs twice.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = action()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class Ranks:
    """The processes of one life of a job, by rank."""

    def __init__(self, actions: list[Callable[[], int]], directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.limit: float | None = LIMIT_SECONDS
        self.codes: dict[int, int] = {}
        """By rank, the exit code, or minus the signal that ended it."""
        self._alive = {fork(action, directory / f"{rank}.log"): rank for rank, action in enumerate(actions)}
        _started.append(self)

    def wait(
        self, on_death: Callable[[int], None] | None = None, tick: Callable[[], None] | None = None
    ) -> dict[int, int]:
        """Wait until all have ended; `on_death` is called with each rank that has. Returns the exit codes.

        `tick` is called every few milliseconds meanwhile.
        """
        began = time.monotonic()
        while self._alive:
            for child in list(self._alive):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    rank = self._alive.pop(child)
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
                    if on_death is not None:
                        on_death(rank)
            if self.limit is not None and time.monotonic() - began > self.limit:
                ranks = self.alive
                self.kill()
                raise TimeoutError(f"ranks {ranks} still run after {self.limit:.0f} s:\n{self.log()}")
            if tick is not None:
                tick()
            time.sleep(0.002)
        return self.codes

    def kill(self, *ranks: int) -> None:
        """SIGKILL the given ranks, or all that live."""
        self.signal(signal.SIGKILL, *ranks)

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to the given ranks, or to all that live."""
        for child, rank in self._alive.items():
            if not ranks or rank in ranks:
                os.kill(child, number)
                if number == signal.SIGSTOP:
                    # What a system call was doing is done only then.
                    os.waitid(os.P_PID, child, os.WSTOPPED | os.WNOWAIT)

    @property
    def alive(self) -> list[int]:
        return sorted(self._alive.values())

    def log(self) -> str:
        """What the ranks wrote to standard error."""
        parts = []
        for path in sorted(self.directory.glob("*.log")):
            parts.append(f"--- rank {path.stem}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(parts)


_started: list[Ranks] = []


def end_all() -> None:
    """Kill what a case that was broken off has left running: it would go on, and slow down all that follows."""
    for ranks in _started:
        if ranks.alive:
            ranks.kill()
            ranks.wait()
    _started.clear()


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory for what is made and thrown away by the hundred: in memory where the system has such a place.

    What was started in it ends with it.
    """
    import shutil
    import tempfile

    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="lastgood-faults-", dir=place))
    try:
        yield directory
    finally:
        end_all()
        shutil.rmtree(directory, ignore_errors=True)
