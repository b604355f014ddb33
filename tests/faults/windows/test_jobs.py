"""Jobs on Windows: killed in the middle of a save and resumed, the training goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lastgood

pytestmark = [pytest.mark.skipif(os.name != "nt", reason="needs Windows"), pytest.mark.timeout(900)]
PROGRAM = Path(__file__).with_name("program.py")
SECONDS = 400
UNTIL, KILLED_AT = 6, 4
TERMINATED = int(signal.SIGTERM)
"""The exit code of a process that was ended from one moment to the next."""


def start(
    run: Path, notes: Path, world: int, *options: str, victim: int = 0, kill: tuple[str, ...] = ()
) -> list[subprocess.Popen[str]]:
    """The ranks of one life; `kill` are options of the victim alone."""
    own = {victim: kill}
    program = [sys.executable, str(PROGRAM), str(run), str(notes)]
    return [
        subprocess.Popen(
            [*program, str(rank), str(world), str(UNTIL), *options, *own.get(rank, ())],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        for rank in range(world)
    ]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ended(processes: list[subprocess.Popen[str]], victim: int = 0) -> list[tuple[int, str]]:
    """Exit codes and outputs. Once the victim has died the others are ended, as a launcher does."""
    end = time.monotonic() + SECONDS
    while processes[victim].poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    if processes[victim].poll() != 0:
        for process in processes:
            process.kill()
    return [(process.wait(60), process.communicate()[0]) for process in processes]


DEATHS = [
    *((1, False, 0, where) for where in ("in the manifest", "before the commit", "in the clean-up")),
    *((2, False, rank, "in a shard") for rank in (0, 1)),
    (2, True, 0, "in a shard"),
]


@pytest.mark.parametrize(
    ("world", "ddp", "victim", "where"),
    DEATHS,
    ids=[f"{('alone', 'two ranks', 'gloo DDP')[w - 1 + d]}, rank {v} {where}" for w, d, v, where in DEATHS],
)
def test_killed_in_a_save_and_resumed_the_training_is_the_same_in_every_bit(
    tmp_path: Path, world: int, ddp: bool, victim: int, where: str
) -> None:
    run, notes = tmp_path / "训练 runs" / "语音", tmp_path / "notes"

    def port() -> list[str]:
        return ["--ddp", free_port()] if ddp else []

    kill = ("--kill-at", str(KILLED_AT), where)
    killed = ended(start(run, notes, world, "--undisturbed", *port(), victim=victim, kill=kill), victim)
    assert killed[victim][0] == TERMINATED, killed
    resumed = ended(start(run, notes, world, *port()))
    assert [code for code, _ in resumed] == [0] * world, resumed
    for rank in range(world):
        expected = json.loads((notes / f"undisturbed-{rank}.json").read_text())
        life = json.loads((notes / f"life-{rank}.json").read_text())
        # The clean-up is that of the save before, or of this one.
        assert life["start"] == KILLED_AT - 1 or (where == "in the clean-up" and life["start"] == KILLED_AT)
        if not (ddp and rank):  # There the buffers are rank 0's from the start, not only from the first forward on.
            assert life["began"] == expected[life["start"]]
        assert life["ended"] == expected[UNTIL]


@pytest.mark.parametrize("where", ["in the data", "before the replacement"])
def test_a_single_file_is_the_old_one_when_the_save_is_killed(tmp_path: Path, where: str) -> None:
    script = (
        "import os, sys, torch, lastgood\n"
        "sys.path.insert(0, sys.argv[3])\n"
        "from faults.killer import end_at_once\n"
        "lastgood.save({'w': torch.ones(100000)}, sys.argv[1])\n"
        "def die(operation, moment):\n"
        "    if operation.name == sys.argv[2] and moment == 'before':\n"
        "        if operation.file is not None:\n"
        "            operation.file.write(operation.data[:len(operation.data) // 2])\n"
        "        end_at_once()\n"
        "lastgood.disk.observer = die\n"
        "lastgood.save({'w': torch.zeros(100000)}, sys.argv[1])\n"
    )
    path = tmp_path / "模型.pth"
    operation = {"in the data": "write", "before the replacement": "replace"}[where]
    arguments = [sys.executable, "-c", script, str(path), operation, str(PROGRAM.parents[2])]
    assert subprocess.run(arguments, timeout=SECONDS).returncode == TERMINATED
    assert torch.equal(lastgood.load(path)["w"], torch.ones(100000))
    lastgood.save({"w": torch.zeros(3)}, path)
    assert torch.equal(lastgood.load(path)["w"], torch.zeros(3))
