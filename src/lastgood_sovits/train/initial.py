"""The state from which a new run starts: pretrained weights, or an unfinished training of upstream's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.resume import newest_checkpoint, newest_pair, read_pair
from lastgood_sovits.weights import Weights, read_weights

logger = logging.getLogger(__name__)


def check_given(path: str | Path | None, what: str) -> Path | None:
    """`path` when it is given. Raises SovitsError when there is no such file, where upstream starts from scratch."""
    if not path:
        return None
    if not Path(path).is_file():
        raise SovitsError(
            f"{what} is {path}, and there is no such file: correct the path, or leave it empty to train from scratch"
        )
    return Path(path)


def load_pretrained(model: nn.Module, path: Path, kinds: tuple[str, ...], *, may_lack: str | None = None) -> None:
    """Loads weights into `model`, all of them or none.

    `kinds` are those of `read_weights` that fit. `may_lack` is the beginning of names that a file may be without:
    upstream's exports for inference have no posterior encoder. Raises SovitsError where names or shapes differ.
    """
    found = read_weights(path)
    if found.kind not in kinds:
        raise SovitsError(f"{path} is {found.kind}, and {' or '.join(kinds)} is needed here")
    lacking = load_tensors(model, found.tensors, path, may_lack=may_lack)
    logger.info("starting from the weights in %s", path)
    if lacking:
        logger.warning(
            "%s has no %s* (%d tensors), as an export for inference has none: that part starts from random numbers. "
            "A pretrained generator, or a run that is continued, has it.",
            path,
            may_lack,
            lacking,
        )


def load_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path, *, may_lack: str | None) -> int:
    """Loads `tensors` into `model`; returns how many of the names that may lack do."""
    state = model.state_dict()
    missing = [name for name in state if name not in tensors]
    lacking = [name for name in missing if may_lack and name.startswith(may_lack)]
    problems = [f"{name} is missing" for name in missing if name not in lacking]
    problems += [f"{name} is not in this model" for name in tensors if name not in state]
    problems += [
        f"{name} is {list(tensors[name].shape)} there and {list(state[name].shape)} here"
        for name in state
        if name in tensors and tensors[name].shape != state[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise SovitsError(
            f"{path} does not fit the configured model: {'; '.join(problems[:5])}{more}. Nothing was loaded; check "
            "that file and configuration are of the same version."
        )
    model.load_state_dict(tensors, strict=False)
    return len(lacking)


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any] | None, path: Path) -> None:
    """Loads an optimizer's state; how its steps are computed stays. Raises SovitsError where it is of another model."""
    if state is None:
        raise SovitsError(f"{path} has no optimizer state, so its training cannot be continued; use it as pretrained")
    if "fused" in optimizer.defaults:
        own = {"fused": optimizer.defaults["fused"]}
        state = {**state, "param_groups": [{**group, **own} for group in state.get("param_groups", [])]}
    try:
        optimizer.load_state_dict(dict(state))
    except (ValueError, KeyError, RuntimeError) as error:
        raise SovitsError(f"the optimizer state in {path} does not fit the configured model: {error}") from error


def find_pair(source: Path) -> tuple[Path, Path, Weights, Weights]:
    """Upstream's resume files of G and D, in the folder `source` or beside the file `source`.

    Raises SovitsError where there is no whole pair.
    """
    pair: tuple[Path, Path] | None
    if source.is_file():
        pair = (source.with_name(f"G{source.name[1:]}"), source.with_name(f"D{source.name[1:]}"))
        pair = pair if all(path.is_file() for path in pair) else None
    else:
        pair = newest_pair(source) if source.is_dir() else None
    if pair is None:
        raise SovitsError(f"--import {source}: there is no pair of resume files G_<step>.pth and D_<step>.pth")
    return *pair, *read_pair(*pair)


def find_checkpoint(source: Path) -> tuple[Path, Weights]:
    """Upstream's checkpoint of stage 1: the file `source`, or the newest in the folder or in its folder ``ckpt``.

    Raises SovitsError where there is none.
    """
    path: Path | None = source if source.is_file() else None
    if source.is_dir():
        path = newest_checkpoint(source) or (newest_checkpoint(source / "ckpt") if (source / "ckpt").is_dir() else None)
    if path is None:
        raise SovitsError(f"--import {source}: there is no checkpoint epoch=<N>-step=<M>.ckpt")
    found = read_weights(path)
    if found.kind != "s1-checkpoint":
        raise SovitsError(f"--import {path}: it is {found.kind}, not a checkpoint of stage 1")
    return path, found
