"""Checkpoints that are saved once, whole and verified, and a job that always continues from the last good one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lastgood.errors import (
    DamagedError,
    LastGoodError,
    MismatchError,
    PeerError,
    RefusedError,
    ReplacedError,
    RunHeldError,
    SaveError,
)
from lastgood.files import load, save
from lastgood.handle import SaveHandle
from lastgood.mirror import Mirror
from lastgood.retain import Keep

if TYPE_CHECKING:
    from lastgood.checkpointer import Checkpointer

__all__ = [
    "Checkpointer",
    "DamagedError",
    "Keep",
    "LastGoodError",
    "Mirror",
    "MismatchError",
    "PeerError",
    "RefusedError",
    "ReplacedError",
    "RunHeldError",
    "SaveError",
    "SaveHandle",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    # Checkpointer is the one public name that needs torch, which takes seconds to import: the command line and
    # `lastgood.save` in a program without it start at once.
    if name == "Checkpointer":
        from lastgood.checkpointer import Checkpointer

        globals()[name] = Checkpointer
        return Checkpointer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
