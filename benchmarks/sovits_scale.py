"""Clips per second of stage 2 in two processes over those in one, each process with one thread and the same batch.

These are the first steps of whole trainings, which save while they train. They take turns. What the cores allow is
measured beside it: two trainings of one process each at the same time, which have nothing to do with each other.

    python -m benchmarks.sovits_scale --batch-size 2 --rounds 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.sovits_data import make_experiment, write_config

SMALL = {"upsample_initial_channel": 64, "discriminator_channels": 64, "discriminator_periods": [2, 3], "n_layers": 2}
"""What makes a quick run quick."""
STEPS, SAVE_EVERY = 6, 3


def _child(config: Path, out: Path) -> None:
    from lastgood_sovits.train import program
    from lastgood_sovits.train.options import Options
    from lastgood_sovits.train.trainer import Trainer

    done, ends = Trainer._step, []

    def step(self: Trainer, *arguments: Any) -> None:
        done(self, *arguments)
        ends.append(time.perf_counter())

    Trainer._step = step  # type: ignore[method-assign]
    Trainer._steps_left = lambda _: STEPS  # type: ignore[method-assign]
    program.train("s2", config, Options(device="cpu", save_every=SAVE_EVERY))
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps([b - a for a, b in pairwise(ends)]), encoding="utf-8")


def measure_step(folder: Path, nproc: int, batch_size: int, model: dict[str, Any], train: dict[str, Any]) -> float:
    """Seconds per step, with what its saves cost; the first two warm up."""
    with tempfile.TemporaryDirectory() as run:
        config, out = write_config(folder, Path(run), batch_size, model, train), Path(run) / "seconds.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
        command += ["-m", "benchmarks.sovits_scale", "--child", str(config), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(command, check=True, env=environment, capture_output=True)
        return statistics.mean(json.loads(out.read_text(encoding="utf-8"))[1:])


@dataclass(frozen=True)
class Scaling:
    """Clips per second of two processes over twice those of one that has the machine for itself: 1 is linear."""

    together: float
    """Two ranks of one training."""
    apart: float
    """Two trainings."""


def measure_scaling(rounds: int, batch_size: int, clips: int, *, quick: bool) -> Scaling:
    """The medians over the rounds."""
    model, train = (SMALL, {"segment_size": 6400}) if quick else ({}, {})
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(2) as pool:
        folder = Path(temporary) / "voice"
        make_experiment(folder, clips)

        def seconds(nproc: int) -> float:
            return measure_step(folder, nproc, batch_size, model, train)

        found = []
        for _ in range(rounds):
            alone, together, apart = seconds(1), seconds(2), statistics.mean(pool.map(seconds, [1, 1]))
            found.append((alone / together, alone / apart))
    return Scaling(*map(statistics.median, zip(*found, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(*options.child)
        return
    found = measure_scaling(options.rounds, options.batch_size, options.clips, quick=options.quick)
    print(f"two processes: {found.together:.2f} of linear; two trainings at once: {found.apart:.2f}")


if __name__ == "__main__":
    main()
