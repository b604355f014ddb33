"""Checkpoints that are saved once, whole and verified, and a job that always continues from the last good one."""

from __future__ import annotations

from importlib import import_module
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
from lastgood.files import load, replace_file, save
from lastgood.handle import SaveHandle
from lastgood.mirror import Mirror
from lastgood.retain import Keep

if TYPE_CHECKING:
    from lastgood.checkpointer import Checkpointer
    from lastgood.torchfile import inspect as inspect_torch_file
    from lastgood.torchfile import read as read_torch_file

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
    "inspect_torch_file",
    "load",
    "read_torch_file",
    "replace_file",
    "save",
]

# The public names that need torch, which takes seconds to import: the command line and `lastgood.save` in a program
# without it start at once.
_WITH_TORCH = {
    "Checkpointer": ("lastgood.checkpointer", "Checkpointer"),
    "inspect_torch_file": ("lastgood.torchfile", "inspect"),
    "read_torch_file": ("lastgood.torchfile", "read"),
}


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        module, attribute = _WITH_TORCH[name]
        globals()[name] = found = getattr(import_module(module), attribute)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
