"""What `lastgood run` costs: start-up of a Python without torch, and a save against torch.save and fsync.

    python benchmarks/run_overhead.py [--dir DIR] [--megabytes N] [--repeats N]

All sides write the same state to the same directory, in turns, in one process each, and overwrite it each time.
`lastgood run` keeps no earlier version of it here (`--history 0`; by default it keeps one), as the others do not. The
one "by hand" does what any save must do that leaves the old file or the new one after a power cut: a temporary file, a
sync, a rename, and a sync of the directory.
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
how, directory, megabytes, repeats = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
state = {f"layer{i}": torch.randn(int(megabytes * 250_000 / 8)) for i in range(8)}
path = os.path.join(directory, f"last-{how}.pth")
written = path + ".tmp" if how == "by hand" else path
times = []

def sync(name, flags):
    descriptor = os.open(name, flags)
    os.fsync(descriptor)
    os.close(descriptor)

for _ in range(repeats + 1):
    os.sync()
    begin = time.perf_counter()
    torch.save(state, written)
    if how != "lastgood run":
        sync(written, os.O_RDWR)
    if how == "by hand":
        os.replace(written, path)
        sync(directory, os.O_RDONLY)
    times.append(time.perf_counter() - begin)
print(json.dumps(times[1:]))
"""
SIDES = ("plain", "by hand", "lastgood run")


def saves(how: str, directory: str, megabytes: float, repeats: int) -> list[float]:
    command = [sys.executable, "-c", SAVES, how, directory, str(megabytes), str(repeats)]
    with tempfile.TemporaryDirectory() as state:  # Where the counts for the summary go.
        ours = launch.environment(Settings(history=0, state=state))
        environment = ours if how == "lastgood run" else dict(os.environ)
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
    for what, of in (("medians", statistics.median), ("least", min)):
        print(
            f"start-up without torch: {1e3 * of(plain):.1f} ms, with us {1e3 * (of(ours) - of(plain)):+.1f} ms ({what})"
        )
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        for megabytes in options.megabytes:
            sides: dict[str, list[float]] = {how: [] for how in SIDES}
            for _ in range(2):
                for how in SIDES:
                    sides[how] += saves(how, directory, megabytes, options.repeats)
            for what, of in (("medians", statistics.median), ("least", min)):
                plain_save, by_hand, mine = (1e3 * of(sides[how]) for how in SIDES)
                print(
                    f"save of {megabytes:g} MB: torch.save + fsync {plain_save:.1f} ms, by hand {by_hand:.1f} ms, "
                    f"lastgood run {mine:.1f} ms: {mine / plain_save:.2f} and {mine / by_hand:.2f} times as long "
                    f"({what} of {2 * options.repeats}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)"
                )


if __name__ == "__main__":
    main()
