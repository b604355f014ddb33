"""How ranks agree on a step at which all of them act: a save that a clock asked for, or the last one before a stop.

Rank 0 calls a meeting between two of its steps. On every other rank the background thread answers at once with the
number of steps that its training has done, and holds the training before it begins another step than the present one.
Rank 0 then decides for a step that nobody has passed. No rank is held in the middle of a step, where another may need
its part in a collective operation, and no answer waits for a training that waits for such a part. So a meeting lasts
as long as two messages, whether the hosts run ahead of their devices or not.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from lastgood.coordinate import Channel
from lastgood.errors import PeerError
from lastgood.values import Json
from lastgood.world import World

_log = logging.getLogger("lastgood")
_SECONDS = 10.0
"""How long rank 0 waits for answers. They come from background threads: a live rank needs milliseconds."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a meeting came to."""

    step: int
    """All ranks act when they have done so many steps."""
    reason: str | None
    """Why the job stops there, or None where it only saves."""


class Meeting:
    """The meetings of one rank, one after the other."""

    def __init__(self, world: World, channel: Channel, deadline: float) -> None:
        self._world, self._channel = world, channel
        self._seconds = min(deadline, _SECONDS)
        self._lock = threading.Lock()
        self._done: int | None = None
        self._called = 0
        self._held: int | None = None
        self.decision: Decision | None = None
        """What is still to be done. It outlives a training loop that ended before: on every rank alike."""
        channel.on("meeting/call/", self._answer)

    def enter(self, step: int) -> None:
        """The training loop begins, with `step` steps done."""
        with self._lock:
            self._done = step

    def leave(self) -> None:
        """The training loop was broken off: this rank does not count. (After a complete one the others get there.)"""
        with self._lock:
            self._done = None

    def _answer(self, key: str, _: Json) -> None:
        """Another rank, in the background thread: say how many steps are done, and hold the training."""
        number = int(key.rsplit("/", 1)[1])
        with self._lock:
            self._held, done = number, self._done
        self._channel.post(f"meeting/at/{number}", done)

    def boundary(self, step: int) -> None:
        """Between two steps: note that `step` are done. While a meeting is on, wait for its decision."""
        with self._lock:
            self._done = step
            number, self._held = self._held, None
        if number is None:
            return
        try:
            # Rank 0 waits for all answers, and then decides.
            found = self._channel.receive(f"meeting/decision/{number}", time.monotonic() + 3 * self._seconds)
        except PeerError as error:
            _log.warning("no decision on when to save: %s", error)
            return
        self.decision = Decision(found["step"], found["reason"])

    def due(self, step: int) -> Decision | None:
        """The decision, when its step has come; given out once. One that comes too late counts only for a stop."""
        found = self.decision
        if found is None or found.step > step:
            return None
        self.decision = None
        return found if found.step == step or found.reason is not None else None

    def call(self, step: int, reason: str | None) -> None:
        """Rank 0, between two steps: all ranks say where they are; act at the first step that nobody has passed."""
        number, self._called = self._called, self._called + 1
        others = range(1, self._world.size)
        self._channel.forget("meeting/at/")
        self._channel.post(f"meeting/call/{number}", True)
        answers = self._channel.collect(f"meeting/at/{number}", others, time.monotonic() + self._seconds)
        silent = [rank for rank in others if rank not in answers]
        if silent:
            _log.warning("ranks %s did not say at which step they are; going on without them", silent)
        # A rank that has done n steps is in the next one, or about to begin it: it can act after n + 1.
        decision = Decision(max([step, *(done + 1 for done in answers.values() if done is not None)]), reason)
        self._channel.post(f"meeting/decision/{number}", {"step": decision.step, "reason": reason})
        self.decision = decision
