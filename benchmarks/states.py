"""The states that are saved and restored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

MIB = 1 << 20


@dataclass(slots=True)
class Job:
    """A model with its optimizer, as a training loop holds them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def objects(self) -> dict[str, object]:
        return {"model": self.model, "optimizer": self.optimizer}

    def state_dict(self) -> dict[str, object]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def step(self) -> None:
        """An optimizer step with new gradients: every weight that is trained changes."""
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.full_like(parameter, 1e-3)
        self.optimizer.step()

    def tensors(self) -> list[torch.Tensor]:
        found = list(self.model.state_dict().values())
        for state in self.optimizer.state.values():
            found += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return found

    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())


def _job(shapes: list[tuple[int, ...]], frozen: set[int], device: str = "cpu", fresh: bool = False) -> Job:
    model = nn.Module()
    generator = torch.Generator().manual_seed(0)
    for index, shape in enumerate(shapes):
        value = torch.randn(shape, generator=generator).to(device)
        model.register_parameter(f"p{index:05d}", nn.Parameter(value, requires_grad=index not in frozen))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    job = Job(model, torch.optim.AdamW(trained, lr=1e-4, foreach=True))
    if not fresh:
        job.step()
    return job


def adamw(mib: int = 600, tensors: int = 60, device: str = "cpu", fresh: bool = False) -> Job:
    """fp32 weights with AdamW: `tensors` parameters and twice as many moments, `mib` MiB together.

    Args:
        fresh: there are no moments yet.
    """
    rows = mib * MIB // (3 * tensors * 4 * 1024)
    return _job([(rows, 1024)] * tensors, set(), device, fresh)


def small(tensors: int = 20_000) -> Job:
    """Many small tensors: `tensors` over the model, the moments and the step counters."""
    return _job([(16,)] * (tensors // 4), set())


def frozen(mib: int = 600, share: float = 0.95) -> Job:
    """LoRA: `share` of the bytes never change."""
    base = [(mib * MIB // (48 * 4096) or 1, 1024)] * 48
    trained = max(1, round(mib * (1 - share) * MIB / 3 / 4096 / 24))
    return _job([(round(rows * share), columns) for rows, columns in base] + [(trained, 1024)] * 24, set(range(48)))


def sovits() -> Job:
    """Stage 2 of GPT-SoVITS at its own size: generator and discriminator, each with AdamW's moments."""
    from lastgood_sovits.s2.config import ModelConfig
    from lastgood_sovits.s2.discriminator import Discriminator
    from lastgood_sovits.s2.synthesizer import Synthesizer

    config = ModelConfig()
    model = nn.ModuleDict({"G": Synthesizer(config), "D": Discriminator(config.periods)})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    job = Job(model, torch.optim.AdamW(trained, lr=1e-4, foreach=True))
    job.step()
    return job
