"""Which rank this process is, as far as it can be known without asking anyone."""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import Any

_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def rank() -> int | None:
    """The global rank, or None where nothing tells it."""
    distributed: Any = sys.modules.get("torch.distributed")
    try:
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            return int(distributed.get_rank())
    except (AttributeError, RuntimeError):
        return None
    for name in _VARIABLES:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    # Lightning's children get LOCAL_RANK and NODE_RANK only; without NODE_RANK or on node 0 that is the global rank.
    local = os.environ.get("LOCAL_RANK", "")
    if local.isdigit() and os.environ.get("NODE_RANK", "0") == "0":
        return int(local)
    # torch.multiprocessing.spawn passes the index of the child.
    process: Any = multiprocessing.current_process()
    if getattr(getattr(process, "_target", None), "__module__", None) == "torch.multiprocessing.spawn":
        arguments: Any = getattr(process, "_args", ())
        if len(arguments) > 1 and isinstance(arguments[1], int):
            return arguments[1]
    return None
