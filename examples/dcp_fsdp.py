"""FSDP2 with torch.distributed.checkpoint, saved through lastgood: killed at any moment, it goes on by itself.

torchrun --nproc-per-node 2 examples/dcp_fsdp.py --directory runs/fsdp --steps 20
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

from lastgood.integrations.dcp import Reader, Writer, newest_step

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch before 2.6
    from torch.distributed._composable.fsdp import fully_shard


def batch(step: int) -> torch.Tensor:
    """This rank's data of a step: a function of the two, so that a resumed run sees what the first would have."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randn(8, 16, generator=generator)


def train(run: str, steps: int, every: int) -> nn.Module:
    """Train to step `steps` from wherever the run is; returns the model."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 1))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    progress = {"step": 0}
    if newest_step(run) is not None:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "progress": progress}
        dcp.load(state, storage_reader=Reader(run))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        progress = state["progress"]
        print(f"rank {dist.get_rank()} goes on from step {progress['step']}", flush=True)

    while progress["step"] < steps:
        optimizer.zero_grad()
        model(batch(progress["step"])).square().mean().backward()
        optimizer.step()
        progress["step"] += 1
        if progress["step"] % every == 0:
            weights, moments = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": moments, "progress": progress}
            dcp.save(state, storage_writer=Writer(run, step=progress["step"], keep=3))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=5)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    model = train(options.directory, options.steps, options.every)
    total = sum(float(p.full_tensor().double().sum()) for p in model.parameters())
    if dist.get_rank() == 0:
        print(f"done at step {options.steps}: the weights add up to {total!r}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
