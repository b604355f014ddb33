"""What `lastgood run` costs: start-up of a Python without torch, and a save against torch.save and fsync.

    python benchmarks/run_overhead.py [--dir DIR] [--megabytes N] [--repeats N]

Both sides write the same state to the same directory, in turns, in one process each: new files, overwritten each time.
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
from pathlib import Path

from lastgood.intercept import launch
from lastgood.intercept.runtime.settings import Settings

SAVES = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
protected, directory, megabytes, repeats = sys.argv[1] == "1", sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
state = {f"layer{i}": torch.randn(int(megabytes * 250_000 / 8)) for i in range(8)}
path = os.path.join(directory, f"last-{protected}.pth")
times = []
for _ in range(repeats + 1):
    os.sync()
    begin = time.perf_counter()
    torch.save(state, path)
    if not protected:
        descriptor = os.open(path, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
    times.append(time.perf_counter() - begin)
print(json.dumps(times[1:]))
"""


def saves(protected: bool, directory: str, megabytes: float, repeats: int) -> list[float]:
    environment = launch.environment(Settings(history=0)) if protected else dict(os.environ)
    command = [sys.executable, "-c", SAVES, str(int(protected)), directory, str(megabytes), str(repeats)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    times: list[float] = json.loads(done.stdout)
    return times


def start_up(protected: bool, repeats: int) -> list[float]:
    environment = launch.environment(Settings()) if protected else dict(os.environ)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], env=environment, check=True)
        times.append(time.perf_counter() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, default=None)
    parser.add_argument("--megabytes", type=float, nargs="*", default=[1.0, 200.0])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    plain, ours = ([], [])  # type: tuple[list[float], list[float]]
    for _ in range(3):
        plain += start_up(False, 10)
        ours += start_up(True, 10)
    extra = statistics.median(ours) - statistics.median(plain)
    print(f"start-up without torch: {1e3 * statistics.median(plain):.1f} ms, with us {1e3 * extra:+.1f} ms")
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        for megabytes in options.megabytes:
            sides: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(2):
                for protected in (False, True):
                    sides[protected] += saves(protected, directory, megabytes, options.repeats)
            base, mine = statistics.median(sides[False]), statistics.median(sides[True])
            print(
                f"save of {megabytes:g} MB: torch.save + fsync {1e3 * base:.1f} ms, lastgood run {1e3 * mine:.1f} ms, "
                f"ratio {mine / base:.2f} (medians of {len(sides[True])})"
            )


if __name__ == "__main__":
    main()
