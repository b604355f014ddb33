"""The command line of a training: which GPUs it takes, and what it passes on to its processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from experiments import Experiment

from lastgood_sovits.cli import main
from lastgood_sovits.cli import train as command
from lastgood_sovits.train import launch, program
from lastgood_sovits.train.options import Options


class Machine:
    """A machine with `gpus` GPUs, on which nothing is trained: what would be started is noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
        self.gpus = gpus
        self.launched: list[tuple[list[str], int]] = []
        self.trained: list[Options] = []
        for name in ("CUDA_VISIBLE_DEVICES", "_CUDA_VISIBLE_DEVICES", "RANK"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        monkeypatch.setattr(torch.cuda, "device_count", self._count)
        monkeypatch.setattr(launch, "launch", self._launch)
        monkeypatch.setattr(program, "train", self._train)

    def _count(self) -> int:
        """As CUDA counts: up to the first number that does not exist."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            return self.gpus
        numbers = [int(number) < self.gpus for number in visible.split(",") if number]
        return numbers.index(False) if False in numbers else len(numbers)

    def _launch(self, arguments: Sequence[str], nproc: int) -> int:
        self.launched.append((list(arguments), nproc))
        return 0

    def _train(self, stage: str, config: Path, options: Options) -> int:
        self.trained.append(options)
        return 0


def _train(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


@pytest.mark.parametrize(("given", "processes"), [((), 2), (("--nproc", 2), 2), (("--nproc", 1), 1)])
def test_the_chosen_gpus_are_taken_also_with_nproc(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, given: tuple[object, ...], processes: int
) -> None:
    experiment.s2["train"]["gpu_numbers"] = "1-3"
    machine = Machine(monkeypatch, gpus=4)
    done = _train("s2", "--config", experiment.config("s2"), *given)
    assert done.exit_code == 0, done.output
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert [n for _, n in machine.launched] == ([processes] if processes > 1 else [])


def test_stage_1_takes_the_gpus_of_upstreams_variable(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, gpus=4)
    monkeypatch.setenv("_CUDA_VISIBLE_DEVICES", "2")
    assert _train("s1", "--config", experiment.config("s1"), "--nproc", 1).exit_code == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2" and len(machine.trained) == 1


@pytest.mark.parametrize("numbers", ["7", "0-7"])
def test_a_chosen_gpu_that_does_not_exist_is_named(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, numbers: str
) -> None:
    experiment.s2["train"]["gpu_numbers"] = numbers
    machine = Machine(monkeypatch, gpus=2)
    done = _train("s2", "--config", experiment.config("s2"))
    assert done.exit_code == 1 and f"chooses the GPUs {numbers.replace('-', ',')}, and torch sees 2" in done.output
    assert not machine.launched and not machine.trained


def test_without_cuda_the_numbers_of_upstreams_page_mean_nothing(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, gpus=0)
    assert _train("s2", "--config", experiment.config("s2")).exit_code == 0 and len(machine.trained) == 1


def test_a_choice_of_the_environment_stays(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment.s2["train"]["gpu_numbers"] = "1-3"
    Machine(monkeypatch, gpus=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert _train("s2", "--config", experiment.config("s2")).exit_code == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_every_option_reaches_the_processes_that_are_started(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: tuple[object, ...] = (
        *("--global-batch", 8, "--precision", "bf16", "--device", "cpu", "--workers", 0, "--save-every", 3),
        *("--save-minutes", 2.5, "--mirror", experiment.root / "mirror", "--import", experiment.folder),
        *("--log-every", 4, "--deterministic", "--no-dropout", "--upstream-compat"),
    )
    # No option of the command is forgotten here.
    options = [name for parameter in command.train.params for name in parameter.opts if name.startswith("--")]
    assert {name for name in given if str(name).startswith("--")} == set(options) - {"--config", "--nproc"}
    machine = Machine(monkeypatch, gpus=0)
    config = experiment.config("s1")
    assert _train("s1", "--config", config, "--nproc", 2, *given).exit_code == 0
    assert _train("s1", "--config", config, "--nproc", 1, *given).exit_code == 0
    [(arguments, nproc)] = machine.launched
    assert nproc == 2 and arguments[0] == "train"
    monkeypatch.setenv("RANK", "0")
    assert _train(*arguments[1:]).exit_code == 0
    alone, child = machine.trained
    assert child == alone
    assert child == Options(
        global_batch=8,
        precision="bf16",
        device="cpu",
        workers=0,
        save_every=3,
        save_minutes=2.5,
        mirror=experiment.root / "mirror",
        import_from=experiment.folder,
        log_every=4,
        deterministic=True,
        dropout=False,
        upstream_compat=True,
    )
