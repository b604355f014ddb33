"""The small training job that the campaigns kill, and what it leaves behind for the judge."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import lastgood
from lastgood import Checkpointer, Keep

Kind = Literal["replicated", "own", "differing", "frozen"]
"""What the ranks hold beside replicated weights: nothing; declared state of their own; undeclared differences; weights
that never change, which checkpoints share by hard link."""
KINDS: tuple[Kind, ...] = ("replicated", "own", "differing", "frozen")
FAST_SECONDS = 60.0
"""For every wait that a healthy job ends by itself. It is reached only when something hangs."""


def limit_threads() -> None:
    """One thread a process: many processes share the machine, and a forked child must not miss a thread."""
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")


@dataclass
class Job:
    """The state of one rank. Its weights are the same on every rank; its random state is the rank's own."""

    objects: dict[str, Any]
    options: dict[str, Any]

    @classmethod
    def build(cls, rank: int, kind: Kind) -> Job:
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        objects: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        options: dict[str, Any] = {"replicated": ["model.*", "optimizer.*"]}
        if kind == "own":
            objects["noise"] = torch.zeros(16)
            objects["generator"] = torch.Generator().manual_seed(50 + rank)
            options["local"] = ["noise"]
        elif kind == "differing":
            objects["sampler"] = {"position": 1000 * rank, "weights": torch.full((8,), float(rank))}
        elif kind == "frozen":
            # As large as what is held to be worth a file of its own.
            objects["base"] = {"weight": torch.arange(1.0, 65537.0)}
            options["replicated"].append("base.*")
        torch.manual_seed(100 + rank)
        random.seed(200 + rank)
        return cls(objects, options)

    def train(self, step: int) -> None:
        """One step. The data follow from the step; what is drawn from the random state follows from the rank."""
        data = torch.sin(torch.arange(64.0).reshape(8, 8) * (step + 1))
        self.objects["optimizer"].zero_grad()
        loss = self.objects["model"](data).square().mean()
        loss.backward()
        self.objects["optimizer"].step()
        self.objects["scheduler"].step()
        drawn = torch.rand(8) + random.random()
        if "noise" in self.objects:
            self.objects["noise"] += torch.rand(16, generator=self.objects["generator"]) + drawn[0]
        if "sampler" in self.objects:
            self.objects["sampler"]["position"] += 1 + int(drawn[0] * 10)
            self.objects["sampler"]["weights"] += drawn

    def digest(self) -> str:
        """Of every bit of the state: weights, optimizer, scheduler, random states, what is this rank's alone."""
        total = hashlib.sha256()
        for part in leaves({name: _state(value) for name, value in self.objects.items()}, ""):
            total.update(part)
        total.update(bytes(torch.get_rng_state().tolist()))
        total.update(repr(random.getstate()).encode())
        return total.hexdigest()


def _state(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    return value.state_dict() if hasattr(value, "state_dict") else value


def leaves(value: Any, path: str) -> Iterator[bytes]:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from leaves(value[key], f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}/{index}")
    elif isinstance(value, torch.Tensor):
        yield f"{path}:{value.dtype}:{tuple(value.shape)}:".encode()
        yield value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        yield f"{path}={value!r}".encode()


class Notes:
    """What a rank says to the judge. A line is one system call, so a killed process has said it or has not."""

    def __init__(self, directory: Path, rank: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._file = os.open(directory / f"{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, what: str, **fields: Any) -> None:
        os.write(self._file, (json.dumps({"what": what, **fields}) + "\n").encode())


def read_notes(directory: Path, rank: int) -> list[dict[str, Any]]:
    path = directory / f"{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def live(
    run: Path,
    notes: Notes,
    *,
    rank: int,
    world: int,
    kind: Kind,
    until: int,
    keep: int = 2,
    back_to: int | None = None,
    every: int = 1,
    stale: float = 0.2,
    on_commit: Callable[[Path], None] = lambda path: None,
) -> int:
    """One life of one rank: restore, then train and save every step. Returns the exit code.

    A rank that notices the death of another finishes the save that it is in, and ends, as under a launcher.

    Args:
        back_to: the step to roll back to.
        every: save only steps that are multiples of this.
        on_commit: is told of every checkpoint that a handle reports.
    """
    job = Job.build(rank, kind)
    ckpt = Checkpointer(
        run,
        keep=Keep(last=keep),
        deadline=FAST_SECONDS,
        stale=stale,
        rank=rank,
        world_size=world,
        **job.options,
        **job.objects,
    )
    notes.write("open")
    start = ckpt.restore(back_to)
    notes.write("restored", step=start, digest=job.digest())
    peers = len(ckpt.channel.connected)
    handle: lastgood.SaveHandle | None = None
    for step in range(start + 1, until + 2):
        if step <= until:
            job.train(step)
        if handle is not None:
            handle.wait(FAST_SECONDS)
            if handle.path is not None:
                on_commit(handle.path)
            notes.write(handle.state, step=handle.step, error=str(handle.error))
            alone = len(ckpt.channel.connected) != peers and step <= until
            if handle.state != "committed" or alone:
                return 3
        if step <= until and step % every == 0:
            handle = ckpt.save(step)
    notes.write("end", step=until, digest=job.digest())
    ckpt.close()
    return 0


def reference(kind: Kind, rank: int, until: int) -> dict[int, str]:
    """The digest after every step of a run that was never saved and never killed."""
    job = Job.build(rank, kind)
    digests = {0: job.digest()}
    for step in range(1, until + 1):
        job.train(step)
        digests[step] = job.digest()
    return digests


class Unbroken:
    """The digests of a run that was never saved and never killed, for steps that grow from call to call."""

    def __init__(self, kind: Kind, rank: int) -> None:
        self._job, self._step = Job.build(rank, kind), 0
        self._random = torch.get_rng_state(), random.getstate()

    def digest(self, step: int) -> str:
        """After `step` steps. It changes the random state of this process."""
        assert step >= self._step, "it does not go back"
        torch.set_rng_state(self._random[0])
        random.setstate(self._random[1])
        while self._step < step:
            self._step += 1
            self._job.train(self._step)
        self._random = torch.get_rng_state(), random.getstate()
        return self._job.digest()


def last_digest(kind: Kind, rank: int, until: int) -> str:
    """The digest at the end of such a run."""
    job = Job.build(rank, kind)
    for step in range(1, until + 1):
        job.train(step)
    return job.digest()
