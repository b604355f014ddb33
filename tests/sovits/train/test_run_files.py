"""What a run keeps and writes: checkpoints of whole epochs, weights files under their names, copies of one voice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from experiments import Experiment, assert_equal, make_experiment, train, train_whole

from lastgood_sovits.cli import main
from lastgood_sovits.errors import SovitsError
from lastgood_sovits.train.export import export
from lastgood_sovits.weights import read_weights


def _short(experiment: Experiment, epochs: int) -> Experiment:
    """Four steps an epoch."""
    for values in (experiment.s1, experiment.s2):
        values["train"].update(batch_size=24, epochs=epochs)
    return experiment


def test_an_export_from_within_an_epoch_does_not_take_the_name_of_another(experiment: Experiment) -> None:
    assert train(_short(experiment, 2), "s1", die=6, save_every=1).codes == [-9]
    file = experiment.weights_folder("s1") / "voice-e1.ckpt"
    before = file.read_bytes()
    config = experiment.config("s1")
    with pytest.raises(SovitsError, match=r"from within epoch 2.*--output"):
        export("s1", config, step=None, upstream=None)
    assert file.read_bytes() == before
    other = experiment.root / "now" / "voice.ckpt"
    assert export("s1", config, step=None, upstream=None, output=other).files == (other,) and other.is_file()
    done = CliRunner().invoke(main, ["export", "s1", "--config", str(config), "--step", "4"])
    assert done.output.splitlines() == ["Step 4, 1 epochs:", f"{file} (replaced)"]
    # What was looked at does not change where the training goes on.
    assert "restored step 5" in train_whole(experiment, "s1").output


def _obstruct(experiment: Experiment) -> Path:
    target = experiment.weights_folder("s1") / "voice-e1.ckpt"
    target.mkdir(parents=True)
    (target / "occupied").touch()
    return target


def test_a_weights_file_of_an_earlier_epoch_is_written_by_the_next_start(tmp_path: Path) -> None:
    whole, cut = (_short(make_experiment(tmp_path / name), 2) for name in ("whole", "cut"))
    train_whole(whole, "s1")
    target = _obstruct(cut)
    assert train(cut, "s1", die=6, save_every=1).codes == [-9] and cut.steps("s1")[-2:] == [4, 5]
    shutil.rmtree(target)
    job = train_whole(cut, "s1", save_every=1)
    assert job.output.rstrip().endswith("voice-e2.ckpt") and "Not written" not in job.output
    for name in ("voice-e1.ckpt", "voice-e2.ckpt"):
        a, b = (read_weights(e.weights_folder("s1") / name) for e in (cut, whole))
        assert a.epoch == b.epoch
        assert_equal(a.tensors, b.tensors)
    assert_equal(cut.tensors("s1", 8), whole.tensors("s1", 8))


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_damaged_checkpoint_of_an_earlier_epoch_costs_its_file_and_not_the_training(
    experiment: Experiment, nproc: int
) -> None:
    _short(experiment, 2).s1["train"]["batch_size"] = 24 // nproc
    target = _obstruct(experiment)
    assert -9 in train(experiment, "s1", nproc, die=6, save_every=1).codes and 4 in experiment.steps("s1")
    shutil.rmtree(target)
    for shard in experiment.run("s1").glob("step-00000004*/*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1000])
    job = train(experiment, "s1", nproc)
    assert job.codes[0] == 1 and f"Not written: {target}: it failed before" in job.output, job.output
    assert experiment.steps("s1")[-1] == 8 and experiment.weights("s1") == ["voice-e2.ckpt"]


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_weights_file_that_cannot_be_written_any_more_is_named_with_exit_code_1(
    experiment: Experiment, nproc: int
) -> None:
    _short(experiment, 3).s1["train"]["batch_size"] = 24 // nproc
    target = _obstruct(experiment)
    assert -9 in train(experiment, "s1", nproc, die=10, save_every=1).codes and 4 not in experiment.steps("s1")
    shutil.rmtree(target)
    for _ in range(2):
        job = train(experiment, "s1", nproc)
        assert job.codes[0] == 1 and f"Not written: {target}" in job.output, job.output
    assert experiment.weights("s1") == ["voice-e2.ckpt", "voice-e3.ckpt"]


@pytest.mark.parametrize("stage", ["s1", "s2"])
def test_without_if_save_latest_every_wanted_epoch_keeps_its_checkpoint(experiment: Experiment, stage: str) -> None:
    for values in (experiment.s1, experiment.s2):
        values["train"].update(batch_size=24, epochs=2, if_save_latest=False, if_save_every_weights=False)
    train_whole(experiment, stage)
    assert experiment.steps(stage) == [4, 8]  # the first although no weights file is written for it
    # Another batch size: six steps an epoch from here on.
    experiment.s1["train"].update(batch_size=16, epochs=4)
    experiment.s2["train"].update(batch_size=16, epochs=4)
    train_whole(experiment, stage, save_every=1)
    assert experiment.steps(stage) == [4, 8, 14, 18, 19, 20]
    assert len(experiment.weights(stage)) == 2


def test_the_copies_of_another_voice_with_the_same_name_are_refused(tmp_path: Path) -> None:
    first, second = make_experiment(tmp_path / "a", epochs=1), make_experiment(tmp_path / "b", clips=6, epochs=1)
    for experiment in (first, second):
        _short(experiment, 1)
    mirror = tmp_path / "mirror"
    train_whole(first, "s1", mirror=mirror)
    job = train(second, "s1", mirror=mirror)
    assert job.codes == [1] and "are of a training on other clips" in job.output and not second.weights("s1")
    assert str(mirror / "voice" / "logs_s1_v2") in job.output
    assert "restored" not in train_whole(second, "s1", mirror=tmp_path / "other").output
    # The same clips are the same voice.
    shutil.rmtree(first.run("s1"))
    assert "restored step 4" in train_whole(first, "s1", mirror=mirror).output
