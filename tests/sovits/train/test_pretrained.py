"""A training that begins with pretrained weights begins with exactly these."""

from __future__ import annotations

import shutil
from pathlib import Path

from experiments import Experiment, assert_equal, train, train_whole

from lastgood_sovits.train.export import export
from lastgood_sovits.weights import read_weights


def _short(experiment: Experiment) -> None:
    for values in (experiment.s1, experiment.s2):
        values["train"].update(batch_size=24, epochs=1)


def test_stage_1_begins_with_pretrained_s1(experiment: Experiment, tmp_path: Path) -> None:
    _short(experiment)
    train_whole(experiment, "s1")
    pretrained = tmp_path / "pretrained.ckpt"
    (experiment.weights_folder("s1") / "voice-e1.ckpt").rename(pretrained)
    shutil.rmtree(experiment.logs("s1"))
    experiment.s1["pretrained_s1"] = str(pretrained)
    experiment.s1["train"]["seed"] = 7  # other random numbers where none is loaded
    job = train(experiment, "s1", die=2, save_every=1)
    assert job.codes == [-9] and f"starting from the weights in {pretrained}" in job.output
    # The optimizer steps after four batches: until then they are what was loaded.
    begun = {name.removeprefix("model."): t for name, t in experiment.tensors("s1", 1).items()}
    expected = {name: t.float() for name, t in read_weights(pretrained).tensors.items()}
    assert_equal({name: begun[name] for name in expected}, expected)


def test_stage_2_begins_with_pretrained_s2g_and_s2d(experiment: Experiment, tmp_path: Path) -> None:
    _short(experiment)
    train_whole(experiment, "s2")
    d, g = export("s2", experiment.config("s2"), step=None, upstream=tmp_path / "pretrained").files
    shutil.rmtree(experiment.logs("s2"))
    # Steps that are too small to change a number.
    experiment.s2["train"].update(pretrained_s2G=str(g), pretrained_s2D=str(d), seed=7, learning_rate=1e-30)
    job = train(experiment, "s2", die=2, save_every=1)
    assert job.codes == [-9] and all(f"starting from the weights in {path}" in job.output for path in (g, d))
    begun = experiment.tensors("s2", 1)
    for path, network in ((g, "generator."), (d, "discriminator.")):
        expected = {network + name: t for name, t in read_weights(path).tensors.items()}
        assert_equal({name: begun[name] for name in expected}, expected)
