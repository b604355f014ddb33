"""What ``lastgood demo`` does, and what it sees: train, kill in the middle of a save, damage, resume, compare."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lastgood import catalog, disk
from lastgood.catalog import Entry
from lastgood.checkpointer import Checkpointer
from lastgood.demo.train import EVERY, Digits, accuracy
from lastgood.errors import DamagedError, LastGoodError
from lastgood.loading import nbytes, read_tensors
from lastgood.manifest import Manifest
from lastgood.program import read_events

STEPS = 160
DIE = 120
"""The save of this step is killed; the one before it is damaged."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A promise, what was seen of it, and whether it was kept."""

    promise: str
    seen: str
    kept: bool


def tell(directory: Path, nproc: int, say: Callable[[str], None]) -> list[Finding]:
    """Play the story in `directory` with `nproc` processes.

    Raises:
        LastGoodError: a training process failed where it should not.
    """
    run, reference = directory / "run", directory / "reference"
    say(f"training {STEPS} steps in {nproc} processes, undisturbed, as the reference")
    _train(reference, nproc)
    say(f"the same again, killed with SIGKILL in the middle of the save of step {DIE}")
    _train(run, nproc, die=DIE)
    torn = next(entry for entry in catalog.entries(run) if entry.step == DIE)
    before = _check_torn(torn, run)
    newest = catalog.newest(run)
    assert newest is not None
    say(f"one bit of the newest checkpoint, {newest.name}, is flipped")
    _flip_bit(newest)
    say("the same command once more: it resumes and finishes")
    output = _train(run, nproc)
    return [before, *_compare(run, reference, newest, nproc, output)]


def _train(run: Path, nproc: int, die: int = 0) -> str:
    """Run the training program; returns its standard output. With `die`, it is killed in the save of that step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(nproc):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "LASTGOOD_DEMO_DIE": str(die),
            "USE_LIBUV": "0",
        }
        command = [sys.executable, "-m", "lastgood.demo.train", str(run), str(STEPS)]
        log = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True))
    if die:
        while all(process.poll() is None for process in processes):
            time.sleep(0.01)
        for process in processes:
            process.kill()
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    codes = [process.returncode for process in processes]
    if die:
        if not any(entry.step == die for entry in catalog.entries(run)):
            raise LastGoodError("the training was not killed where it should have been:\n" + "\n".join(outputs))
    elif any(codes):
        raise LastGoodError(f"the training ended with {codes}:\n" + "\n".join(outputs))
    return outputs[0]


def _check_torn(torn: Entry, run: Path) -> Finding:
    sizes = {name: disk.file_size(torn.path / name) for name in disk.names(torn.path)}
    good = catalog.committed(run)
    for entry in good:
        catalog.check_full(entry)
    text = f"step {torn.step} was torn ({sum(sizes.values()):,} bytes, no manifest): it is no checkpoint"
    return Finding(
        "all or nothing", f"{text}; the {len(good)} before it verify", not torn.is_committed() and bool(good)
    )


def _flip_bit(entry: Entry) -> None:
    path = entry.path / catalog.read_manifest(entry).shards[0].file
    data = bytearray(disk.read_bytes(path, limit=1 << 30))
    data[len(data) // 2] ^= 1
    disk.remove(path)
    with disk.NewFile(path) as file:
        file.write(data)


def _compare(run: Path, reference: Path, damaged: Entry, nproc: int, output: str) -> list[Finding]:
    events = read_events(run)
    saves = [event for event in events if event["event"] == "save"]
    skipped = [event["checkpoint"] for event in events if event["event"] == "skip"]
    restored = [event["step"] for event in events if event["event"] == "restore"]
    last, wanted = catalog.newest(run), catalog.newest(reference)
    assert last is not None and wanted is not None
    mine, theirs = catalog.check_full(last), catalog.check_full(wanted)
    written = sum(shard.size - shard.header_size for shard in mine.shards)
    ratio = written / nbytes(mine)
    stall = sorted(float(event["stall"]) for event in saves)[len(saves) // 2]
    seconds = sorted(float(event["seconds"]) for event in saves)[len(saves) // 2]
    try:
        catalog.check_full(damaged)
        noticed = "not noticed"
    except DamagedError:
        noticed = "noticed"
    except LastGoodError as error:
        noticed = str(error)
    equal, total = _equal_tensors(last, mine, wanted, theirs)
    random = all(mine.ranks[rank].random == theirs.ranks[rank].random for rank in range(nproc))
    alone = _alone(directory=run, nproc=nproc)
    return [
        Finding(
            "one commit",
            f"{nproc} processes called save, step {mine.step} has 1 manifest and {ratio:.2f} copies of the state",
            ratio == 1.0,
        ),
        Finding(
            "last good",
            f"the flipped bit was {noticed}; {', '.join(skipped) or 'nothing'} skipped, resumed at step {restored[-1]}",
            noticed == "noticed" and skipped == [damaged.name] and restored[-1] == damaged.step - EVERY,
        ),
        Finding(
            "never in the way",
            f"a save holds training up {stall * 1e3:.1f} ms and is durable after {seconds * 1e3:.0f} ms (medians)",
            stall < seconds or stall < 0.05,
        ),
        Finding(
            "same in one process and in many",
            f"saved by {nproc}, restored by 1: accuracy {alone:.4f}; the training printed: {output.split()[-1]}",
            f"{alone:.4f}" == output.split()[-1],
        ),
        Finding(
            "exact resume",
            f"{equal} of {total} tensors (weights, moments, statistics) equal the undisturbed run's bit by bit, "
            f"random states {'too' if random else 'not'}",
            equal == total and random,
        ),
    ]


def _equal_tensors(last: Entry, mine: Manifest, wanted: Entry, theirs: Manifest) -> tuple[int, int]:
    names = sorted(mine.tensors.keys() | theirs.tensors.keys())
    a = read_tensors(last, mine, [name for name in names if name in mine.tensors])
    b = read_tensors(wanted, theirs, [name for name in names if name in theirs.tensors])
    return sum(name in a and name in b and torch.equal(a[name], b[name]) for name in names), len(names)


def _alone(directory: Path, nproc: int) -> float:
    """The accuracy of the checkpoint that many processes saved, restored in this one."""
    model = Digits()
    with Checkpointer(directory, model=model, rank=0, world_size=1) as ckpt:
        ckpt.restore()
    return accuracy(model)
