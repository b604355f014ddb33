"""One process and many train alike: the same clips, the same losses, one writer."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiments import make_experiment, sovits, train_whole


@pytest.mark.parametrize("stage", ["s1", "s2"])
@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_global_batch_gives_the_same_losses_for_any_number_of_processes(
    tmp_path: Path, stage: str, nproc: int
) -> None:
    alone, many = make_experiment(tmp_path / "alone", epochs=1), make_experiment(tmp_path / "many", epochs=1)
    train_whole(alone, stage, 1, global_batch=16, dropout=False, log_every=1)
    train_whole(many, stage, nproc, global_batch=16, dropout=False, log_every=1)
    expected, found = alone.losses(stage), many.losses(stage)
    assert found.keys() == expected.keys() == set(range(1, 7))
    assert found == pytest.approx(expected, rel=1e-4)
    for name in ("discriminator", "mel", "kl") if stage == "s2" else ():
        assert many.losses(stage, name) == pytest.approx(alone.losses(stage, name), rel=1e-3)


def test_the_preference_loss_is_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    alone, many = make_experiment(tmp_path / "alone", epochs=1), make_experiment(tmp_path / "many", epochs=1)
    for experiment, nproc in ((alone, 1), (many, 2)):
        experiment.s1["train"]["if_dpo"] = True
        train_whole(experiment, "s1", nproc, global_batch=8, dropout=False, log_every=1)
    steps = set(range(1, 13))
    for name in ("loss", "cross_entropy", "preference", "gradient"):
        expected, found = alone.losses("s1", name), many.losses("s1", name)
        assert found.keys() == expected.keys() == (steps if name != "gradient" else {4, 8, 12})
        if name == "gradient":  # averaged over the processes, where one process sums
            found = {step: 2 * value for step, value in found.items()}
        assert found == pytest.approx(expected, rel=1e-4), name
    # A mean over clips, each of which is about log 2 before the model can tell them apart.
    assert 0.3 < alone.losses("s1", "preference")[1] < 3


def test_a_global_batch_that_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path)
    job = train_whole(experiment, "s1", 1, global_batch=16)
    assert job.codes == [0]
    from experiments import train

    refused = train(make_experiment(tmp_path / "other"), "s1", 2, global_batch=15)
    assert refused.codes[0] == 1 and "take a multiple of 2" in refused.output


def test_nproc_starts_processes_and_says_where_the_weights_are(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, epochs=1)
    code, output = sovits("train", "s1", "--config", experiment.config("s1"), "--nproc", 2, "--device", "cpu")
    assert code == 0, output
    assert output.splitlines()[-1] == f"Weights: {experiment.weights_folder('s1') / 'voice-e1.ckpt'}"
    assert "with 2 processes on cpu" in output
    assert experiment.weights("s1") == ["voice-e1.ckpt"]
