"""Unmodified programs, killed at every file operation: with `lastgood run` they all continue from the newest state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs fork")


def crash(
    program: str, work: Path, *options: str, protected: bool = True, run: tuple[str, ...] = (), timeout: float = 280
) -> tuple[list[dict[str, Any]], str]:
    prefix = [sys.executable, "-m", "lastgood.cli.run", *run, "--"] if protected else []
    command = [*prefix, sys.executable, str(HERE / "crash.py"), str(HERE / "programs" / program), str(work), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=work)
    output = done.stdout + done.stderr
    assert done.returncode in (0, 74), output
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('[{"point"'))), output


def lost(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points after which the program did not come back to what it had saved last."""
    return [
        result
        for result in results
        if result["killed"]
        and (any(result["resume_codes"]) or int(result["resumed"] or -1) < int(result["saved"] or 0))
    ]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory on another file system than the test's."""
    try:
        directory = tempfile.mkdtemp(prefix="lastgood-test-", dir="/dev/shm")
    except OSError:
        pytest.skip("there is no /dev/shm")
    yield Path(directory)
    subprocess.run(["rm", "-rf", directory], check=True)


# Each campaign has a quick form, which takes every few points, and a full one, which takes all.
STRIDES = [pytest.param(5, id="quick"), pytest.param(1, id="full", marks=pytest.mark.slow)]
campaign = pytest.mark.parametrize("stride", STRIDES)
modes = pytest.mark.parametrize("mode", ["before", "torn"])


def taken(stride: int, mode: str) -> list[str]:
    """The operations that open a file to write are fewer, so that torn writes are all tried."""
    return ["--mode", mode, "--stride", str(stride if mode == "before" else 1)]


@campaign
@modes
def test_a_script_that_overwrites_its_only_file(memory: Path, mode: str, stride: int) -> None:
    results, output = crash("naive.py", memory, *taken(stride, mode))
    assert len(results) > (25 if mode == "before" and stride == 1 else 5)
    assert not lost(results), output


def test_the_same_script_loses_its_file_without_us(memory: Path) -> None:
    results, _ = crash("naive.py", memory, "--mode", "torn", protected=False)
    assert lost(results)


@campaign
def test_two_ranks_that_overwrite_the_same_file(memory: Path, stride: int) -> None:
    results, output = crash("naive.py", memory, "--ranks", "2", "--stride", str(2 * stride - 1))
    assert sum(result["killed"] for result in results) >= 4
    assert not lost(results), output
    assert results[-1]["codes"] == [0, 0], output


@campaign
@modes
def test_two_ranks_that_rename_the_same_temporary_file(memory: Path, mode: str, stride: int) -> None:
    results, output = crash("every_rank_renames.py", memory, "--ranks", "2", *taken(stride, mode))
    assert any(result["killed"] for result in results)
    assert not lost(results), output
    assert results[-1]["codes"] == [0, 0], output


@campaign
@modes
@pytest.mark.parametrize("names", ["latest", "by step"])
def test_gpt_sovits_always_has_a_complete_pair(
    tmp_path: Path, memory: Path, mode: str, names: str, stride: int
) -> None:
    options = ["--mode", mode, "--stride", str(2 * stride - 1)]
    if names == "by step":
        options += ["--by-step"]
    if mode == "torn":
        # The working directory on another file system: what shutil.move does then is killed in the middle of its copy.
        options += ["--cwd", str(tmp_path)]
    results, output = crash("sovits.py", memory, *options, run=("--preset", "gpt-sovits"))
    assert len(results) > 3
    assert not lost(results), output
    assert "could not remove" not in output


def test_gpt_sovits_loses_its_state_without_us(tmp_path: Path, memory: Path) -> None:
    results, _ = crash("sovits.py", memory, "--mode", "torn", "--cwd", str(tmp_path), protected=False)
    assert lost(results)


@pytest.mark.slow
def test_hugging_face_with_two_ranks(memory: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    preload = "torch,transformers.trainer,accelerate"
    results, output = crash("hf.py", memory, "--ranks", "2", "--preload", preload, "--stride", "11")
    assert len(results) > 8
    assert not lost(results), output
    assert results[-1]["codes"] == [0, 0], output


@pytest.mark.parametrize("stride", [pytest.param(29, id="quick"), pytest.param(4, id="full", marks=pytest.mark.slow)])
@modes
def test_hugging_face_resumes_from_the_newest_complete_checkpoint(memory: Path, mode: str, stride: int) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    preload = "torch,transformers.trainer,accelerate"
    results, output = crash("hf.py", memory, "--mode", mode, "--preload", preload, "--stride", str(stride))
    assert len(results) > 1
    assert not lost(results), output


@pytest.mark.parametrize("stride", [pytest.param(11, id="quick"), pytest.param(1, id="full", marks=pytest.mark.slow)])
@modes
def test_lightning_resumes_from_the_newest_complete_checkpoint(memory: Path, mode: str, stride: int) -> None:
    pytest.importorskip("lightning")
    results, output = crash(
        "lightning_last.py", memory, "--mode", mode, "--preload", "torch,lightning.pytorch", "--stride", str(stride)
    )
    assert len(results) > 2
    assert not lost(results), output
