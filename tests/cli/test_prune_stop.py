"""`prune` and `stop`: they respect the job that holds a run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from conftest import flip_byte, job

from lastgood import stop as stop_file

Call = Callable[..., Result]
TRAINING = """
import sys, time, lastgood
with lastgood.Checkpointer(sys.argv[1], epoch=1, rank=0, world_size=1, stop_code=0, keep=lastgood.Keep(last=50)) as c:
    for step in c.steps(every=1000):
        if step == c.last_step or step % 1000 == 0: print("training", flush=True)
        time.sleep(0.01)
"""


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("step-*"))


@pytest.fixture
def training(run: Path) -> Iterator[subprocess.Popen[str]]:
    """A job that holds the run."""
    command = [sys.executable, "-c", TRAINING, str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    yield process
    process.kill()
    process.wait()


def test_a_dry_run_deletes_nothing_and_takes_nothing(call: Call, run: Path) -> None:
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    result = call("prune", run, "--keep-last", 1, "--dry-run", "--json")
    assert json.loads(result.stdout)["deleted"] == ["step-00000100", "step-00000200", "step-00000300"]
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        (["--keep-last", "2"], ["step-00000200", "step-00000250.g3"]),
        (["--keep-best", "1", "--metric", "loss", "--mode", "max"], ["step-00000100", "step-00000250.g3"]),
        (["--keep-every", "100"], ["step-00000100", "step-00000200", "step-00000250.g3"]),
        (["--max-bytes", "1k"], ["step-00000200", "step-00000250.g3"]),
    ],
)
def test_each_rule_keeps_what_it_says_and_always_the_newest(
    call: Call, run: Path, rules: list[str], left: list[str]
) -> None:
    result = call("prune", run, *rules)
    assert result.exit_code == 0, result.output
    assert names(run) == left


def test_nothing_is_deleted_when_the_newest_is_damaged(call: Call, run: Path) -> None:
    shard = run / "step-00000250.g3" / "00000.safetensors"
    flip_byte(shard, shard.stat().st_size - 1)
    before = names(run)
    result = call("prune", run, "--keep-last", 1)
    assert result.exit_code == 1 and "does not match its checksum" in result.stderr
    assert names(run) == before


def test_a_job_goes_on_after_a_prune(call: Call, run: Path) -> None:
    call("prune", run, "--keep-last", 2)
    job(run, [260])
    assert names(run)[-1].startswith("step-00000260.g")


def test_rules_are_asked_for(call: Call, run: Path) -> None:
    assert call("prune", run).exit_code == 2
    assert call("prune", run, "--keep-best", 1).exit_code == 1  # Which metric?
    assert call("prune", run, "--max-bytes", "much").exit_code == 2


def test_prune_refuses_a_run_that_a_job_holds(call: Call, run: Path, training: subprocess.Popen[str]) -> None:
    before = names(run)
    result = call("prune", run, "--keep-last", 1)
    assert result.exit_code == 1
    assert f"is held by process {training.pid}" in result.stderr
    assert names(run) == before


def test_stop_ends_the_job_and_waits_for_it(call: Call, run: Path, training: subprocess.Popen[str]) -> None:
    result = call("stop", run, "--wait", "--timeout", 30)
    assert result.exit_code == 0, result.output
    assert f"Asked process {training.pid}" in result.stdout and "The job has ended." in result.stdout
    assert training.wait(10) == 0
    assert not stop_file.is_asked(run)
    assert len(names(run)) == 5


def test_stop_says_when_no_job_holds_the_run(call: Call, run: Path) -> None:
    began = time.monotonic()
    result = call("stop", run, "--wait")
    assert result.exit_code == 0 and "No job holds" in result.stdout
    assert time.monotonic() - began < 5
    assert stop_file.is_asked(run)


def test_stop_gives_up_after_the_timeout(call: Call, run: Path) -> None:
    # Holds the run without looking for the stop file.
    script = (
        "import sys, time, lastgood; c = lastgood.Checkpointer(sys.argv[1], epoch=1); print(1, flush=True); "
        "time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        result = call("stop", run, "--wait", "--timeout", 0.5)
        assert result.exit_code == 1 and "has not ended" in result.stderr
    finally:
        holder.kill()
        holder.wait()
