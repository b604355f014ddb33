"""What a run remembers beside the state of its training."""

from __future__ import annotations

from typing import Any


class Notes:
    """A part of the checkpoint, the same on every rank."""

    def __init__(self) -> None:
        self.clips = ""
        """A hash of the clips that are trained on: the same folder name does not make the same voice."""
        self.imported = ""
        """The path from which the run began with ``--import``; empty where it did not."""
        self.unwritten: dict[int, int] = {}
        """Epochs whose weights file is wanted and could not be written, and their steps."""

    def state_dict(self) -> dict[str, Any]:
        return {"clips": self.clips, "imported": self.imported, "unwritten": sorted(self.unwritten.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clips, self.imported = str(state["clips"]), str(state["imported"])
        self.unwritten = {int(epoch): int(step) for epoch, step in state["unwritten"]}
