"""``python -m benchmarks.sovits``: speed, start, scaling and memory of stage 2; writes docs/benchmarks-sovits.md.

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

from benchmarks.sovits_data import make_experiment
from benchmarks.sovits_s2 import default_config, measure_speed, peak_memory
from benchmarks.sovits_scale import measure_scaling
from benchmarks.sovits_start import measure_start

BATCH = 4
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


def speed() -> Row:
    found = measure_speed(default_config("v2", BATCH), 6, torch.device("cpu"), time.perf_counter)
    ours, port = (f"{min(seconds):.1f} s" for seconds in (found.ours, found.port))
    return Row("steps per second; the fastest step", ours, port, found.ratio, 1.15)


def start() -> Row:
    with tempfile.TemporaryDirectory() as temporary:
        make_experiment(Path(temporary) / "voice", 100)
        ours, port = (measure_start(name, Path(temporary) / "voice", BATCH) for name in ("ours", "port"))
    return Row("time until the first step, 100 clips, from scratch", f"{ours:.1f} s", f"{port:.1f} s", port / ours, 5)


def scaling() -> Row:
    ratio = measure_scaling(2, BATCH, 50, quick=False)
    return Row("two processes on one, of linear, with saves", "", "", ratio, 0.9)


def memory() -> Row:
    ours, port = (peak_memory(name, "v2", BATCH) for name in ("ours", "port"))
    return Row("memory of a process", f"{ours / 1e9:.2f} GB", f"{port / 1e9:.2f} GB", ours / port, 1, at_most=True)


PARTS: dict[str, Callable[[], Row]] = {"speed": speed, "start": start, "scaling": scaling, "memory": memory}


def page(rows: list[Row], load: float) -> str:
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, 1 thread a process; "
    machine += f"Python {platform.python_version()}, torch {torch.__version__}; load average {load:.1f} at the start"
    return (
        "# Stage 2 of GPT-SoVITS, measured\n\n"
        f"Machine: {machine}.\n\n"
        "Made by `python -m benchmarks.sovits`: v2 at its default size, float32, batches of 4 clips of 4 to 6 seconds. "
        "The port is a straightforward one of upstream's step and start (`benchmarks/sovits_port.py`, "
        "`benchmarks/sovits_start.py`), in the same run on the same data, by turns. Ratios are medians over the turns; "
        "where other programs used the machine at the same time, they say more than seconds.\n\n"
        "| what | ours | port | ratio | goal | reached |\n|---|---|---|---|---|---|\n"
        + "\n".join(map(str, rows))
        + "\n\nA step is bound by convolutions, which run near the processor's peak in both. Of the port's "
        "discriminator passes and gradients, a tenth is not needed and left out here; the optimizer is fused, and "
        "activations are kept once instead of twice.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    rows = []
    for name in options.only or PARTS:
        rows.append(PARTS[name]())
        print(rows[-1], flush=True)
    if not options.only:
        PAGE.write_text(page(rows, load), encoding="utf-8")


if __name__ == "__main__":
    main()
