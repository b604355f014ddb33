"""Asked to stop, a training saves, whatever else got the signal; and exit code 75 says that it did."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
from experiments import Experiment, start, wait_for

_posix = pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX")


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
