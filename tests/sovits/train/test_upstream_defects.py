"""What upstream's trainer gets wrong in saving, resuming and distribution, and this one must not.

The numbers are those of docs/sovits.md, "What upstream does otherwise".
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from experiments import Experiment, assert_equal, make_experiment, train, train_whole

import lastgood
from lastgood_sovits.s2.config import read_config
from lastgood_sovits.s2.optimization import learning_rate
from lastgood_sovits.train import stage1, stage2
from lastgood_sovits.train.export import export
from lastgood_sovits.weights import read_weights
from lastgood_sovits.weights_format import upstream_mark


def _short(experiment: Experiment, epochs: int = 1) -> Experiment:
    """Four steps an epoch."""
    for values in (experiment.s1, experiment.s2):
        values["train"]["batch_size"] = 24
        values["train"]["epochs"] = epochs
    return experiment


@pytest.fixture
def short(experiment: Experiment) -> Experiment:
    return _short(experiment)


def _grow() -> None:
    """Makes one weight of stage 1 too large for half precision at the end."""
    original = stage1.Stage1.finish

    def finish(self: stage1.Stage1) -> None:
        original(self)
        with torch.no_grad():
            next(p for n, p in self.model.named_parameters() if n.endswith("bert_proj.bias"))[0] = 1e6

    stage1.Stage1.finish = finish  # type: ignore[method-assign]


def _spoil() -> None:
    """Makes the first batch of every epoch of stage 2 NaN."""
    original = stage2.Stage2.train

    def train_step(self: stage2.Stage2, batch: stage2.Drawn) -> stage2.StepResult:
        if self.sampler.position == 0:
            batch.batch.wave.fill_(float("nan"))
        return original(self, batch)

    stage2.Stage2.train = train_step  # type: ignore[method-assign]


def _note(folder: Path) -> None:
    """Stores what each rank of stage 2 has at the end."""
    original = stage2.Stage2.finish

    def finish(self: stage2.Stage2) -> None:
        original(self)
        state = {k: v for k, v in self.generator.state_dict().items() if "num_batches" not in k}
        torch.save(state, folder / f"rank{self.ranks.rank}.pt")

    stage2.Stage2.finish = finish  # type: ignore[method-assign]


def test_01_stage_1_resumes_with_more_epochs(short: Experiment) -> None:
    train_whole(short, "s1")
    short.s1["train"]["epochs"] = 2
    job = train_whole(short, "s1")
    assert "restored step 4" in job.output and short.weights("s1") == ["voice-e1.ckpt", "voice-e2.ckpt"]


def test_02_a_damaged_checkpoint_is_reported_and_the_one_before_it_is_used(short: Experiment) -> None:
    train(short, "s2", die=4, save_every=1)
    steps = short.steps("s2")
    newest = next(iter(short.run("s2").glob(f"step-{steps[-1]:08d}*/*.safetensors")))
    data = bytearray(newest.read_bytes())
    data[-100] ^= 255
    newest.write_bytes(data)
    job = train_whole(short, "s2")
    assert f"restored step {steps[-2]}" in job.output and newest.parent.name in job.output


def test_02_where_no_checkpoint_is_whole_nothing_starts_anew(short: Experiment) -> None:
    train_whole(short, "s2")
    for shard in short.run("s2").glob("step-*/*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1000])
    before = {name: (short.weights_folder("s2") / name).read_bytes() for name in short.weights("s2")}
    job = train(short, "s2")
    assert job.codes == [1] and "Error: " in job.output and "epoch 1, step 1" not in job.output.split("Error")[0]
    assert {name: (short.weights_folder("s2") / name).read_bytes() for name in short.weights("s2")} == before


@pytest.mark.parametrize("lost", ["G", "D"])
def test_03_06_half_a_pair_of_upstreams_is_refused_whole(short: Experiment, lost: str, tmp_path: Path) -> None:
    train_whole(short, "s2")
    pair = tmp_path / "pair"
    export("s2", short.config("s2"), step=None, upstream=pair)
    file = next(pair.glob(f"{lost}_*.pth"))
    file.write_bytes(file.read_bytes()[:-1000])
    other = _short(make_experiment(tmp_path / "other"), epochs=2)
    job = train(other, "s2", import_from=pair)
    assert job.codes == [1] and file.name in job.output and not other.steps("s2")


def test_04_pretrained_weights_of_another_shape_are_refused_by_name(short: Experiment) -> None:
    train_whole(short, "s2")
    short.s2["train"]["pretrained_s2G"] = str(short.weights_folder("s2") / short.weights("s2")[0])
    short.s2["model"]["inter_channels"] = 16
    shutil.rmtree(short.logs("s2"))
    job = train(short, "s2")
    assert job.codes == [1] and "does not fit the configured model" in job.output and "Nothing was loaded" in job.output


def test_08_the_learning_rate_decays_once_also_after_resumes(experiment: Experiment) -> None:
    _short(experiment, epochs=3)
    for die in (3, 7):
        train(experiment, "s2", die=die, save_every=1)
    train_whole(experiment, "s2")
    rates = experiment.losses("s2", "learning_rate")
    config = read_config(experiment.config("s2")).train
    assert {step: rates[step] for step in (1, 4, 5, 8, 9, 12)} == pytest.approx(
        {step: learning_rate(config, (step + 3) // 4) for step in (1, 4, 5, 8, 9, 12)}, rel=1e-6
    )


def test_09_the_last_epoch_is_written_although_it_is_no_multiple(experiment: Experiment) -> None:
    _short(experiment, epochs=3)
    experiment.s1["train"]["save_every_n_epoch"] = 2
    train_whole(experiment, "s1")
    assert experiment.weights("s1") == ["voice-e2.ckpt", "voice-e3.ckpt"]
    assert experiment.steps("s1")[-1] == 12


def test_10_foreign_files_in_the_folders_stay(short: Experiment) -> None:
    notes = [short.logs("s1") / "ckpt" / "users_notes.txt", short.run("s1") / "users_notes.txt"]
    for path in notes:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    train_whole(short, "s1")
    assert [path.read_text() for path in notes] == ["mine", "mine"]


def _fill_the_disk() -> None:
    """Makes the disk full when half a weights file is written."""
    original = lastgood.replace_file

    def replace(path: Path, write: Callable[[BinaryIO], None], **options: Any) -> None:
        def half(file: BinaryIO) -> None:
            file.write(b"half a file")
            file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

        original(path, half if path.suffix == ".ckpt" else write, **options)

    lastgood.replace_file = replace


@pytest.mark.parametrize("obstacle", ["a folder", "a full disk"])
def test_11_12_a_file_that_cannot_be_written_makes_the_exit_code_1_and_leaves_nothing(
    short: Experiment, obstacle: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    folder = short.weights_folder("s1")
    target = folder / "voice-e1.ckpt"
    if obstacle == "a folder":
        target.mkdir(parents=True)
    job = train(short, "s1", before=_fill_the_disk if obstacle == "a full disk" else None)
    assert job.codes == [1] and f"Not written: {target}" in job.output
    assert list(folder.iterdir()) == ([target] if obstacle == "a folder" else [])
    assert short.steps("s1")[-1] == 4  # the training itself is not lost
    if obstacle == "a folder":
        target.rmdir()
    again = train_whole(short, "s1")  # and the file is written when the same command is given again
    assert again.output.rstrip().splitlines()[-1] == f"Weights: {target}" and list(folder.iterdir()) == [target]
    assert list(elsewhere.iterdir()) == []


def test_16_an_overflow_of_half_precision_is_reported_by_name_and_not_written(short: Experiment) -> None:
    job = train(short, "s1", before=_grow)
    assert job.codes == [1] and "model.bert_proj.bias" in job.output and short.weights("s1") == []


def test_16_fine_tuning_from_an_export_says_that_the_posterior_encoder_is_new(short: Experiment) -> None:
    train_whole(short, "s2")
    short.s2["train"]["pretrained_s2G"] = str(short.weights_folder("s2") / short.weights("s2")[0])
    shutil.rmtree(short.logs("s2"))
    assert "has no enc_q.*" in train_whole(short, "s2").output


def test_17_exported_weights_load_without_running_anything(short: Experiment) -> None:
    train_whole(short, "s1")
    path = short.weights_folder("s1") / "voice-e1.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["info"] == "GPT-e1" and content["config"] == short.s1
    assert {tensor.dtype for tensor in content["weight"].values()} == {torch.float16}


@pytest.mark.parametrize(
    ("stage", "key"), [("s1", "pretrained_s1"), ("s2", "pretrained_s2G"), ("s2", "pretrained_s2D")]
)
def test_18_a_pretrained_file_that_is_missing_is_an_error(short: Experiment, stage: str, key: str) -> None:
    values = short.s1 if stage == "s1" else short.s2["train"]
    values[key] = str(short.root / "missing.pth")
    job = train(short, stage)
    assert job.codes == [1] and key in job.output and "missing.pth" in job.output and not short.steps(stage)


def test_19_a_loss_that_is_not_finite_is_reported_with_its_clips(short: Experiment) -> None:
    job = train_whole(short, "s2", before=_spoil)
    assert re.search(r"did not learn from this batch.*clip\d\.wav", job.output)


def test_20_every_rank_has_the_same_order_whatever_the_hash_seed(short: Experiment) -> None:
    program = (
        "import sys, torch; from pathlib import Path\n"
        "from lastgood_sovits.train.program import make\n"
        "from lastgood_sovits.train.options import Options\n"
        "from lastgood_sovits.train.ranks import Ranks\n"
        "trainer = make('s2', Path(sys.argv[1]), Ranks(0, 1, torch.device('cpu')), Options())\n"
        "trainer.prepare()\n"
        "print([trainer.dataset.names[i] for i in trainer.sampler.order])\n"
    )
    orders = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-c", program, str(short.config("s2"))]
        orders.append(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert orders[0] == orders[1] and "clip" in orders[0]


def test_21_22_from_scratch_on_two_processes_without_cuda_both_have_the_same_weights(short: Experiment) -> None:
    short.s2["train"]["batch_size"] = 12
    short.s2["model"]["freeze_quantizer"] = False

    train_whole(short, "s2", 2, before=partial(_note, short.root))
    first, second = (torch.load(short.root / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert_equal(first, second)


def test_a_broken_clip_is_named_and_left_out(short: Experiment) -> None:
    (short.folder / "4-cnhubert" / "clip3.wav.pt").write_bytes(b"broken")
    job = train_whole(short, "s2")
    assert "clip clip3.wav is left out" in job.output and "7 clips are used" in job.output


@pytest.mark.parametrize("missing", ["2-name2text.txt", "4-cnhubert", "5-wav32k"])
def test_a_missing_part_of_the_experiment_is_named_with_the_step_that_makes_it(short: Experiment, missing: str) -> None:
    path = short.folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    job = train(short, "s2")
    assert job.codes == [1] and missing in job.output and "data preparation" in job.output


@pytest.mark.parametrize("version", ["v3", "v4"])
def test_v3_and_v4_are_refused_with_a_sentence(short: Experiment, version: str) -> None:
    short.s2["model"]["version"] = version
    job = train(short, "s2")
    assert job.codes == [1] and "models that can be trained here are v1, v2, v2Pro, v2ProPlus" in job.output


def test_upstream_tells_the_version_of_our_files_right(short: Experiment) -> None:
    train_whole(short, "s2")
    path = short.weights_folder("s2") / short.weights("s2")[0]
    assert path.name == "voice_e1_s4.pth"
    mark = upstream_mark(path.read_bytes()[:8192], path.stat().st_size)
    found = read_weights(path)
    assert mark is not None and mark.version == "v2" == found.version
    assert found.info == "1epoch_4iteration" and not any("enc_q" in name for name in found.tensors)


@pytest.mark.parametrize("stage", ["s1", "s2"])
def test_a_run_goes_to_upstream_and_comes_back(short: Experiment, stage: str, tmp_path: Path) -> None:
    train_whole(short, stage)
    folder = tmp_path / "upstream"
    files = export("s1" if stage == "s1" else "s2", short.config(stage), step=None, upstream=folder).files
    assert all(path.is_file() for path in files) and len(files) == (1 if stage == "s1" else 2)
    whole = short.tensors(stage, 4)
    other = _short(make_experiment(tmp_path / "other"), epochs=2)
    job = train(other, stage, die=5, save_every=1, import_from=folder)
    assert other.steps(stage)[0] == 4, job.output
    imported = other.tensors(stage, 4)
    same = [name for name in whole if name in imported and torch.equal(whole[name], imported[name])]
    networks = [name for name in whole if name.startswith(("model.", "generator.", "discriminator.", "optimizer"))]
    assert set(networks) <= set(same)
    folder.rename(tmp_path / "another")
    refused = train(other, stage, import_from=tmp_path / "another")
    assert refused.codes == [1] and "already has checkpoints" in refused.output
    (tmp_path / "another").rename(folder)
    # The same command, as after a stop, goes on.
    job = train_whole(other, stage, import_from=folder)
    assert "was imported before" in job.output and other.steps(stage)[-1] == 8
