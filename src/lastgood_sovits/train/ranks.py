"""The processes of a training: where this one stands, on which device, and how they find each other."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.train.launch import note_exit_code


@dataclass(frozen=True)
class Ranks:
    """This process among all of the training."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes weights, logs and pictures."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` on the device, in DistributedDataParallel where there are several processes."""
        model = model.to(self.device)
        if self.size == 1:
            return model
        # DDP arranges its buckets anew after the first backward of a process, and three or more ranks then sum in
        # another order than a process that was not restarted. It does not with find_unused_parameters.
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=self.size > 2)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all ranks. Every rank calls it."""
        return self.sum(values) / self.size

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks. Every rank calls it."""
        values = values.detach().clone()
        if self.size > 1:
            dist.all_reduce(values)
        return values


def bare(model: nn.Module) -> nn.Module:
    """`model` without DistributedDataParallel."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


@contextmanager
def join(device: str | None) -> Iterator[Ranks]:
    """Joins the processes that torchrun started; alone without it.

    Raises SovitsError when CUDA is asked for and there is none, or fewer devices than processes.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        yield Ranks(0, 1, chosen)
        return
    if sys.platform == "win32":
        os.environ.setdefault("USE_LIBUV", "0")
    backend = "nccl" if chosen.type == "cuda" and sys.platform != "win32" else "gloo"
    dist.init_process_group(backend)
    try:
        yield Ranks(rank, size, chosen)
    except SystemExit as stopped:
        # The training was asked to stop, and is saved. torchrun ends all processes when the first of them ends with a
        # code that is not 0, and the first rank may still be copying to a mirror. A rank that is gone cannot be waited
        # for.
        note_exit_code(int(stopped.code or 0))
        with contextlib.suppress(RuntimeError):
            dist.barrier()
        dist.destroy_process_group()
        raise
    # Not after an error: other ranks may be within an exchange that this one left.
    dist.destroy_process_group()


def _device(wanted: str | None, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SovitsError("--device cuda was given, but torch sees no CUDA device here")
    if local_rank >= torch.cuda.device_count():
        raise SovitsError(
            f"process {local_rank + 1} of this machine has no CUDA device of its own: there are "
            f"{torch.cuda.device_count()}; give a smaller --nproc"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def only_deterministic() -> None:
    """Lets torch choose kernels whose result does not depend on chance. What has none is named in a warning."""
    # cuBLAS reads it when it starts; the value is from torch's notes on reproducibility.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    # The gradients of this attention are sums in no fixed order, also when deterministic algorithms are asked for.
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.use_deterministic_algorithms(True, warn_only=True)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds dropout for one step of one rank.

    The random numbers of a step then depend on nothing that came before it: a resumed run draws the same ones.
    """
    torch.manual_seed(((seed << 44) + (step << 12) + rank) % 2**63)
