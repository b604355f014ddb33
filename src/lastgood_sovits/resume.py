"""Upstream's resume files, to continue its runs here and ours there.

Stage 2 has pairs `G_<step>.pth` and `D_<step>.pth` (GPT_SoVITS/utils.py, save_checkpoint), stage 1 has Lightning's
`epoch=<N>-step=<M>.ckpt`. Upstream ties G and D together by nothing, and takes a file of any name with many digits for
the newest; here a pair is one only when both files are whole and from the same epoch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lastgood import LastGoodError
from lastgood_sovits.errors import SovitsError
from lastgood_sovits.weights import Weights, read_weights
from lastgood_sovits.weights_format import LATEST
from lastgood_sovits.weights_write import ReplaceFile, plain_config, save_torch


def read_pair(
    generator: str | Path, discriminator: str | Path, *, map_location: str | torch.device = "cpu"
) -> tuple[Weights, Weights]:
    """Both resume files of stage 2, in this order: model, optimizer state, epoch.

    Raises `SovitsError` where they are not one generator and one discriminator of the same epoch and
    `lastgood.LastGoodError` where one is damaged; nothing is ever taken from one file alone.
    """
    g, d = (read_weights(path, map_location=map_location) for path in (generator, discriminator))
    if (g.kind, d.kind) != ("s2G-resume", "s2D-resume"):
        raise SovitsError(f"{generator} and {discriminator} are {g.kind} and {d.kind}, not the resume files of G and D")
    if g.epoch != d.epoch:
        raise SovitsError(f"{generator} is from epoch {g.epoch} and {discriminator} from epoch {d.epoch}: not a pair")
    return g, d


def newest_pair(directory: str | Path) -> tuple[Path, Path] | None:
    """The G and D of the latest epoch in `directory` that are a whole pair; None where there are no such files.

    Raises `SovitsError` with every reason where there are files and no pair of them is whole.
    """
    directory = Path(directory)
    found: list[tuple[int, int, Path, Path]] = []
    reasons = []
    for g in sorted(directory.glob("G_*.pth")):
        numbered = re.fullmatch(r"G_(\d{1,18})\.pth", g.name)
        if numbered is None:
            continue
        d = g.with_name(f"D_{numbered[1]}.pth")
        try:
            epoch = read_pair(g, d, map_location="cpu")[0].epoch
            found.append((epoch or 0, int(numbered[1]), g, d))
        except (LastGoodError, SovitsError) as error:
            reasons.append(str(error))
    if found:
        return max(found)[2:]
    if reasons:
        raise SovitsError(f"{directory}: no pair of resume files is whole: {'; '.join(reasons)}")
    return None


def newest_checkpoint(directory: str | Path) -> Path | None:
    """The whole Lightning checkpoint of stage 1 with the latest (epoch, step) in `directory`; None where none exists.

    Raises `SovitsError` with every reason where there are files and none is whole.
    """
    directory = Path(directory)
    named = []
    for path in directory.glob("*.ckpt"):
        if numbers := re.fullmatch(r"epoch=(\d{1,18})-step=(\d{1,18})\.ckpt", path.name):
            named.append((int(numbers[1]), int(numbers[2]), path))
    reasons = []
    for _, _, path in sorted(named, reverse=True):
        try:
            if read_weights(path).kind == "s1-checkpoint":
                return path
            reasons.append(f"{path} is no Lightning checkpoint")
        except (LastGoodError, SovitsError) as error:
            reasons.append(str(error))
    if reasons:
        raise SovitsError(f"{directory}: no checkpoint is whole: {'; '.join(reasons)}")
    return None


def resume_names(step: int | None) -> tuple[str, str]:
    """The names of G and D at `step`; None is upstream's name for "only the latest is kept"."""
    number = LATEST if step is None else step
    return f"G_{number}.pth", f"D_{number}.pth"


def write_resume(
    path: str | Path,
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, Any],
    *,
    epoch: int,
    learning_rate: float,
    replace_file: ReplaceFile,
) -> None:
    """One resume file of stage 2, as upstream's save_checkpoint writes it.

    `model` is a state_dict without DDP's prefix, `optimizer` a state_dict, `epoch` counts finished epochs, and
    `learning_rate` is the configured one. Write D first: upstream takes the epoch from G.
    """
    content = {
        "model": {name: tensor.detach().to("cpu") for name, tensor in model.items()},
        "iteration": epoch,
        "optimizer": _on_cpu(dict(optimizer)),
        "learning_rate": learning_rate,
    }
    save_torch(Path(path), content, replace_file)


def write_checkpoint(
    path: str | Path,
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    epoch: int,
    step: int,
    batches: int,
    replace_file: ReplaceFile,
    lightning_version: str = "2.4.0",
) -> None:
    """A Lightning checkpoint of stage 1 from which upstream's trainer continues.

    `model` has names with the prefix `model.`; `epoch` counts finished epochs, `step` optimizer steps and `batches` all
    batches so far over all epochs. The output directory is stored as text: upstream's own path object makes
    torch 2.6 and later refuse the file.
    """

    def counts(n: int, *names: str) -> dict[str, int]:
        return dict.fromkeys(("ready", "completed", *names), n)

    def loop(n: int, current: int, *names: str) -> dict[str, Any]:
        return {"total": counts(n, *names), "current": counts(current, *names)}

    def batch_loop(n: int, current: int) -> dict[str, Any]:
        return loop(n, current, "started", "processed") | {"is_last_batch": n > 0}

    def idle_loop() -> dict[str, Any]:
        return {"state_dict": {}, "batch_progress": batch_loop(0, 0)}

    passed = {"ready": epoch, "completed": epoch - 1, "started": epoch, "processed": epoch}
    fit_loop = {
        "state_dict": {},
        "epoch_loop.state_dict": {"_batches_that_stepped": batches},
        "epoch_loop.batch_progress": batch_loop(batches, batches // epoch if epoch else 0),
        "epoch_loop.scheduler_progress": loop(0, 0),
        "epoch_loop.automatic_optimization.state_dict": {},
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {"step": loop(0, 0), "zero_grad": loop(0, 0, "started")}
        },
        "epoch_loop.manual_optimization.state_dict": {},
        "epoch_loop.manual_optimization.optim_step_progress": loop(step, step),
        "epoch_loop.val_loop.state_dict": {},
        "epoch_loop.val_loop.batch_progress": batch_loop(0, 0),
        "epoch_progress": {"total": passed, "current": dict(passed)},
    }
    predict_loop = {"state_dict": {}, "batch_progress": loop(0, 0, "started", "processed")}
    content = {
        "epoch": epoch - 1,
        "global_step": step,
        "pytorch-lightning_version": lightning_version,
        "state_dict": {name: tensor.detach().to("cpu") for name, tensor in model.items()},
        "loops": {
            "fit_loop": fit_loop,
            "validate_loop": idle_loop(),
            "test_loop": idle_loop(),
            "predict_loop": predict_loop,
        },
        "callbacks": {},
        "optimizer_states": [_on_cpu(dict(optimizer))],
        "lr_schedulers": [dict(scheduler)],
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "config": plain_config(config),
            "output_dir": str(config.get("output_dir", "")),
            "is_train": True,
        },
    }
    save_torch(Path(path), content, replace_file)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu")
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item) for item in value)
    return value
