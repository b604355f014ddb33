"""Data-parallel training of a small convolutional network on handwritten digits, as a user would write it.

    python -m lastgood.demo.train RUN STEPS      with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set

What is special to the demo is only :func:`die_in_save`.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import warnings
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lastgood
from lastgood import disk

BATCH = 32
EVERY = 20
TEST = 297


class Digits(nn.Module):
    """Two convolutions with batch norm, and a dropout: layers whose state is easily lost."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (batch, 10) from images (batch, 1, 8, 8)."""
        logits: torch.Tensor = self.head(self.features(images))
        return logits


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1,797 digits: images (n, 1, 8, 8) from 0 to 1, labels (n)."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(digits.target)


def accuracy(model: nn.Module) -> float:
    """The share of the last 297 digits, which are not trained on, that the model names right."""
    images, labels = data()
    model.eval()
    with torch.no_grad():
        right = (model(images[-TEST:]).argmax(1) == labels[-TEST:]).float().mean()
    model.train()
    return float(right)


def die_in_save(step: int) -> None:
    """Kill this process with SIGKILL when half of a shard of `step` is written, as a power cut or a scheduler would."""

    def observer(operation: disk.Operation, when: Literal["before", "after"]) -> None:
        if operation.name == "write" and when == "before" and f"step-{step:08d}" in operation.path.parent.name:
            assert operation.data is not None and operation.file is not None
            if len(operation.data) > 4096:
                operation.file.write(operation.data[: len(operation.data) // 2])
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    disk.observer = observer


def main(run: str, total: int) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    images, labels = data()
    # With three and more ranks, DDP's default changes the order of its sums after the first step of a process.
    model = DistributedDataParallel(Digits(), find_unused_parameters=size > 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    torch.manual_seed(100 + rank)  # Every rank has dropout masks of its own.
    random.seed(rank)
    np.random.seed(rank)
    if step := int(os.environ.get("LASTGOOD_DEMO_DIE", "0")):
        die_in_save(step)

    with lastgood.Checkpointer(run, model=model, optimizer=optimizer, scheduler=scheduler, every=EVERY) as ckpt:
        for step in ckpt.steps(total):
            order = torch.randperm(len(images) - TEST, generator=torch.Generator().manual_seed(step))
            mine = order[rank * BATCH : (rank + 1) * BATCH]
            loss = nn.functional.cross_entropy(model(images[mine]), labels[mine])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            ckpt.metrics["loss"] = loss.item()
    if rank == 0:
        print(f"accuracy {accuracy(model.module):.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
