"""Scalars about the saves, for TensorBoard. Needs the extra ``tensorboard``."""

from __future__ import annotations

import os
from typing import Any

from lastgood.errors import LastGoodError


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

    def write(self, step: int, size: int, seconds: float, stall: float) -> None:
        """Add one save: bytes, seconds until it was durable, seconds that it held training up."""
        self._writer.add_scalar("lastgood/bytes", size, step)
        self._writer.add_scalar("lastgood/seconds", seconds, step)
        self._writer.add_scalar("lastgood/stall_seconds", stall, step)

    def close(self) -> None:
        self._writer.close()
