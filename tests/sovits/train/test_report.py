"""What people see of a training: the log file, the progress bar, and TensorBoard's scalars, pictures and sounds."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments import Experiment, train_whole
from rich.console import Console

from lastgood_sovits.train import report
from lastgood_sovits.train.ranks import Ranks
from lastgood_sovits.train.report import Report

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def _events(folder: Path) -> Any:
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_stage_2_writes_scalars_mels_and_sounds_and_a_log(experiment: Experiment) -> None:
    experiment.s2["train"].update(batch_size=48, epochs=1)
    train_whole(experiment, "s2")
    tags = _events(experiment.logs("s2")).Tags()
    assert {"train/generator", "train/discriminator", "train/mel", "train/learning_rate"} <= set(tags["scalars"])
    assert sorted(tags["images"]) == ["mel/made", "mel/real"] and sorted(tags["audio"]) == ["sound/made", "sound/real"]
    logged = experiment.losses("s2")
    shown = {event.step: event.value for event in _events(experiment.logs("s2")).Scalars("train/generator")}
    assert shown.keys() == logged.keys() == {1, 2} and shown == pytest.approx(logged, rel=1e-5)


def test_stage_1_writes_scalars_of_every_rank_together_once(experiment: Experiment) -> None:
    experiment.s1["train"].update(batch_size=12, epochs=1)
    train_whole(experiment, "s1", 2, log_every=1)
    events = _events(experiment.logs("s1"))
    assert {"train/loss", "train/top3_accuracy", "train/learning_rate"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert len(list((experiment.logs("s1") / "tensorboard").iterdir())) == 1


def test_the_bar_shows_where_a_resumed_training_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(report, "Console", lambda **_: terminal)
    with Report(Ranks(0, 1, torch.device("cpu")), tmp_path) as shown:
        shown.begin(30, 100)
        shown.advance(31, "epoch 4 of 10")
    assert "epoch 4 of 10" in screen.getvalue() and "31/100" in screen.getvalue()


def test_another_rank_writes_nothing_and_shows_warnings_with_its_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Report(Ranks(1, 2, torch.device("cpu")), tmp_path / "logs") as shown:
        shown.begin(0, 10)
        shown.losses(1, 1, {"loss": 1.0})
        logging.getLogger("lastgood_sovits").warning("something is odd")
    assert not (tmp_path / "logs").exists()
    error = capsys.readouterr().err
    assert "rank 1: something is odd" in error and "loss" not in error
