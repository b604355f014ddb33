"""Lightning with DDP, saved through lastgood: killed at any moment, it goes on by itself, also within an epoch.

torchrun --nproc-per-node 2 examples/lightning_ddp.py --directory runs/lightning --epochs 3
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch import nn

from lastgood.integrations.lightning import LastGood


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss: torch.Tensor = self.layers(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Batches:
    """A loader that knows its place: Lightning saves it with the loops, and goes on from there within an epoch."""

    def __init__(self, count: int, rank: int) -> None:
        self.count, self.rank, self.epoch, self.done = count, rank, 0, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[torch.Tensor]:
        # Lightning takes as many batches as there are, and does not ask for the end.
        if self.done == self.count:
            self.epoch, self.done = self.epoch + 1, 0
        while self.done < self.count:
            generator = torch.Generator().manual_seed(10_000 * self.rank + 100 * self.epoch + self.done)
            self.done += 1
            yield torch.randn(4, 8, generator=generator)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.done = state["epoch"], state["done"]


def train(run: str, epochs: int, every: int, *callbacks: lightning.Callback) -> Net:
    """Train to the end from wherever the run is; returns the module."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_epochs=epochs,
        callbacks=[*callbacks, LastGood(run, every_n_steps=every)],
        use_distributed_sampler=False,  # Batches deals each rank its own.
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Net()
    trainer.fit(model, Batches(5, int(os.environ.get("RANK", "0"))))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--every", type=int, default=2)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model = train(options.directory, options.epochs, options.every)
    total = sum(float(p.double().sum()) for p in model.parameters())
    print(f"done: the weights add up to {total!r}")


if __name__ == "__main__":
    main()
