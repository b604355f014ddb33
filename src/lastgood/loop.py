"""The training loop: saves on schedule, and one last save when the job is asked to stop.

Ranks never decide alone: when rank 0's schedule by minutes is due, or any rank was asked to stop, rank 0 calls a
:mod:`~lastgood.meeting`, and all act at the same step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lastgood import stop
from lastgood.meeting import Decision

if TYPE_CHECKING:
    from lastgood.checkpointer import Checkpointer

_log = logging.getLogger("lastgood")
_WISH = "loop/wish"


class Loop:
    """One run of ``Checkpointer.steps`` on one rank."""

    def __init__(self, checkpointer: Checkpointer, every: int | None, minutes: float | None) -> None:
        self._owner = checkpointer
        self._world, self._channel, self._meeting = checkpointer.world, checkpointer.channel, checkpointer.meeting
        self._every, self._minutes = every, minutes
        self._request = stop.StopRequest()
        self._wished = False
        self._last_save = time.monotonic()

    def run(self, step: int, total: int | None) -> Iterator[int]:
        """Yield the numbers of the steps to do, from `step` on; save in between."""
        done = step
        with self._request.listen():
            self._meeting.enter(done)
            complete = False
            try:
                while total is None or done < total:
                    yield done
                    done += 1
                    self._boundary(done)
                    if done == total:
                        break  # Whoever asks for a stop now gets it: the training is complete.
                    if (decision := self._meeting.due(done)) is not None:
                        self._act(done, decision)
                    elif self._every is not None and done % self._every == 0:
                        self._save(done)
                complete = True
            finally:
                if not complete:
                    self._meeting.leave()
            if done > step:
                self._owner.save(done, blocking=True).result()  # Blocking is never skipped.

    def _save(self, step: int) -> None:
        self._owner.save(step)
        self._last_save = time.monotonic()

    def _act(self, step: int, decision: Decision) -> None:
        if decision.reason is None:
            self._save(step)
            return
        if decision.step < step:
            _log.error("rank 0 stopped the job at step %d, before this rank heard of it", decision.step)
        else:
            _log.warning("stopping after step %d (%s): saving", step, decision.reason)
            self._owner.save(step, blocking=True)
        self._owner.stop(step, decision.reason)

    def _boundary(self, step: int) -> None:
        """Between two steps: hear of a meeting, or call one."""
        self._meeting.boundary(step)
        if self._meeting.decision is not None:
            return
        reason = self._request.reason
        if self._world.rank != 0:
            if reason is not None and not self._wished:
                self._wished = True
                self._channel.post(_WISH, reason)
            if reason is not None and (why := self._channel.why_gone(0)) is not None:
                _log.error("rank 0 is gone (%s): stopping after step %d (%s) without a last save", why, step, reason)
                self._owner.stop(step, reason)
            return
        if reason is None and self._owner.stop_file_seen:
            reason = "the stop file"
        if reason is None:
            wishes = self._channel.arrived(_WISH)
            reason = next((f"{text} at rank {rank}" for (_, rank), text in wishes.items() if rank), None)
        due = self._minutes is not None and time.monotonic() - self._last_save >= 60 * self._minutes
        if reason is not None or due:
            self._meeting.call(step, reason)
