"""Weights and upstream's resume files from a run's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.train.options import Options, Stage
from lastgood_sovits.train.program import make
from lastgood_sovits.train.ranks import Ranks


@dataclass(frozen=True)
class Exported:
    """What was written, from which step."""

    step: int
    epoch: int
    """Whole epochs trained."""
    files: tuple[Path, ...]
    replaced: tuple[Path, ...]
    """Those of them that were there before."""


def export(
    stage: Stage, config: Path, *, step: int | None, upstream: Path | None, output: Path | None = None
) -> Exported:
    """Writes the weights file of a checkpoint, or with `upstream` what upstream's trainer continues from, there.

    Args:
        stage: "s1" or "s2".
        config: the configuration that was trained with.
        step: of the checkpoint; None takes the newest.
        upstream: the folder for G_*.pth and D_*.pth, or for epoch=*.ckpt.
        output: the weights file; None gives it the name of its epoch, in the configured folder.

    Raises:
        SovitsError: there is no checkpoint, the files cannot hold it, or it is from within an epoch and `output` is
            None: its name would be that of the epoch before.
        lastgood.LastGoodError: the run is being trained, or the checkpoint is damaged.
    """
    trainer = make(stage, config, Ranks(0, 1, torch.device("cpu")), Options(device="cpu", workers=0))
    if not (trainer.logs / "lastgood").is_dir():
        raise SovitsError(f"{trainer.logs / 'lastgood'} does not exist: this configuration was not trained yet")
    trainer.prepare()
    with trainer.checkpointer(rank=0, world_size=1) as ckpt:
        found = ckpt.restore(step)
        if found == 0:
            raise SovitsError(f"{ckpt.run} has no checkpoint yet")
        trainer.restored(ckpt)
        if upstream is not None:
            upstream.mkdir(parents=True, exist_ok=True)
            before = set(upstream.iterdir())
            files = trainer.write_upstream(upstream, found)
        else:
            if output is None and trainer.position:
                raise SovitsError(
                    f"the checkpoint of step {found} is from within epoch {trainer.epochs_done + 1}, and the names of "
                    "weights files are those of whole epochs: choose another with --step, or name the file with "
                    "--output"
                )
            path = trainer.weights_path(trainer.epochs_done, found) if output is None else output
            path.parent.mkdir(parents=True, exist_ok=True)
            before = set(path.parent.iterdir())
            trainer.write_weights(path, trainer.epochs_done, found)
            files = [path]
        return Exported(found, trainer.epochs_done, tuple(files), tuple(file for file in files if file in before))
