"""What this process did, left in the run's state directory for the summary; and what it has to say."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

FIELDS = ("saves", "bytes", "seconds", "retries", "collisions", "failures", "set_aside", "fallbacks", "refusals")


class Report:
    """Counts of one process. A forked child starts at nought, under its own name."""

    def __init__(self, state: str) -> None:
        self._state = state
        self._lock = threading.RLock()
        self._said: set[str] = set()
        self.counts: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        """Begin anew, in a forked child."""
        self._name = f"{os.getpid()}-{os.urandom(4).hex()}.json"  # A long run meets the same pid again.
        self._lock = threading.RLock()  # A signal handler or a finalizer may save, too.
        self.counts = dict.fromkeys(FIELDS, 0)
        self.counts["last_failed"] = ""
        self.counts["last_failed_path"] = ""
        self.counts["last_failed_at"] = 0.0

    def add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self.counts[name] += amount
            self._leave()

    def failed(self, path: str, message: str) -> None:
        """The last save of this process failed; cleared by the next that succeeds, or by another's of this `path`."""
        with self._lock:
            self.counts["failures"] += 1
            self.counts["last_failed"] = message
            self.counts["last_failed_path"] = path
            self.counts["last_failed_at"] = time.time()
            self._leave()

    def saved(self, size: int, seconds: float, *, again: bool = False) -> None:
        """A file of `size` bytes is in place; `again`: it was counted before, under a temporary name of the program."""
        with self._lock:
            self.counts["last_failed"] = ""
        self.add(saves=0 if again else 1, bytes=0 if again else size, seconds=seconds)

    def _leave(self) -> None:
        # Written after each event and not at exit: ranks end by os._exit and by signals, too.
        if not self._state:
            return
        line = json.dumps(self.counts).encode() + b"\n"  # json.dump would take the slow way, piece by piece.
        try:
            # Not the builtin open: with --match '*' this file would count as a checkpoint. The first line is written
            # over, and what an earlier, longer one leaves behind it does not count: ext4 starts to write a file to the
            # disk that is emptied and closed, which takes longer than all else here.
            descriptor = os.open(os.path.join(self._state, self._name), os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
        except OSError:
            self._state = ""  # The launcher is gone; there is nobody left to read it.

    def say(self, message: str) -> None:
        sys.stderr.write(f"lastgood run: {message}\n")
        sys.stderr.flush()

    def say_once(self, key: str, message: str) -> None:
        """Say it once in the whole run, not once a process."""
        if key in self._said:
            return
        self._said.add(key)
        if self._state:
            try:
                os.close(os.open(os.path.join(self._state, f"said-{key}"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                return
            except OSError:
                self._state = ""
        self.say(message)
