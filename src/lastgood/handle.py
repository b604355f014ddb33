"""What ``save`` gives back: the fate of one save, which is decided in the background."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

from lastgood.errors import SaveError


class SaveHandle:
    """One save of one step.

    Attributes:
        step: the step.
        state: "pending", "committed", "failed", "skipped" (an earlier save was still under way, and ``busy="skip"``)
            or "unknown" (rank 0 died at the moment when it mattered: the disk knows).
        path: the directory of the checkpoint, once committed.
        stall: seconds for which ``save`` held training up.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.state: Literal["pending", "committed", "failed", "skipped", "unknown"] = "pending"
        self.path: Path | None = None
        self.stall = 0.0
        self.error: BaseException | None = None
        self.seen = False
        """Whether somebody was told of the failure: then the end of the program need not shout."""
        self._decided = threading.Event()

    def done(self) -> bool:
        """Whether the fate is decided."""
        return self._decided.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the decision, at most `timeout` seconds; returns whether it is there. Raises nothing."""
        return self._decided.wait(timeout)

    def result(self, timeout: float | None = None) -> Path:
        """Wait until the checkpoint is on the disk.

        Returns:
            The directory of the checkpoint.

        Raises:
            SaveError: it was not saved, or nobody can say yet, or `timeout` seconds have passed.
        """
        if not self._decided.wait(timeout):
            raise SaveError(f"the save of step {self.step} is still under way after {timeout} s")
        if self.path is not None:
            return self.path
        self.seen = True
        if self.state == "skipped":
            raise SaveError(f"step {self.step} was not saved: the save before it was still under way (busy='skip')")
        if isinstance(self.error, SaveError):
            raise self.error
        raise SaveError(str(self.error)) from self.error

    def _decide(
        self,
        state: Literal["committed", "failed", "skipped", "unknown"],
        path: Path | None,
        error: BaseException | None,
    ) -> None:
        self.state, self.path, self.error = state, path, error
        self._decided.set()

    def __repr__(self) -> str:
        return f"<SaveHandle step={self.step} {self.state}>"
