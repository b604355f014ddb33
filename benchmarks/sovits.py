"""``python -m benchmarks.sovits``: speed, memory, start, scaling of both stages; writes docs/benchmarks-sovits.md.

Takes about twenty minutes on two free cores. `--only` measures a part and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import sovits_s1
from benchmarks.sovits_data import make_experiment
from benchmarks.sovits_s2 import default_config, measure_speed, peak_memory
from benchmarks.sovits_scale import measure_scaling
from benchmarks.sovits_start import measure_start
from lastgood_sovits.s1.config import ModelConfig

BATCH = 4
"""Clips of stage 2."""
BATCH_S1 = 8
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks-sovits.md"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ours: str
    port: str
    ratio: float
    goal: float
    at_most: bool = False

    def __str__(self) -> str:
        reached = self.ratio <= self.goal if self.at_most else self.ratio >= self.goal
        sign = "<=" if self.at_most else ">="
        cells = [
            self.what,
            self.ours,
            self.port,
            f"{self.ratio:.2f}",
            f"{sign} {self.goal}",
            "yes" if reached else "no",
        ]
        return f"| {' | '.join(cells)} |"


def speed_s1() -> Row:
    batches = sovits_s1.make_batches(12, BATCH_S1, 200)
    found = sovits_s1.measure_speed(ModelConfig(), batches, torch.device("cpu"), "32")
    ours, port = (f"{min(seconds):.1f} s" for seconds in (found.ours, found.port))
    return Row("stage 1: steps per second; the fastest step", ours, port, found.ratio, 1.5)


def speed_s2() -> Row:
    found = measure_speed(default_config("v2", BATCH), 5, torch.device("cpu"), time.perf_counter)
    ours, port = (f"{min(seconds):.1f} s" for seconds in (found.ours, found.port))
    return Row("stage 2: steps per second; the fastest step", ours, port, found.ratio, 1.15)


def start() -> Row:
    with tempfile.TemporaryDirectory() as temporary:
        make_experiment(Path(temporary) / "voice", 100)
        ours, port = (measure_start(name, Path(temporary) / "voice", BATCH) for name in ("ours", "port"))
    return Row(
        "stage 2: time until the first step, 100 clips, from scratch", f"{ours:.1f} s", f"{port:.1f} s", port / ours, 5
    )


def scaling() -> Row:
    found = measure_scaling(2, BATCH, 100, quick=False)
    what = "stage 2: speed of two ranks with saves, of linear; beside it two trainings at once, which the cores allow"
    return Row(what, f"{found.together:.2f}", f"{found.apart:.2f}", found.together / found.apart, 0.9)


def _memory(stage: int, ours: int, port: int) -> Row:
    gigabytes = [f"{size / 1e9:.2f} GB" for size in (ours, port)]
    return Row(f"stage {stage}: memory of a process", *gigabytes, ours / port, 1, at_most=True)


def memory_s1() -> Row:
    return _memory(1, *(sovits_s1.peak_memory(name, BATCH_S1) for name in ("ours", "port")))


def memory_s2() -> Row:
    return _memory(2, *(peak_memory(name, "v2", BATCH) for name in ("ours", "port")))


PARTS: dict[str, Callable[[], Row]] = {
    "speed-s1": speed_s1,
    "speed-s2": speed_s2,
    "start": start,
    "scaling": scaling,
    "memory-s1": memory_s1,
    "memory-s2": memory_s2,
}


def page(rows: list[Row], load: float) -> str:
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, 1 thread a process; "
    machine += f"Python {platform.python_version()}, torch {torch.__version__}; load average {load:.1f} at the start"
    return (
        "# Training GPT-SoVITS, measured\n\n"
        f"Machine: {machine}.\n\n"
        "Made by `python -m benchmarks.sovits`: v2 at its default size, float32. Stage 1 has batches of 8 clips of 1 "
        "to 10 seconds, stage 2 of 4 clips of 4 to 6 seconds. The port is a straightforward one of upstream's step and "
        "start (`benchmarks/sovits_s1.py`, `benchmarks/sovits_port.py`, `benchmarks/sovits_start.py`), in the same run "
        "on the same data, by turns. Ratios are over all turns; "
        "where other programs used the machine at the same time, they say more than seconds.\n\n"
        "| what | ours | port | ratio | goal | reached |\n|---|---|---|---|---|---|\n"
        + "\n".join(map(str, rows))
        + "\n\nStage 1 leaves the padding out and computes attention fused. A step of stage 2 is bound by "
        "convolutions, which run near the processor's peak in both: the wide ones of kernel size 5 take two "
        "multiplications instead of five here (`s2/minimal_filtering.py`), a tenth of the port's discriminator passes "
        "and gradients is not needed and left out, the optimizer is fused, and activations are kept once instead of "
        "twice. The start has no processes that load ahead, none for each clip, and a k-means of matrix products.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    rows = []
    for name in options.only or PARTS:
        began = time.perf_counter()
        rows.append(PARTS[name]())
        print(rows[-1], f" ({time.perf_counter() - began:.0f} s)", flush=True)
    if not options.only:
        PAGE.write_text(page(rows, load), encoding="utf-8")


if __name__ == "__main__":
    main()
