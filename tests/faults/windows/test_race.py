"""Two processes, one temporary name, one target: it fails without us, and never with us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.skipif(os.name != "nt", reason="needs Windows"), pytest.mark.timeout(6000)]
ROUNDS = os.environ.get("LASTGOOD_ROUNDS", "100")


def race(directory: Path, how: str, *before: str, seconds: float = 0.1, rounds: int = int(ROUNDS)) -> dict[str, Any]:
    """With us one of the two may not write at all: the other should not wait for it for long."""
    script = str(Path(__file__).with_name("race.py"))
    done = subprocess.run(
        [sys.executable, *before, script, how, str(rounds), str(directory), str(seconds)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=30 * rounds,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_without_us_every_round_fails(tmp_path: Path) -> None:
    result = race(tmp_path, "naive", seconds=60)
    # But for rounds in which both delete the temporary name in one moment: the system lets both.
    assert len(result["failed"]) >= 0.98 * int(ROUNDS), result
    kinds = ("winerror 32", "FileNotFoundError", "PermissionError, errno 13")
    assert all(any(kind in error for kind in kinds) for error in result["errors"]), result


NEVER: dict[str, Any] = {"failed": [], "errors": {}, "broken": []}


def test_with_lastgood_save_never(tmp_path: Path) -> None:
    assert race(tmp_path, "lastgood") == {"how": "lastgood", "rounds": int(ROUNDS), **NEVER}
    assert os.listdir(tmp_path) == ["最新 last.pth"]


def test_with_lastgood_run_never(tmp_path: Path) -> None:
    # The program is the first one, unchanged.
    result = race(tmp_path, "naive", "-m", "lastgood", "run", "--", sys.executable)
    assert result == {"how": "naive", "rounds": int(ROUNDS), **NEVER}
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == ["最新 last.pth"]
