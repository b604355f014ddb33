"""Requests to stop: signals, and a file in the run directory for systems where nobody sends one."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from lastgood import disk

_log = logging.getLogger("lastgood")
STOP_FILE = "stop"
REPEAT_SECONDS = 2.0
"""A second signal counts as one when it comes so much later than the first."""
_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGBREAK")


class StopRequest:
    """Whether somebody asked this process to stop after the present step."""

    def __init__(self) -> None:
        self.reason: str | None = None

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Take the signals while the context lasts.

        The first one only sets :attr:`reason`, after calling the handler that was there before. Launchers pass on
        what the terminal or the scheduler has sent to every process already, so for `REPEAT_SECONDS` more signals are
        taken for the same request. After that a signal ends the program: the former handler is called, and where
        that returns, the signal's default action follows. A signal that the program was started to ignore stays
        ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            _log.warning("signals can only be taken in the main thread: this loop stops on the stop file alone")
            yield
            return
        owner = os.getpid()
        before: dict[int, Any] = {}
        first: float | None = None

        def put_back() -> None:
            for number, handler in before.items():
                if signal.getsignal(number) is handle:
                    signal.signal(number, handler if handler is not None else signal.SIG_DFL)

        def handle(number: int, frame: FrameType | None) -> None:
            former = before.get(number)
            if os.getpid() != owner:
                # A forked child (a data loader's worker) has inherited us. It is not the training: act as without us.
                signal.signal(number, former if former is not None else signal.SIG_DFL)
                signal.raise_signal(number)
                return
            nonlocal first
            if first is None:
                first = time.monotonic()
                self.reason = signal.Signals(number).name
                if callable(former) and former is not signal.default_int_handler:
                    former(number, frame)
            elif time.monotonic() - first >= REPEAT_SECONDS:
                put_back()
                if callable(former):
                    former(number, frame)
                    signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)

        for name in _NAMES:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
        try:
            yield
        finally:
            put_back()


def ask(run: Path) -> None:
    """Leave the stop file: every job that runs `steps` on this run saves and stops soon."""
    with contextlib.suppress(FileExistsError), disk.NewFile(run / STOP_FILE):
        pass


def is_asked(run: Path) -> bool:
    return disk.exists(run / STOP_FILE)


def withdraw(run: Path) -> bool:
    """Remove the stop file. Returns whether there was one."""
    there = is_asked(run)
    try:
        disk.remove(run / STOP_FILE, missing_ok=True)
    except OSError as error:
        _log.warning("the stop file could not be removed: %s. Delete it, or the next job stops at once.", error)
    return there
