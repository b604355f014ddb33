"""Checkpoints that are saved once, whole and verified, and a job that always continues from the last good one."""

from lastgood.checkpointer import Checkpointer
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
