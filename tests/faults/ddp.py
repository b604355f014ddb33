"""A DDP job with everything that makes an exact resume hard, killed and resumed: BatchNorm, dropout, AdamW, a schedule.

Run as a program, it is one rank under torchrun: ``torchrun --nproc-per-node 2 -m tests.faults.ddp RUN NOTES KILL_AT``.
"""

from __future__ import annotations

import datetime
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lastgood import Checkpointer, Keep, disk
from tests.faults.crash import committed
from tests.faults.job import FAST_SECONDS, Job, Notes, limit_threads, read_notes
from tests.faults.killer import Killer, Moment
from tests.faults.processes import Ranks, scratch
from tests.faults.report import Result

WORLD = 2
END = 7
"""The step at which the final bits are compared. The life that is killed would end one step before."""


def build(rank: int) -> Job:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.ReLU(), nn.Linear(32, 300), nn.Linear(300, 4)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=20)
    torch.manual_seed(100 + rank)
    random.seed(rank)
    wrapped = nn.parallel.DistributedDataParallel(model)
    return Job({"model": wrapped, "optimizer": optimizer, "scheduler": scheduler}, {})


def train(job: Job, rank: int, step: int) -> None:
    data = torch.sin(torch.arange(64.0).reshape(8, 8) * (step + 1) + rank)
    job.objects["optimizer"].zero_grad()
    job.objects["model"](data + torch.rand(8, 8) * random.random()).square().mean().backward()
    job.objects["optimizer"].step()
    job.objects["scheduler"].step()


def live(run: Path | None, notes: Notes, rank: int, until: int = END) -> int:
    """One rank; the process group is there. Without a run it only trains."""
    job = build(rank)
    if run is None:
        for step in range(1, until + 1):
            train(job, rank, step)
    else:
        with Checkpointer(run, keep=Keep(last=2), deadline=FAST_SECONDS, stale=0.2, **job.objects) as ckpt:
            start = ckpt.restore()
            notes.write("restored", step=start)
            for step in range(start + 1, until + 1):
                train(job, rank, step)
                ckpt.save(step)
            ckpt.wait()
    notes.write("end", digest=job.digest())
    return 0


def start(run: Path | None, place: Path, killers: dict[int, Killer]) -> Ranks:
    """Start both ranks as forked children with a gloo process group."""
    place.mkdir()

    def action(rank: int) -> Callable[[], int]:
        def body() -> int:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            limit_threads()
            store = dist.FileStore(str(place / "store"), WORLD)
            patience = datetime.timedelta(seconds=2 * FAST_SECONDS)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=patience)
            disk.observer = killers.get(rank)
            notes = Notes(place, rank)
            code = live(run, notes, rank, END - 1 if killers else END)
            if rank in killers:
                notes.write("operations", seen=killers[rank].seen)
            return code

        return body

    return Ranks([action(rank) for rank in range(WORLD)], place)


def digests(place: Path) -> list[str]:
    return [next(note["digest"] for note in read_notes(place, rank) if note["what"] == "end") for rank in range(WORLD)]


def reference(place: Path) -> list[str]:
    """What both ranks end in when nothing is saved and nobody killed."""
    ranks = start(None, place, {})
    codes = ranks.wait()
    assert set(codes.values()) == {0}, ranks.log()
    return digests(place)


def operations(directory: Path) -> list[list[str]]:
    """By rank, the disk operations of a life that is not killed."""
    ranks = start(directory / "counted", directory / "count", {rank: Killer() for rank in range(WORLD)})
    codes = ranks.wait()
    assert set(codes.values()) == {0}, ranks.log()
    return [read_notes(directory / "count", rank)[-1]["seen"] for rank in range(WORLD)]


def kill_and_resume(directory: Path, victim: int, number: int, moment: Moment) -> tuple[int, int, list[str]]:
    """Returns the newest committed step after the kill, the step of the resume, and what both ranks end in."""
    run = directory / f"run-{victim}-{number}-{moment}"
    first = start(run, directory / f"{run.name}-first", {victim: Killer(number, moment)})
    codes = first.wait()
    assert codes[victim] == -signal.SIGKILL, first.log()
    there = committed(run)
    second = start(run, directory / f"{run.name}-second", {})
    codes = second.wait()
    assert set(codes.values()) == {0}, second.log()
    resumed = read_notes(second.directory, 0)[0]["step"]
    return there[-1][1] if there else 0, resumed, digests(second.directory)


def run_campaign(points: int = 12) -> Result:
    """Kill at points spread evenly over the life of each rank: two thirds of them in rank 0, which has more to do."""
    limit_threads()
    result = Result("DDP killed and resumed")
    with result.timed(), scratch() as directory:
        expected = reference(directory / "reference")
        counts = [len(seen) for seen in operations(directory)]
        share = (points - points // 3, points // 3)
        for victim in range(WORLD):
            for index in range(share[victim]):
                number = (2 * index + 1) * counts[victim] // (2 * share[victim])
                moment: Moment = "before" if index % 2 else "after"
                where = f"rank {victim} killed {moment} operation {number} of {counts[victim]}"
                newest, resumed, ended = kill_and_resume(directory, victim, number, moment)
                result.tried[f"rank {victim} of {WORLD} killed"] += 1
                if resumed != newest:
                    result.failed.append(f"{where}: continued from step {resumed}; the newest was {newest}")
                elif ended != expected:
                    result.failed.append(f"{where}: it ended in other bits than a run that was never killed")
    return result


def main(run: str, notes: str, kill_at: str) -> int:
    """One rank under torchrun. In the first attempt rank `kill_at % 2` is killed at operation `kill_at`."""
    limit_threads()
    # A store of its own for every life: with the launcher's, gloo was seen to wait for the addresses of the dead.
    life = os.environ["TORCHELASTIC_RESTART_COUNT"]
    rank = int(os.environ["RANK"])
    store = f"file://{Path(notes).absolute()}-store-{life}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    if life == "0" and rank == int(kill_at) % WORLD:
        disk.observer = Killer(int(kill_at), "after")
    code = live(Path(run), Notes(Path(notes), rank), rank)
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
