"""Killed at any step, a training goes on exactly: in one process or many, in both stages."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments import Experiment, assert_equal, make_experiment, train, train_whole

from lastgood_sovits.s1 import TrainStep
from lastgood_sovits.train import stage2
from lastgood_sovits.weights import read_weights

STAGES = ("s1", "s2")


_slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("nproc", "stage"),
    [(1, "s1"), (2, "s1"), (2, "s2"), *(pytest.param(n, s, marks=_slow) for n, s in ((1, "s2"), (4, "s1"), (4, "s2")))],
)
def test_killed_and_resumed_gives_the_weights_of_an_undisturbed_run(tmp_path: Path, stage: str, nproc: int) -> None:
    whole, cut = make_experiment(tmp_path / "whole"), make_experiment(tmp_path / "cut")
    for experiment in (whole, cut):
        experiment.s2["train"]["batch_size"] = experiment.s1["train"]["batch_size"] = 16 // nproc
    train_whole(whole, stage, nproc)
    # Step 2 of stage 1 lies within a window of four, step 9 within the second epoch.
    for die, saved in ((3, 2), (9, 8)):
        job = train(cut, stage, nproc, die=die, save_every=2)
        assert -9 in job.codes and cut.steps(stage)[-1] == saved, job.output
    train_whole(cut, stage, nproc, save_every=2)
    last = whole.steps(stage)[-1]
    assert cut.steps(stage)[-1] == last == 12
    assert_equal(cut.tensors(stage, last), whole.tensors(stage, last))
    assert cut.weights(stage) == whole.weights(stage) != []
    for name in cut.weights(stage):
        a, b = (read_weights(e.weights_folder(stage) / name).tensors for e in (cut, whole))
        assert_equal(a, b)


def test_three_ranks_sum_in_the_same_order_after_a_resume(tmp_path: Path) -> None:
    whole, cut = make_experiment(tmp_path / "whole"), make_experiment(tmp_path / "cut")
    for experiment in (whole, cut):
        experiment.s2["train"]["batch_size"] = 8
        experiment.s2["train"]["epochs"] = 1
    train_whole(whole, "s2", 3)
    assert -9 in train(cut, "s2", 3, die=2, save_every=1).codes
    train_whole(cut, "s2", 3)
    last = whole.steps("s2")[-1]
    assert_equal(cut.tensors("s2", last), whole.tensors("s2", last))


@pytest.mark.parametrize("stage", ["s1", pytest.param("s2", marks=_slow)])
def test_sigterm_saves_and_ends_with_75_and_the_next_run_goes_on(experiment: Experiment, stage: str) -> None:
    job = train(experiment, stage, 2, stop_when=lambda: _started(experiment, stage), log_every=1)
    assert job.codes == [75, 75], job.output
    stopped_at = experiment.steps(stage)[-1]
    assert stopped_at > 0
    job = train_whole(experiment, stage, 2)
    assert f"restored step {stopped_at}" in job.output
    assert job.output.count("Weights: ") == 1


def _started(experiment: Experiment, stage: str) -> bool:
    log = experiment.logs(stage) / "train.log"
    return log.is_file() and "step 1:" in log.read_text()


def test_a_stop_file_saves_and_ends_with_75(experiment: Experiment) -> None:
    asked: list[bool] = []

    def ask() -> bool:
        if not asked and _started(experiment, "s1"):
            (experiment.run("s1") / "stop").touch()
            asked.append(True)
        return False

    experiment.s1["train"]["epochs"] = 200
    job = train(experiment, "s1", stop_when=ask, log_every=1)
    assert job.codes == [75] and "the stop file" in job.output and experiment.steps("s1")


def test_a_lost_run_comes_back_from_its_mirror(experiment: Experiment, tmp_path: Path) -> None:
    experiment.s1["train"]["epochs"] = 1
    train_whole(experiment, "s1", mirror=tmp_path / "mirror")
    whole = experiment.tensors("s1", 6)
    shutil.rmtree(experiment.run("s1"))
    experiment.s1["train"]["epochs"] = 2
    job = train_whole(experiment, "s1", mirror=tmp_path / "mirror", save_every=1)
    assert "restored step 6" in job.output and whole and experiment.steps("s1")[-1] == 12


def test_one_mirror_takes_both_stages_of_several_voices(tmp_path: Path) -> None:
    first, second = make_experiment(tmp_path / "first", epochs=1), make_experiment(tmp_path / "second", epochs=1)
    (second.folder).rename(second.root / "other")
    for key, name in (("train_semantic_path", "6-name2semantic.tsv"), ("train_phoneme_path", "2-name2text.txt")):
        second.s1[key] = str(second.root / "other" / name)
    second.s1["output_dir"] = str(second.root / "other" / "logs_s1_v2")
    for experiment, stage in ((first, "s1"), (first, "s2"), (second, "s1")):
        experiment.s1["train"]["batch_size"] = experiment.s2["train"]["batch_size"] = 24
        # A run that found another's copies would go on from them, or fail.
        assert "restored step" not in train_whole(experiment, stage, mirror=tmp_path / "mirror").output
    runs = {path.parent.parent.relative_to(tmp_path / "mirror") for path in tmp_path.glob("mirror/**/manifest.json")}
    assert sorted(map(str, runs)) == ["other/logs_s1_v2", "voice/logs_s1_v2", "voice/logs_s2_v2"]


@pytest.mark.parametrize("stage", ["s1", pytest.param("s2", marks=_slow)])
def test_bfloat16_resumes_exactly_too(tmp_path: Path, stage: str) -> None:
    whole, cut = (make_experiment(tmp_path / name, epochs=1) for name in ("whole", "cut"))
    for experiment in (whole, cut):
        experiment.s2["train"]["batch_size"] = 32
    train_whole(whole, stage, precision="bf16")
    assert train(cut, stage, die=3, save_every=1, precision="bf16").codes == [-9]
    train_whole(cut, stage, precision="bf16")
    last = whole.steps(stage)[-1]
    assert_equal(cut.tensors(stage, last), whole.tensors(stage, last))


def _scale_losses() -> None:
    """Gives stage 1 a loss scale on the processor, as mixed precision has on CUDA. It is a power of two: exact."""
    original = TrainStep.__init__

    def init(self: TrainStep, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    TrainStep.__init__ = init  # type: ignore[method-assign]


@pytest.mark.parametrize("scaled_first", [True, False])
def test_an_open_window_goes_on_in_another_precision(tmp_path: Path, scaled_first: bool) -> None:
    whole, cut = (make_experiment(tmp_path / name, epochs=1) for name in ("whole", "cut"))
    train_whole(whole, "s1")
    first, second = (_scale_losses, None) if scaled_first else (None, _scale_losses)
    assert train(cut, "s1", die=3, save_every=2, before=first).codes == [-9]
    assert cut.steps("s1") == [2]  # within a window of four
    train_whole(cut, "s1", before=second)
    last = whole.steps("s1")[-1]
    ours, theirs = cut.tensors("s1", last), whole.tensors("s1", last)
    assert_equal(*({name: t for name, t in x.items() if name.startswith("model.")} for x in (ours, theirs)))


def _scale_losses_of_stage_2() -> None:
    """The same for stage 2; the scale doubles after every third step."""

    def scaler(device: str, enabled: bool) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device, init_scale=2048.0, growth_interval=3)

    stage2.GradScaler = scaler  # type: ignore[misc, assignment]


def test_a_loss_scale_of_stage_2_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, cut, plain = (make_experiment(tmp_path / name, epochs=1) for name in ("whole", "cut", "plain"))
    train_whole(whole, "s2", before=_scale_losses_of_stage_2)
    assert train(cut, "s2", die=5, save_every=4, before=_scale_losses_of_stage_2).codes == [-9]
    train_whole(cut, "s2", before=_scale_losses_of_stage_2)
    assert_equal(cut.tensors("s2", 6), whole.tensors("s2", 6))
    scales = whole.losses("s2", "loss_scale")
    assert cut.losses("s2", "loss_scale") == scales and scales[6] == 4 * scales[1] == 4 * 2048
    train_whole(plain, "s2")  # powers of two change no bit
    networks = ("generator.", "discriminator.")
    ours, theirs = (
        {name: t for name, t in x.tensors("s2", 6).items() if name.startswith(networks)} for x in (whole, plain)
    )
    assert_equal(ours, theirs)


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_without_cuda_is_refused_where_it_is_asked_for(experiment: Experiment, stage: str) -> None:
    job = train(experiment, stage, precision="fp16")
    assert job.codes == [1] and "--precision fp16 needs CUDA" in job.output and not experiment.steps(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_another_number_of_processes_goes_on_within_an_epoch(experiment: Experiment, stage: str) -> None:
    experiment.s1["train"]["batch_size"] = experiment.s2["train"]["batch_size"] = 8
    before, after = _Notes(experiment.root / "before.txt"), _Notes(experiment.root / "after.txt")
    assert -9 in train(experiment, stage, 2, die=4, save_every=3, before=before).codes
    assert experiment.steps(stage) == [3]
    train_whole(experiment, stage, 1, before=after)
    # Six steps of 16 clips make an epoch of 96; three are done by two processes, what is left by one of 8 clips.
    first = [name for epoch, position, name in before.seen() if position < 48]
    first += [name for epoch, _, name in after.seen() if epoch == 1]
    assert len(first) == 96 and {first.count(name) for name in set(first)} == {12}
    losses = experiment.losses(stage) if stage == "s2" else None
    assert losses is None or max(losses) == 3 + 6 + 12


class _Notes:
    """Writes down which clips are trained on, in every process."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def seen(self) -> list[tuple[int, int, str]]:
        """Epoch, position in it and name of each clip."""
        lines = [line.split("\t") for line in self._path.read_text().splitlines()]
        return [(int(epoch), int(position), name) for epoch, position, name in lines]

    def __call__(self) -> None:
        from lastgood_sovits.train.stage1 import Stage1
        from lastgood_sovits.train.stage2 import Stage2

        for stage in (Stage1, Stage2):
            original = stage.train

            def noted(self: object, batch: object, original: object = original) -> object:
                place = f"{self.epochs_done + 1}\t{self.sampler.position}"  # type: ignore[attr-defined]
                names = getattr(batch, "batch", batch).names  # type: ignore[attr-defined]
                with path.open("a") as file:
                    file.write("".join(f"{place}\t{name}\n" for name in names))
                return original(self, batch)  # type: ignore[operator]

            stage.train = noted  # type: ignore[method-assign, assignment]
        path = self._path
