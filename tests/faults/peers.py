"""The programs that people use instead, each in its usual way, behind three words: save, load, and their names.

Every tensor of the state holds the number of the step, so a loaded state says of which step it is, or that it is mixed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

SIZES = (8192, 4096, 512, 64)


class Net(nn.Module):
    """Parameters that are a number, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.zeros(size) for size in SIZES])

    def fill(self, step: float) -> None:
        with torch.no_grad():
            for weight in self.weights:
                weight.fill_(step)

    def forward(self, x: Any = None, labels: Any = None) -> dict[str, torch.Tensor]:
        return {"loss": sum(weight.sum() for weight in self.weights) * 0.0}  # type: ignore[dict-item]

    def step(self) -> int | None:
        """The step that these weights are of; None where they are of no step."""
        values = torch.cat([weight.detach().flatten() for weight in self.weights])
        return int(values[0]) if bool((values == values[0]).all()) and float(values[0]).is_integer() else None


@dataclass(frozen=True)
class Peer:
    """One way to save."""

    name: str
    module: str
    """What must be importable."""
    save: Callable[[Path, int, int, Callable[[int], None]], None]
    """Save the steps from `begin` up to `end` into a directory; calls back with each step that is said to be saved."""
    load: Callable[[Path], int | None]
    """The step that is continued from: the usual way to resume. Raises what the program raises."""

    @property
    def here(self) -> bool:
        """Whether it is installed."""
        return find_spec(self.module.partition(".")[0]) is not None

    def prepare(self) -> None:
        """Import it, once for all children."""
        import_module(self.module)


Told = Callable[[int], None]


def _each(save: Callable[[Path, int, Net], None]) -> Callable[[Path, int, int, Told], None]:
    def run(directory: Path, begin: int, end: int, told: Told) -> None:
        net = Net()
        for step in range(begin, end + 1):
            net.fill(step)
            save(directory, step, net)
            told(step)

    return run


def _filled(state: dict[str, torch.Tensor]) -> int | None:
    net = Net()
    net.load_state_dict(state)
    return net.step()


def _torch_save(directory: Path, step: int, net: Net) -> None:
    torch.save(net.state_dict(), directory / "last.pth")


def _torch_load(directory: Path) -> int | None:
    return _filled(torch.load(directory / "last.pth", weights_only=True))


def _safetensors_save(directory: Path, step: int, net: Net) -> None:
    from safetensors.torch import save_file

    save_file(net.state_dict(), directory / "model.safetensors")


def _safetensors_load(directory: Path) -> int | None:
    from safetensors.torch import load_file

    return _filled(load_file(directory / "model.safetensors"))


def _newest(directory: Path, pattern: str) -> Path:
    return max(directory.glob(pattern), key=lambda path: int(path.name.split("-")[1]))


def _dcp_save(directory: Path, step: int, net: Net) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(net.state_dict(), checkpoint_id=directory / f"step-{step}", no_dist=True)
    shutil.rmtree(directory / f"step-{step - 2}", ignore_errors=True)  # Two are kept, as by the others.


def _dcp_load(directory: Path) -> int | None:
    import torch.distributed.checkpoint as dcp

    net = Net()
    state = net.state_dict()
    dcp.load(state, checkpoint_id=_newest(directory, "step-*"), no_dist=True)
    net.load_state_dict(state)
    return net.step()


def _lightning(directory: Path, end: int, told: Told) -> int | None:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = Net(), False

        def training_step(self, batch: Any, index: int) -> None:
            self.net.fill(self.global_step + 1)
            self.optimizers().step()  # type: ignore[union-attr]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Tell(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *rest: Any) -> None:
            if trainer.global_step:
                told(trainer.global_step)  # The step before this one, and its save, are over.

    saver = ModelCheckpoint(directory, "{step}", every_n_train_steps=1, save_last=True, monitor="step", mode="max",
                            save_top_k=2)  # fmt: skip
    trainer = pl.Trainer(
        max_steps=end, callbacks=[saver, Tell()], logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, default_root_dir=directory, barebones=False,
    )  # fmt: skip
    module = Module()
    data = torch.utils.data.DataLoader(torch.zeros(50, 1), batch_size=1)  # type: ignore[arg-type]
    trainer.fit(module, data, ckpt_path="last")
    return module.net.step()


def _trainer(directory: Path, end: int, told: Told) -> int | None:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    net = Net()
    resumed: list[int | None] = []

    class Fill(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            resumed.append(net.step())  # It does one step more even where there is none to do.

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            net.fill(state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            told(state.global_step)

    arguments = TrainingArguments(
        str(directory), max_steps=end, save_steps=1, save_total_limit=2, learning_rate=0.0, use_cpu=True,
        report_to=[], disable_tqdm=True, per_device_train_batch_size=1, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(net, arguments, train_dataset=[{"x": torch.zeros(1)}] * 50, callbacks=[Fill()])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(directory)))
    return resumed[0]


def _fitted(fit: Callable[[Path, int, Told], int | None], pattern: str) -> Callable[[Path], int | None]:
    def load(directory: Path) -> int | None:
        if not any(directory.rglob(pattern)):
            raise FileNotFoundError("there is no checkpoint")
        return fit(directory, 1, lambda step: None)  # Resumes, and has no more steps to do.

    return load


def _moonclip_manager(directory: Path) -> Any:
    from moonclip.pytorch import CheckpointManager

    return CheckpointManager(str(directory), compression_level=1, max_full_snapshots=2, world_size=1, rank=0)


def _moonclip_save(directory: Path, begin: int, end: int, told: Told) -> None:
    manager, net = _moonclip_manager(directory), Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(begin, end + 1):
        net.fill(step)
        manager.save(step=step, model=net, optimizer=optimizer)
        manager._mgr.flush()
        told(step)


def _moonclip_load(directory: Path) -> int | None:
    net = Net()
    net.fill(-1)
    _moonclip_manager(directory).resume(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    if net.step() == -1:
        raise FileNotFoundError("nothing was restored")
    return net.step()


def _lastgood_save(directory: Path, begin: int, end: int, told: Told) -> None:
    import lastgood

    net = Net()
    with lastgood.Checkpointer(directory / "run", keep=lastgood.Keep(last=2), rank=0, world_size=1, net=net) as ckpt:
        ckpt.restore()
        for step in range(begin, end + 1):
            net.fill(step)
            ckpt.save(step, blocking=True).result()
            told(step)


def _lastgood_load(directory: Path) -> int | None:
    import lastgood

    net = Net()
    with lastgood.Checkpointer(directory / "run", rank=0, world_size=1, net=net) as ckpt:
        if ckpt.restore() == 0:
            raise FileNotFoundError("there is no checkpoint")
    return net.step()


PEERS = (
    Peer("lastgood", "lastgood.checkpointer", _lastgood_save, _lastgood_load),
    Peer("torch.save", "torch", _each(_torch_save), _torch_load),
    Peer("safetensors save_file", "safetensors.torch", _each(_safetensors_save), _safetensors_load),
    Peer("torch.distributed.checkpoint", "torch.distributed.checkpoint", _each(_dcp_save), _dcp_load),
    Peer("Lightning ModelCheckpoint", "lightning.pytorch", lambda d, b, e, t: _lightning(d, e, t) and None,
         _fitted(_lightning, "*.ckpt")),
    Peer("Hugging Face Trainer", "transformers.trainer", lambda d, b, e, t: _trainer(d, e, t) and None,
         _fitted(_trainer, "checkpoint-*")),
    Peer("moonclip", "moonclip.pytorch", _moonclip_save, _moonclip_load),
)  # fmt: skip


@contextlib.contextmanager
def silent() -> Any:
    """Nobody wants to read what these programs say a thousand times."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    output, errors = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = output, errors
        logging.disable(logging.NOTSET)
