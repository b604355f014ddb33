"""Real speech: the demo's experiment, and both stages trained on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
from click.testing import CliRunner
from experiments import sovits

from lastgood_sovits.cli import main
from lastgood_sovits.demo import speech
from lastgood_sovits.demo.experiment import STAND_IN, build, s2_config
from lastgood_sovits.s2.config import read_config
from lastgood_sovits.s2.dataset import ClipDataset


def test_the_demos_experiment_is_one_that_training_reads(tmp_path: Path) -> None:
    experiment = build(tmp_path, clips=4)
    config = read_config(s2_config(experiment, "run", 1, 1))
    dataset = ClipDataset(experiment.folder, config)
    assert experiment.clips == 4 and not dataset.left_out and (experiment.folder / STAND_IN).is_file()
    for path in (experiment.folder / "5-wav32k").iterdir():
        samples, rate = soundfile.read(path)
        assert rate == 32000 and abs(samples).max() > 0.3


def test_without_the_recordings_speech_is_synthesized(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speech, "SOUNDS", tmp_path / "none")
    source, spoken = speech.speech(3)
    assert source.startswith("espeak-ng") and len(spoken) == 3
    assert all(sentence.wave.abs().max() > 0.1 for sentence in spoken)


def test_words_that_are_not_in_the_dictionary_are_not_guessed() -> None:
    assert speech.phonemes("Hello, world.") == ["HH", "AH0", "L", "OW1", ",", "W", "ER1", "L", "D", "."]
    assert speech.phonemes("Xqzt") is None


def test_every_command_has_a_help_text() -> None:
    for command in ("train", "export", "semantic", "features", "weights", "demo"):
        done = CliRunner().invoke(main, [command, "--help"])
        assert done.exit_code == 0 and done.output.count("\n") > 5, done.output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_sees_what_it_promises() -> None:
    code, output = sovits("demo", timeout=880)
    assert code == 0 and "NO" not in output and "bit by bit" in output.replace("\n", " "), output
