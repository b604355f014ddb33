"""Scalars about the saves, for TensorBoard. Needs the extra ``tensorboard``."""

from __future__ import annotations

import logging
import os
from typing import Any

from lastgood.errors import LastGoodError

_log = logging.getLogger("lastgood")


class Scalars:
    """Writes bytes, seconds and stall of every save. Rank 0 only."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise LastGoodError(
                "tensorboard= needs the package tensorboard: pip install 'lastgood[tensorboard]'"
            ) from error
        self._writer: Any = SummaryWriter(str(directory))
        self._failed = False

    def write(self, step: int, size: int, seconds: float, stall: float) -> None:
        """Add one save: bytes, seconds until it was durable, seconds that it held training up."""
        if self._failed:
            return
        try:
            self._writer.add_scalar("lastgood/bytes", size, step)
            self._writer.add_scalar("lastgood/seconds", seconds, step)
            self._writer.add_scalar("lastgood/stall_seconds", stall, step)
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Write what is left."""
        try:
            self._writer.close()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """They are for people: training and saving go on without."""
        if not self._failed:
            _log.warning("TensorBoard failed (%s: %s): there are no more scalars", type(error).__name__, error)
        self._failed = True
