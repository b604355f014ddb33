"""What ``lastgood demo`` does: train, kill in the middle of a save, damage, resume, and look at every promise."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lastgood import catalog, disk
from lastgood.catalog import Entry
from lastgood.cli.i18n import _
from lastgood.demo import promises
from lastgood.demo.promises import Finding
from lastgood.errors import LastGoodError

STEPS = 160
DIE = 120
"""The save of this step is killed; the one before it is damaged."""
_SECONDS = 300.0
"""Within which a training must end; it takes a few."""


def tell(directory: Path, nproc: int, say: Callable[[str], None]) -> list[Finding]:
    """Play the story in `directory` with `nproc` processes.

    Raises:
        LastGoodError: a training process failed where it should not.
    """
    run, reference = directory / "run", directory / "reference"
    say(_("training {steps} steps in {nproc} processes, undisturbed, as the reference", steps=STEPS, nproc=nproc))
    _train(reference, nproc)
    say(_("the same again, killed in the middle of the save of step {step}", step=DIE))
    _train(run, nproc, die=DIE)
    torn = next(entry for entry in catalog.entries(run) if entry.step == DIE)
    before = promises.all_or_nothing(torn, run)
    newest = catalog.newest(run)
    assert newest is not None
    say(_("one bit of the newest checkpoint, {name}, is flipped", name=newest.name))
    _flip_bit(newest)
    say(_("the same command once more: it resumes and finishes"))
    output = _train(run, nproc)
    say(_("one save each on a slow and on a full disk, and a file that would run code"))
    return [
        before,
        *promises.compare(run, reference, newest, nproc, output),
        promises.never_in_the_way(directory / "slow"),
        promises.nothing_lost(directory / "full", run),
        promises.nothing_executed(directory, run),
    ]


def _train(run: Path, nproc: int, die: int = 0) -> str:
    """Run the training program; returns what rank 0 printed. With `die`, it is killed in the save of that step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Files, not pipes: a process whose pipe nobody reads stands still when it is full.
    logs = [run.with_name(f"{run.name}-output-{rank}.txt") for rank in range(nproc)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank, log in enumerate(logs):
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
            with log.open("wb") as file:
                processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
        in_time = _await(processes, bool(die))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    outputs = [log.read_text("utf-8", "replace") for log in logs]
    codes = [process.returncode for process in processes]
    if not in_time:
        why = _("the training did not end within {seconds:.0f} s:", seconds=_SECONDS)
    elif die and not any(entry.step == die for entry in catalog.entries(run)):
        why = _("the training was not killed where it should have been:")
    elif not die and any(codes):
        why = _("the training ended with the exit codes {codes}:", codes=codes)
    else:
        return outputs[0]
    raise LastGoodError("\n".join([why, *outputs]))


def _await(processes: list[subprocess.Popen[bytes]], one: bool) -> bool:
    """Wait until all processes have ended, or `one` has, or one failed; returns whether that was within `_SECONDS`."""
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if None not in codes or any(code is not None and (one or code != 0) for code in codes):
            return True
        time.sleep(0.01)
    return False


def _flip_bit(entry: Entry) -> None:
    path = entry.path / catalog.read_manifest(entry).shards[0].file
    data = bytearray(disk.read_bytes(path, limit=1 << 30))
    data[len(data) // 2] ^= 1
    disk.remove(path)
    with disk.NewFile(path) as file:
        file.write(data)
