"""Asked to stop, a training saves, whatever else got the signal; and exit code 75 says that it did."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run
from experiments import Experiment, start, wait_for
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from lastgood_sovits.train.launch import launch, note_exit_code

_posix = pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX")
_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are looked up in /proc")


def _started(experiment: Experiment, stage: str) -> bool:
    log = experiment.logs(stage) / "train.log"
    return log.is_file() and "step 2:" in log.read_text()


@_posix
@pytest.mark.parametrize("stage", ["s1", pytest.param("s2", marks=pytest.mark.slow)])
def test_a_signal_that_loader_processes_get_too_saves_and_ends_with_75(experiment: Experiment, stage: str) -> None:
    experiment.s1["train"]["epochs"] = experiment.s2["train"]["epochs"] = 500
    log = experiment.root / "output.txt"
    options = ("--device", "cpu", "--workers", 2, "--log-every", 1)
    process = start("train", stage, "--config", experiment.config(stage), *options, log=log)
    wait_for(process, lambda: _started(experiment, stage))
    os.killpg(process.pid, signal.SIGTERM)  # as torchrun, SLURM and containers do
    assert process.wait(60) == 75, log.read_text()
    assert experiment.steps(stage)
    with pytest.raises(ProcessLookupError):  # no loader's process is left
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)


@_posix
def test_an_error_in_a_loader_process_ends_the_program_with_its_reason(experiment: Experiment) -> None:
    experiment.s2["train"]["epochs"] = 500
    log = experiment.root / "output.txt"
    options = ("--device", "cpu", "--workers", 2, "--log-every", 1)
    process = start("train", "s2", "--config", experiment.config("s2"), *options, log=log)
    wait_for(process, lambda: _started(experiment, "s2"))
    (experiment.folder / "4-cnhubert" / "clip3.wav.pt").write_bytes(b"broken")
    assert process.wait(60) == 1
    assert "clip3.wav.pt" in log.read_text()


def _launched(monkeypatch: pytest.MonkeyPatch, codes: Sequence[int | None], error: Exception | None) -> int:
    """What the launcher says when its processes end with `codes`, and torch with `error`."""

    def run(_: Any) -> None:
        for rank, code in enumerate(codes):
            monkeypatch.setenv("RANK", str(rank))
            if code is not None:
                note_exit_code(code)
        monkeypatch.delenv("RANK")
        if error is not None:
            raise error

    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    monkeypatch.setenv("LASTGOOD_SOVITS_EXIT_CODES", "")
    monkeypatch.setattr(torch.distributed.run, "run", run)
    return launch(["train"], len(codes))


_SIGNAL = SignalException("SIGTERM", signal.SIGTERM)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((75, 75), 75), ((75, None), 1), ((None, None), 1), ((75, 1), 1), ((0, 0), 0), ((75, 74), 74), ((0, 75), 1)],
)
def test_many_processes_end_with_75_only_when_all_of_them_saved(
    codes: tuple[int | None, ...], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _launched(monkeypatch, codes, _SIGNAL) == expected
    failures = {0: ProcessFailure(0, 1, 75, "")}
    assert _launched(monkeypatch, codes, ChildFailedError("train", failures)) == expected


@_linux
@pytest.mark.slow
def test_a_launcher_that_is_asked_to_stop_waits_for_a_long_step_and_ends_with_75(experiment: Experiment) -> None:
    experiment.s1["train"]["epochs"] = 500
    log = experiment.root / "output.txt"
    options = ("--device", "cpu", "--nproc", 2, "--workers", 1, "--log-every", 1)
    process = start("train", "s1", "--config", experiment.config("s1"), *options, log=log)
    wait_for(process, lambda: _started(experiment, "s1"))
    ranks = _children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGSTOP)  # a step that takes longer than torch's 30 seconds
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(33)
    os.kill(ranks[1], signal.SIGCONT)
    assert process.wait(60) == 75, log.read_text()
    assert experiment.steps("s1")


def _children(process: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@_linux
def test_a_stop_before_the_first_step_is_not_called_saved(experiment: Experiment) -> None:
    log = experiment.root / "output.txt"
    options = ("--device", "cpu", "--nproc", 2)
    process = start("train", "s1", "--config", experiment.config("s1"), *options, log=log)
    wait_for(process, lambda: len(_children(process.pid)) == 2)
    ranks = _children(process.pid)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 1 and not experiment.steps("s1"), log.read_text()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline, "a process outlives its launcher"
        time.sleep(0.1)


@_posix
@pytest.mark.slow
def test_a_stop_file_ends_all_processes_of_a_launcher_with_75(experiment: Experiment) -> None:
    experiment.s1["train"]["epochs"] = 500
    log, options = experiment.root / "output.txt", ("--device", "cpu", "--nproc", 2, "--log-every", 1)
    mirror = ("--mirror", experiment.root / "mirror")
    process = start("train", "s1", "--config", experiment.config("s1"), *options, *mirror, log=log)
    wait_for(process, lambda: _started(experiment, "s1"))
    (experiment.run("s1") / "stop").touch()
    assert process.wait(60) == 75, log.read_text()
    saved = experiment.steps("s1")[-1]
    assert list((experiment.root / "mirror").glob(f"**/step-{saved:08d}*/manifest.json"))
