"""A whole training as a function, for one process of it."""

from __future__ import annotations

from pathlib import Path

from lastgood_sovits.train.options import Options, Stage
from lastgood_sovits.train.ranks import Ranks, join, only_deterministic
from lastgood_sovits.train.stage1 import Stage1
from lastgood_sovits.train.stage2 import Stage2


def train(stage: Stage, config: Path, options: Options) -> int:
    """Trains to the end, as this process's part of it; returns the exit code.

    Raises:
        SovitsError: the configuration, the experiment or an option cannot be used; the message says what to do.
        lastgood.LastGoodError: saving or restoring failed.
        SystemExit: the training was asked to stop; it is saved.
    """
    if options.deterministic:
        only_deterministic()
    with join(options.device) as ranks:
        return make(stage, config, ranks, options).run()


def make(stage: Stage, config: Path, ranks: Ranks, options: Options) -> Stage1 | Stage2:
    """The trainer of a stage."""
    return Stage1(config, ranks, options) if stage == "s1" else Stage2(config, ranks, options)
