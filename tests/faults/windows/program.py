"""A small training job of one or two ranks, for every system: trained undisturbed first, then saved, killed, resumed.

usage: program.py RUN NOTES RANK WORLD UNTIL [--kill-at STEP WHERE] [--ddp PORT] [--undisturbed]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2]))
import lastgood
from faults.job import Job
from faults.killer import end_at_once
from lastgood import disk

SECONDS = 120.0
KEEP = lastgood.Keep(last=2)


def build(rank: int, ddp: bool) -> Job:
    job = Job.build(rank, "own")
    if ddp:
        job.objects["model"] = DistributedDataParallel(job.objects["model"])
    return job


def train(job: Job, step: int, rank: int) -> None:
    """One step; under DDP every rank has data of its own."""
    if isinstance(job.objects["model"], DistributedDataParallel):
        step += 10 * rank
    job.train(step)


def values(job: Job) -> str:
    """A digest of every tensor and random state. Of nothing else: other versions of torch have other options."""
    total = hashlib.sha256(repr(random.getstate()).encode() + bytes(torch.get_rng_state().tolist()))
    for name in ("model", "optimizer"):
        total.update(repr(_numbers(job.objects[name].state_dict())).encode())
    total.update(repr([job.objects["noise"].tolist(), job.objects["generator"].get_state().tolist()]).encode())
    return total.hexdigest()


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return [_numbers(item) for key, item in value.items() if key != "param_groups"]
    return value.tolist() if isinstance(value, torch.Tensor) else None


MOMENTS = {
    "in a shard": ("write", ".safetensors"),
    "in the manifest": ("write", ".tmp"),
    "before the commit": ("replace", ".json"),
    "in the clean-up": ("rmdir", ""),
}
"""Where a life is ended: the name of the disk operation, and how its path ends. A write is done by half."""


def die_at(name: str) -> None:
    """From now on, end this process at the next such operation."""
    wanted, suffix = MOMENTS[name]

    def die(operation: disk.Operation, moment: Literal["before", "after"]) -> None:
        if operation.name != wanted or not operation.path.name.endswith(suffix) or moment == "after":
            return
        if operation.data is not None and operation.file is not None:
            operation.file.write(operation.data[: len(operation.data) // 2])
        end_at_once()

    disk.observer = die


def live(run: Path, rank: int, world: int, until: int, *, ddp: bool = False, kill_at: Sequence[str] = ()) -> Any:
    """One life: restore, train, save every step. Returns the step it began at, and the digests there and at the end."""
    job = build(rank, ddp)
    place = {} if ddp else {"rank": rank, "world_size": world}
    with lastgood.Checkpointer(run, deadline=SECONDS, keep=KEEP, **place, **job.options, **job.objects) as ckpt:
        start = ckpt.restore()
        began = values(job)
        for step in range(start + 1, until + 1):
            train(job, step, rank)
            ckpt.wait()
            if kill_at and step == int(kill_at[0]):
                die_at(kill_at[1])
            ckpt.save(step)
    return {"start": start, "began": began, "until": until, "ended": values(job)}


def undisturbed(rank: int, until: int, *, ddp: bool = False) -> list[str]:
    """The digests after every step of a training that nothing happens to."""
    job = build(rank, ddp)
    digests = [values(job)]
    for step in range(1, until + 1):
        train(job, step, rank)
        digests.append(values(job))
    return digests


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("notes", type=Path)
    for name in ("rank", "world", "until"):
        parser.add_argument(name, type=int)
    parser.add_argument("--kill-at", nargs=2, default=())
    parser.add_argument("--ddp", type=int)
    parser.add_argument("--undisturbed", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.ddp:
        # The Windows builds of torch have no libuv, and not every version notices.
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(options.ddp), USE_LIBUV="0")
        torch.distributed.init_process_group("gloo", rank=options.rank, world_size=options.world)
    options.notes.mkdir(parents=True, exist_ok=True)
    if options.undisturbed:
        digests = undisturbed(options.rank, options.until, ddp=bool(options.ddp))
        (options.notes / f"undisturbed-{options.rank}.json").write_text(json.dumps(digests))
    done = live(options.run, options.rank, options.world, options.until, ddp=bool(options.ddp), kill_at=options.kill_at)
    (options.notes / f"life-{options.rank}.json").write_text(json.dumps(done))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may keep a process from its end under Wine.


if __name__ == "__main__":
    main()
