"""Every version of the stage 2 model trains, is killed, goes on, and leaves the file that upstream's tools know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from experiments import CLIPS, TINY_S2, Experiment, assert_equal, make_experiment, train, train_whole

from lastgood_sovits.weights import read_weights

HEADS = {"v1": b"PK", "v2Pro": b"05", "v2ProPlus": b"06"}
"""The first two bytes of a weights file, by which upstream tells the Pro versions."""


def _experiment(root: Path, version: str) -> Experiment:
    experiment = make_experiment(root, epochs=1)
    experiment.s2["version"] = experiment.s2["model"]["version"] = version
    experiment.s2["train"]["batch_size"] = 8
    if version == "v2ProPlus":  # What tells it from v2Pro.
        experiment.s2["model"]["upsample_initial_channel"] = 768
    if "Pro" in version:
        folder = experiment.folder / "7-sv_cn"
        folder.mkdir()
        generator = torch.Generator().manual_seed(1)
        for index in range(CLIPS):
            vector = torch.randn(1, TINY_S2["sv_channels"], generator=generator)
            torch.save(vector, folder / f"clip{index}.wav.pt")
    return experiment


@pytest.mark.parametrize("version", [*(pytest.param(v, marks=pytest.mark.slow) for v in ("v1", "v2Pro")), "v2ProPlus"])
def test_a_killed_training_of_every_version_goes_on_exactly(tmp_path: Path, version: str) -> None:
    whole, cut = _experiment(tmp_path / "whole", version), _experiment(tmp_path / "cut", version)
    train_whole(whole, "s2", 2)
    assert -9 in train(cut, "s2", 2, die=3, save_every=2).codes
    assert cut.steps("s2")[-1] == 2
    train_whole(cut, "s2", 2, save_every=2)
    last = whole.steps("s2")[-1]
    assert_equal(cut.tensors("s2", last), whole.tensors("s2", last))
    (name,) = whole.weights("s2")
    assert cut.weights("s2") == [name]
    files = [experiment.weights_folder("s2") / name for experiment in (whole, cut)]
    assert all(file.read_bytes()[:2] == HEADS[version] for file in files)
    found = [read_weights(file) for file in files]
    assert {one.version for one in found} == {version}
    assert_equal(found[0].tensors, found[1].tensors)
    assert any(tensor_name.startswith("sv_emb.") for tensor_name in found[0].tensors) == ("Pro" in version)


def test_a_pro_version_without_speaker_vectors_says_what_to_do(tmp_path: Path) -> None:
    experiment = _experiment(tmp_path, "v2Pro")
    for file in (experiment.folder / "7-sv_cn").iterdir():
        file.unlink()
    (experiment.folder / "7-sv_cn").rmdir()
    job = train(experiment, "s2")
    assert job.codes == [1] and "7-sv_cn" in job.output, job.output
