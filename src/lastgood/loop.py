"""The training loop: saves on schedule, and one last save when the job is asked to stop.

Ranks never decide alone. When rank 0's schedule by minutes is due, or any rank was asked to stop, rank 0 calls a
meeting; every rank answers at its next step boundary with the number of steps that it has done, and waits there; all
act at the highest number. A rank whose host runs ahead of its GPU has issued the work that the others still need, so
nobody waits for a rank that waits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lastgood import stop
from lastgood.errors import PeerError

if TYPE_CHECKING:
    from lastgood.checkpointer import Checkpointer

_log = logging.getLogger("lastgood")


class Loop:
    """One run of ``Checkpointer.steps`` on one rank."""

    def __init__(self, checkpointer: Checkpointer, every: int | None, minutes: float | None) -> None:
        self._owner = checkpointer
        self._world, self._channel = checkpointer.world, checkpointer.channel
        self._every, self._minutes = every, minutes
        self._request = stop.StopRequest()
        self._meeting = 0
        self._called = False
        self._wished = False
        self._act_at: tuple[int, str | None] | None = None
        self._last_save = time.monotonic()

    def run(self, step: int, total: int | None) -> Iterator[int]:
        """Yield the numbers of the steps to do, from `step` on; save in between."""
        done = step
        with self._request.listen():
            while total is None or done < total:
                yield done
                done += 1
                self._boundary(done, total)
                if self._act_at is not None and self._act_at[0] == done:
                    self._act(done)
                elif self._every is not None and done % self._every == 0:
                    self._save(done)
            self._channel.post(self._key("finished"), done)
        handle = self._owner.save(done) if done > step else None
        if handle is not None:
            handle.result()

    def _key(self, what: str) -> str:
        return f"loop/{self._owner.generation}/{what}"

    def _save(self, step: int) -> None:
        self._owner.save(step)
        self._last_save = time.monotonic()

    def _act(self, step: int) -> None:
        assert self._act_at is not None
        reason = self._act_at[1]
        self._act_at = None
        if reason is None:
            self._save(step)
            return
        _log.warning("stopping after step %d (%s): saving", step, reason)
        self._owner.save(step).wait()
        self._owner.stop(step, reason)

    def _boundary(self, step: int, total: int | None) -> None:
        """Between two steps: hear of a meeting, or call one."""
        if self._act_at is not None:
            return
        reason = self._request.reason
        if self._world.rank != 0:
            if reason is not None and not self._wished:
                self._wished = True
                self._channel.post(self._key("wish"), reason)
            if self._channel.peek(self._key(f"meet/{self._meeting}"), 0) is not None:
                self._attend(step)
            return
        if reason is None and self._owner.stop_file_seen:
            reason = "the stop file"
        if reason is None:
            wishes = self._channel.arrived(self._key("wish"))
            reason = next((f"{text} at rank {rank}" for (_, rank), text in wishes.items() if rank), None)
        due = self._minutes is not None and time.monotonic() - self._last_save >= 60 * self._minutes
        if reason is not None or due:
            self._chair(step, reason)

    def _chair(self, step: int, reason: str | None) -> None:
        """Rank 0: all ranks say where they are, and act at the highest step."""
        number, self._meeting = self._meeting, self._meeting + 1
        others = range(1, self._world.size)
        deadline = time.monotonic() + self._owner.deadline
        self._channel.post(self._key(f"meet/{number}"), True)
        answers = self._channel.collect(
            self._key(f"at/{number}"),
            others,
            deadline,
            lambda rank: self._channel.peek(self._key("finished"), rank) is not None,
        )
        silent = [rank for rank in others if rank not in answers]
        if any(self._channel.peek(self._key("finished"), rank) is None for rank in silent):
            _log.warning("ranks %s did not say at which step they are; going on without them", silent)
        at = max([step, *answers.values()])
        self._channel.post(self._key(f"act/{number}"), {"step": at, "reason": reason})
        self._act_at = (at, reason)

    def _attend(self, step: int) -> None:
        """Another rank: say where it is, and wait to hear when to act."""
        number, self._meeting = self._meeting, self._meeting + 1
        self._channel.post(self._key(f"at/{number}"), step)
        try:
            decision = self._channel.receive(self._key(f"act/{number}"), time.monotonic() + 2 * self._owner.deadline)
        except PeerError as error:
            _log.warning("no decision on when to save: %s", error)
            return
        self._act_at = (max(step, decision["step"]), decision["reason"])
