"""Jobs on Windows: killed in the middle of a save and resumed, the training goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name != "nt", reason="needs Windows")
PROGRAM = Path(__file__).with_name("program.py")
SECONDS = 240
UNTIL, KILLED_AT = 6, 4


def start(run: Path, notes: Path, world: int, *options: str) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(run), str(notes), str(rank), str(world), str(UNTIL), *options],
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


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit codes and outputs. Once rank 0 has died the others are ended, as a launcher does."""
    end = time.monotonic() + SECONDS
    while processes[0].poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    if processes[0].poll() != 0:
        for process in processes:
            process.kill()
    return [(process.wait(60), process.communicate()[0]) for process in processes]


@pytest.mark.parametrize(("world", "ddp"), [(1, False), (2, False), (2, True)], ids=["alone", "two ranks", "gloo DDP"])
def test_killed_in_a_save_and_resumed_the_training_is_the_same_in_every_bit(
    tmp_path: Path, world: int, ddp: bool
) -> None:
    run, notes = tmp_path / "训练 runs" / "语音", tmp_path / "notes"

    def port() -> list[str]:
        return ["--ddp", free_port()] if ddp else []

    killed = ended(start(run, notes, world, "--undisturbed", "--kill-at", str(KILLED_AT), *port()))
    assert killed[0][0] == 9, killed
    resumed = ended(start(run, notes, world, *port()))
    assert [code for code, _ in resumed] == [0] * world, resumed
    for rank in range(world):
        expected = json.loads((notes / f"undisturbed-{rank}.json").read_text())
        life = json.loads((notes / f"life-{rank}.json").read_text())
        assert life["start"] == KILLED_AT - 1
        assert life["began"] == expected[life["start"]]
        assert life["ended"] == expected[UNTIL]
