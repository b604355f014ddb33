"""Accelerate: a Checkpointer that takes prepared objects as they are.

::

    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    ckpt = LastGood(accelerator, "runs/voice", model=model, optimizer=optimizer, scheduler=scheduler)
    for step in ckpt.steps(10_000, every=500):
        ...
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler

from lastgood.checkpointer import Checkpointer
from lastgood.errors import LastGoodError

__all__ = ["LastGood"]

_SUPPORTED = {"NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_MUSA", "MULTI_XPU", "MULTI_HPU", "FSDP"}


class LastGood(Checkpointer):
    """A :class:`lastgood.Checkpointer` for what ``accelerator.prepare`` gave, with the accelerator's ranks.

    The accelerator's scaler is saved too, and so is everything given to ``accelerator.register_for_checkpointing``
    before. The place in the data is the program's: ``accelerator.skip_first_batches(loader, done)`` skips what was
    seen. Of FSDP, version 2 (``fsdp_version=2``) can be saved.

    Args:
        accelerator: the one that prepared the objects.
        run: the run directory.
        options: the arguments of :class:`lastgood.Checkpointer`, and the objects to save, by name.

    Raises:
        LastGoodError: the accelerator shards the state in a way that cannot be saved (DeepSpeed, Megatron, TPU).
    """

    def __init__(self, accelerator: Accelerator, run: str | os.PathLike[str], **options: Any) -> None:
        kind = accelerator.distributed_type
        if DistributedType(kind).name not in _SUPPORTED:
            raise LastGoodError(
                f"an accelerator of the kind {kind} keeps its state in a form of its own, which lastgood does not "
                "save. Use accelerator.save_state, or DDP or FSDP2."
            )
        objects = {name: _unwrap(value) for name, value in options.items()}
        if getattr(accelerator, "scaler", None) is not None and "scaler" not in objects:
            objects["scaler"] = accelerator.scaler
        for number, value in enumerate(accelerator._custom_objects):
            objects.setdefault(f"registered{number}", _unwrap(value))
        self.accelerator = accelerator
        objects.setdefault("rank", accelerator.process_index)
        objects.setdefault("world_size", accelerator.num_processes)
        super().__init__(run, **objects)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, _unwrap(value))


def _unwrap(value: Any) -> Any:
    """The object that torch knows. A model stays in DDP: that is what says that its parameters are replicated."""
    if isinstance(value, AcceleratedOptimizer):
        return value.optimizer
    if isinstance(value, AcceleratedScheduler):
        return value.scheduler
    return value
