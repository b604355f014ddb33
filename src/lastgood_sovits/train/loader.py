"""The loader of both stages: batches without end, read by processes of its own where that is wanted."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator
from functools import partial
from multiprocessing.synchronize import Event
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGBREAK")


def batches(
    clips: Dataset[Any], sampler: Sampler[Any], collate: Callable[[Any], Any], *, workers: int, device: torch.device
) -> Generator[Any, None, None]:
    """Batches without end, one epoch after the other. Closing the iterator ends its processes.

    Args:
        clips: the data set.
        sampler: of batches; it yields the rest of its present epoch.
        collate: makes a batch of items.
        workers: processes that load clips; 0 loads them in this one.
        device: where the batches go.
    """
    over = multiprocessing.Event()
    loader = DataLoader(
        clips,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=partial(_leave_signals_to_the_training, over),
        generator=torch.Generator(),  # A loader would draw from the training's random numbers otherwise.
    )
    try:
        while True:
            yield from loader
    finally:
        over.set()


def _leave_signals_to_the_training(over: Event, _: int) -> None:
    """Makes a loader's process stay until the training is over.

    Launchers and terminals send a request to stop to every process of a group. A loader's process that died of one
    would end the training with an error before it has saved. Where the training is gone, torch ends its loaders.
    """

    def asked(*_: object) -> None:
        if over.is_set():  # Python sends SIGTERM to what is left when the training's process ends, and waits.
            os._exit(0)

    for name in _SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), asked)
