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


def race(
    directory: Path, how: str, *before: str, options: tuple[str, ...] = (), rounds: int = int(ROUNDS)
) -> dict[str, Any]:
    script = str(Path(__file__).with_name("race.py"))
    done = subprocess.run(
        [sys.executable, *before, script, how, str(rounds), str(directory), *options],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=30 * rounds,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_without_us_saves_are_lost(tmp_path: Path) -> None:
    result = race(tmp_path, "naive", options=("--stop-early",))
    assert len(result["errors"]) >= 5
    assert any("winerror 32" in error or "FileNotFoundError" in error for error in result["errors"]), result


def test_with_lastgood_save_never(tmp_path: Path) -> None:
    result = race(tmp_path, "lastgood")
    assert result == {"how": "lastgood", "rounds": int(ROUNDS), "errors": [], "broken": []}
    assert os.listdir(tmp_path) == ["最新 last.pth"]


def test_with_lastgood_run_never(tmp_path: Path) -> None:
    # The program is the first one, unchanged.
    result = race(tmp_path, "naive", "-m", "lastgood", "run", "--", sys.executable)
    assert result == {"how": "naive", "rounds": int(ROUNDS), "errors": [], "broken": []}
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == ["最新 last.pth"]
