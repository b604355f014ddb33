"""The place of a process in its job, and of a job on its machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lastgood import disk
from lastgood.errors import LastGoodError


@dataclass(frozen=True)
class World:
    """The place of this process in its job."""

    rank: int
    size: int
    one_host: bool
    """Whether all ranks are known to run on this machine."""


def detect_world(rank: int | None = None, world_size: int | None = None) -> World:
    """Rank and world size: as given, else from the process group, else from the launcher's variables, else alone.

    Raises:
        LastGoodError: only one of the two is given, or the rank is not below the world size.
    """
    if (rank is None) != (world_size is None):
        raise LastGoodError("rank= and world_size= must be given together")
    local_size = _environment_int("LOCAL_WORLD_SIZE")
    if rank is None or world_size is None:
        rank, world_size = _detected()
    if not 0 <= rank < world_size:
        raise LastGoodError(f"rank {rank} of {world_size}: ranks are counted from 0 and are below the world size")
    master = os.environ.get("MASTER_ADDR", "")
    one_host = world_size == 1 or local_size == world_size or master in ("127.0.0.1", "localhost", "::1")
    return World(rank, world_size, one_host)


def _detected() -> tuple[int, int]:
    # Not imported here: a job of one process that never asked for torch.distributed does not get it.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    # SLURM's variables of the step, not of the allocation: in an interactive allocation a plain python is alone.
    for rank_name, size_name in (
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ):
        rank, size = _environment_int(rank_name), _environment_int(size_name)
        if rank is not None and size is not None:
            return rank, size
    return 0, 1


def _environment_int(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else None


def job_id() -> str:
    """The same on all ranks of one launch, as far as anything that they surely have in common tells launches apart."""
    names = [
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
        "OMPI_MCA_ess_base_jobid",
    ]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun gives them to all its ranks. Elsewhere each may have its own: "localhost" on the master itself.
        names += ["MASTER_ADDR", "MASTER_PORT"]
    texts = [os.environ.get(name, "") for name in names]
    store = default_store()
    if store is not None:
        with contextlib.suppress(Exception):
            # The first rank to come writes it, and all read the same: neither waits for another.
            texts.append(store.compare_set("lastgood/job", "", secrets.token_hex(8)).decode())
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def default_store() -> Any:
    """The store of the training's process group, or None where there is none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    with contextlib.suppress(Exception):
        # Private in torch, but there since 1.6; without it ranks still find each other through the run directory.
        return distributed.distributed_c10d._get_default_store()
    return None


def machine_id() -> str:
    """The same for all processes that one running kernel serves, in whatever container."""
    try:
        return disk.read_bytes(Path("/proc/sys/kernel/random/boot_id"), limit=100).decode().strip()
    except OSError:
        if sys.platform == "darwin" and (session := _boot_session()):
            return session
        with contextlib.suppress(OSError):
            # Not the network card's number alone: Python makes one up, for each process anew, where it finds none.
            return f"{socket.gethostname()}-{disk.machine_guid()}"
        return f"{socket.gethostname()}-{uuid.getnode():x}"


def _boot_session() -> str:
    """What macOS has for a boot_id, or "" where it does not say it: the name of a Mac changes with the network."""
    import ctypes

    value, size = ctypes.create_string_buffer(64), ctypes.c_size_t(64)
    try:
        ask = ctypes.CDLL(None).sysctlbyname
    except (OSError, AttributeError):
        return ""
    ask.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    failed = ask(b"kern.bootsessionuuid", value, ctypes.byref(size), None, 0)
    return "" if failed else value.value.decode("ascii", "replace")
