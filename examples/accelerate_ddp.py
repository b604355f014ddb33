"""Accelerate with DDP, saved through lastgood: killed at any moment, it goes on by itself.

torchrun --nproc-per-node 2 examples/accelerate_ddp.py --directory runs/accelerate --steps 12
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from lastgood.integrations.accelerate import LastGood


def train(run: str, steps: int, every: int, at_step: Callable[[LastGood, int], None] | None = None) -> nn.Module:
    """Train to step `steps` from wherever the run is; `at_step` is called before each. Returns the model."""
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    torch.manual_seed(accelerator.process_index)  # Of dropout and data: each rank its own.

    with LastGood(accelerator, run, model=model, optimizer=optimizer, scheduler=scheduler) as ckpt:
        for step in ckpt.steps(steps, every=every):
            if at_step is not None:
                at_step(ckpt, step)
            optimizer.zero_grad()
            accelerator.backward(model(torch.randn(4, 8)).square().mean())
            optimizer.step()
            scheduler.step()
    return accelerator.unwrap_model(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=3)
    options = parser.parse_args()
    model = train(options.directory, options.steps, options.every)
    total = sum(float(p.double().sum()) for p in model.parameters())
    print(f"done at step {options.steps}: the weights add up to {total!r}")


if __name__ == "__main__":
    main()
