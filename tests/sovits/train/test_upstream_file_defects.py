"""More of what upstream's trainer gets wrong: files, names, and which process does what.

The numbers are those of docs/sovits.md, "What upstream does otherwise".
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch.distributed as dist
from experiments import Experiment, make_experiment, train, train_whole

import lastgood
from lastgood_sovits.train import stage1
from lastgood_sovits.weights import read_weights


def _short(experiment: Experiment, epochs: int = 1) -> Experiment:
    experiment.s1["train"].update(batch_size=24, epochs=epochs)
    return experiment


def _die_while_writing() -> None:
    """Kills the process when half a weights file is written."""
    original = lastgood.replace_file

    def replace(path: Path, write: Callable[[BinaryIO], None], **options: Any) -> None:
        def half(file: BinaryIO) -> None:
            file.write(b"half a file")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        original(path, half if path.suffix == ".ckpt" else write, **options)

    lastgood.replace_file = replace


def test_05_13_a_kill_within_a_write_leaves_the_old_file_whole(experiment: Experiment) -> None:
    _short(experiment)
    target = experiment.weights_folder("s1") / "voice-e1.ckpt"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"the old file")
    assert train(experiment, "s1", before=_die_while_writing, save_every=1).codes == [-9]
    assert target.read_bytes() == b"the old file"
    train_whole(experiment, "s1")
    assert read_weights(target).epoch == 1


def test_07_the_newest_is_found_by_its_step_not_by_digits_in_the_path_or_by_the_clock(tmp_path: Path) -> None:
    experiment = _short(make_experiment(tmp_path / "voice-233333333333"), epochs=2)
    train(experiment, "s1", die=6, save_every=1)
    steps = experiment.steps("s1")
    for path in experiment.run("s1").glob(f"step-{steps[0]:08d}*"):
        os.utime(path, (4e9, 4e9))
    assert steps[0] < steps[-1] and f"restored step {steps[-1]}" in train_whole(experiment, "s1").output


def test_14_a_weights_file_that_is_replaced_is_mentioned(experiment: Experiment) -> None:
    _short(experiment)
    assert "is there already" not in train_whole(experiment, "s1").output
    shutil.rmtree(experiment.logs("s1"))
    assert "voice-e1.ckpt is there already" in train_whole(experiment, "s1").output


def _as_on_a_machine_of_its_own(folder: Path) -> None:
    """Every rank is the first of its machine. Who writes weights is noted."""
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    original = stage1.Stage1.write_weights

    def write(self: stage1.Stage1, path: Path, epoch: int, step: int) -> None:
        (folder / f"written-by-{self.ranks.rank}").touch()
        original(self, path, epoch, step)

    stage1.Stage1.write_weights = write  # type: ignore[method-assign]


def test_15_one_process_of_the_job_writes_not_one_of_each_machine(experiment: Experiment) -> None:
    _short(experiment).s1["train"]["batch_size"] = 12
    train_whole(experiment, "s1", 2, before=partial(_as_on_a_machine_of_its_own, experiment.root))
    assert [path.name for path in experiment.root.glob("written-by-*")] == ["written-by-0"]


def _note_closing(folder: Path) -> None:
    original = dist.destroy_process_group

    def close(*arguments: Any) -> None:
        original(*arguments)
        (folder / f"closed-by-{os.environ['RANK']}").touch()

    dist.destroy_process_group = close


@pytest.mark.parametrize("stage", ["s1", "s2"])
def test_23_every_process_closes_the_process_group(experiment: Experiment, stage: str) -> None:
    _short(experiment)
    for values in (experiment.s1, experiment.s2):
        values["train"].update(batch_size=12, epochs=1)
    train_whole(experiment, stage, 2, before=partial(_note_closing, experiment.root))
    assert sorted(path.name for path in experiment.root.glob("closed-by-*")) == ["closed-by-0", "closed-by-1"]


def test_23_a_process_that_is_asked_to_stop_closes_it_too(experiment: Experiment) -> None:
    experiment.s1["train"]["epochs"] = 500
    log = experiment.logs("s1") / "train.log"
    job = train(
        experiment,
        "s1",
        2,
        before=partial(_note_closing, experiment.root),
        stop_when=lambda: log.is_file() and "step 1:" in log.read_text(),
        log_every=1,
    )
    assert job.codes == [75, 75], job.output
    assert sorted(path.name for path in experiment.root.glob("closed-by-*")) == ["closed-by-0", "closed-by-1"]
