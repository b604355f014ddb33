"""Real speech: the demo's experiment, and both stages trained on it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
from click.testing import CliRunner
from experiments import sovits

from lastgood_sovits.cli import main
from lastgood_sovits.demo import speech, story
from lastgood_sovits.demo.experiment import STAND_IN, build, s1_config, s2_config
from lastgood_sovits.s2.config import read_config
from lastgood_sovits.s2.dataset import ClipDataset
from lastgood_sovits.semantic import write_semantic
from lastgood_sovits.weights import read_weights


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


def test_both_stages_train_on_real_speech(tmp_path: Path) -> None:
    experiment = build(tmp_path, clips=8)
    config = s2_config(experiment, "run", 1, 2)
    options = ("--device", "cpu", "--log-every", 1)
    code, output = sovits("train", "s2", "--config", config, "--nproc", 2, *options)
    assert code == 0, output
    weights = tmp_path / "run" / "SoVITS_weights_v2" / "demo_e1_s6.pth"
    assert output.splitlines()[-1] == f"Weights: {weights}"
    assert read_weights(weights).version == "v2"
    mels = [float(value) for value in re.findall(r" mel ([\d.]+)", output)]
    assert len(mels) == 6 and mels[-1] < mels[0]
    assert write_semantic(experiment.folder, weights).clips == 8
    code, output = sovits("train", "s1", "--config", s1_config(experiment, "run", 1, 1), *options)
    assert code == 0, output
    assert output.splitlines()[-1] == f"Weights: {tmp_path / 'run' / 'GPT_weights_v2' / 'demo-e1.ckpt'}"
    # Sums over clips of different length, and the optimizer has stepped twice: they need not fall yet.
    assert len(re.findall(r" loss [\d.]+", output)) == 6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_sees_what_it_promises(tmp_path: Path) -> None:
    code, output = sovits("demo", "--mirror", tmp_path, timeout=880)
    assert code == 0 and "NO" not in output and "bit by bit" in output.replace("\n", " "), output
    assert "copies elsewhere" in output and output.splitlines()[-1].startswith("Weights: ")
    kept = [path.relative_to(tmp_path).parts for path in tmp_path.glob("*/run/*/step-*/manifest.json")]
    assert {parts[2] for parts in kept} == {"logs_s1_v2", "logs_s2_v2"}


@pytest.mark.parametrize(
    ("last", "good"), [("2.5", True), ("3.5", False), ("nan", False)], ids=["falls", "grows", "is no number"]
)
def test_the_demo_sees_whether_a_loss_falls_from_epoch_to_epoch(tmp_path: Path, last: str, good: bool) -> None:
    lines = ["epoch 1, step 1: mel 4, kl 1", "epoch 1, step 2: mel 2, kl 1", "epoch 2, step 3: mel 9, kl 1"]
    lines += [f"epoch 2, step 3: mel {last}, kl 1", f"epoch 2, step 4: kl 1, mel {last}"]
    (tmp_path / "train.log").write_text("\n".join(f"12:00 INFO {line}" for line in lines[:2]))
    assert not story.learns(tmp_path, "stage 2", "mel").good
    (tmp_path / "train.log").write_text("\n".join(f"12:00 INFO {line}" for line in lines))
    assert story.learns(tmp_path, "stage 2", "mel").good == good


@pytest.mark.parametrize(("good", "keep"), [(True, True), (False, True), (True, False)])
def test_the_demo_ends_with_the_weights_and_fails_where_something_was_not_so(
    good: bool, keep: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Path | None] = {}

    def tell(root: Path, nproc: int, say: Callable[[str], None], mirror: Path | None) -> story.Told:
        seen.update(root=root, mirror=mirror)
        weights = root / "voice.pth"
        weights.write_bytes(b"x")
        return story.Told([story.Finding("writes weights", "a file is missing", good)], [weights])

    monkeypatch.setattr(story, "tell", tell)
    done = CliRunner().invoke(main, ["demo", "--mirror", str(tmp_path), *(["--keep-files"] if keep else [])])
    root = seen["root"]
    assert root is not None and seen["mirror"] == tmp_path / root.name
    assert done.exit_code == (0 if good else 1), done.output
    last = done.output.splitlines()[-1]
    assert last.startswith(f"Weights: {root / 'voice.pth'}") and (root / "voice.pth").is_file() == keep
    assert ("--keep-files leaves them" in last) != keep
    shutil.rmtree(root, ignore_errors=True)
