"""The observer that ends its process at one disk operation: before it, in the middle of a write, or after it."""

from __future__ import annotations

import os
import signal
import threading
from typing import Literal

from lastgood import disk

Moment = Literal["before", "torn", "after"]
_UNCOUNTED = ("read", "overwrite")
# A read changes nothing on the disk, so a kill around it is a kill after the operation before. The heartbeat comes by
# the clock, so it has no place in the order.


class Killer:
    """Ends this process at an operation, or only counts."""

    def __init__(self, number: int | None = None, moment: Moment = "before") -> None:
        self.seen: list[str] = []
        self.done: set[int] = set()
        """Those of the operations that succeeded."""
        self._number, self._moment = number, moment
        self._lock = threading.Lock()
        self._mine = threading.local()

    def __call__(self, operation: disk.Operation, when: Literal["before", "after"]) -> None:
        if operation.name in _UNCOUNTED:
            return
        if when == "before":
            with self._lock:
                self._mine.number = len(self.seen)
                self.seen.append(f"{operation.name} {operation.path.name}")
        else:
            self.done.add(self._mine.number)
        if self._mine.number != self._number or (when == "after") != (self._moment == "after"):
            return
        if self._moment == "torn":
            _tear(operation)
        end_at_once()


def end_at_once() -> None:
    """As the system does it to a process: nothing in it runs any more."""
    # On Windows every signal but Ctrl-C and Ctrl-Break is a TerminateProcess, with the number as the exit code.
    os.kill(os.getpid(), signal.SIGTERM if os.name == "nt" else signal.SIGKILL)


def _tear(operation: disk.Operation) -> None:
    """Do one half of a write."""
    assert operation.data is not None
    half = operation.data[: len(operation.data) // 2]
    if operation.file is not None:
        operation.file.write(half)
    else:
        with operation.path.open("ab", buffering=0) as file:
            file.write(half)
