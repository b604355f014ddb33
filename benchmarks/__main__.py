"""``python -m benchmarks [--quick] [--gpu] [--directory DIR]``: measures, and writes docs/benchmarks.md."""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import report, scenarios


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller states and few rounds; nothing is written")
    parser.add_argument("--gpu", action="store_true", help="the rows of a GPU: prints a table, writes nothing")
    parser.add_argument("--directory", type=Path, default=Path("."), help="where the files are written: the disk")
    parser.add_argument("--only", default="", help="comma-separated names of scenarios")
    parser.add_argument("--contenders", default="", help="comma-separated beginnings of names; all by default")
    parser.add_argument("--record", action="store_true", help="write the page although only a part is measured")
    arguments = parser.parse_args()
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu: this machine has no CUDA device")
    directory = Path(tempfile.mkdtemp(prefix="lastgood-bench-", dir=arguments.directory))
    logging.disable(logging.WARNING)
    began = time.monotonic()
    try:
        device = "cuda" if arguments.gpu else "cpu"
        bench = scenarios.Bench(directory, device, quick=arguments.quick, contenders=arguments.contenders.split(","))
        names = [name for name in arguments.only.split(",") if name] or (
            scenarios.GPU if arguments.gpu else scenarios.ALL
        )
        for name in names:
            print(f"[{time.monotonic() - began:6.1f} s] {name}", flush=True)
            getattr(bench, name)()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    complete = not (arguments.quick or arguments.gpu or arguments.only or arguments.contenders)
    write = complete or arguments.record
    report.publish(bench, Path(__file__).parent.parent / "docs" if write else None, " ".join(sys.argv[1:]))


if __name__ == "__main__":
    main()
