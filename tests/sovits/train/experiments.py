"""Small experiments as upstream's preparation leaves them, and the programs that train on them."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile
import torch
import yaml
from safetensors.torch import load_file

from lastgood import Checkpointer, LastGoodError
from lastgood_sovits.errors import SovitsError
from lastgood_sovits.train import program
from lastgood_sovits.train.options import Options
from lastgood_sovits.train.trainer import Trainer

CLIPS = 8
TINY_S2: dict[str, Any] = {
    "inter_channels": 8,
    "hidden_channels": 8,
    "filter_channels": 16,
    "n_heads": 2,
    "n_layers": 2,
    "kernel_size": 3,
    "p_dropout": 0.1,
    "resblock": "1",
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
    "upsample_rates": [10, 8, 2, 2, 2],
    "upsample_initial_channel": 32,
    "upsample_kernel_sizes": [16, 16, 8, 2, 2],
    "gin_channels": 16,
    "semantic_frame_rate": "25hz",
    "freeze_quantizer": True,
    "ssl_channels": 12,
    "codebook_size": 16,
    "mrte_channels": 16,
    "style_channels": 8,
    "posterior_layers": 2,
    "flow_couplings": 2,
    "flow_layers": 1,
    "sv_channels": 20,
    "discriminator_channels": 64,
    "discriminator_periods": [2, 3],
}


@dataclass
class Experiment:
    """An experiment folder with both configuration files beside it."""

    root: Path
    s1: dict[str, Any] = field(default_factory=dict)
    s2: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.root / "voice"

    def config(self, stage: str) -> Path:
        """The configuration file, written anew with the present values."""
        path = self.root / ("tmp_s1.yaml" if stage == "s1" else "tmp_s2.json")
        path.write_text(yaml.safe_dump(self.s1) if stage == "s1" else json.dumps(self.s2), encoding="utf-8")
        return path

    def logs(self, stage: str) -> Path:
        return self.folder / f"logs_{stage}_{'v2' if stage == 's1' else self.s2['model']['version']}"

    def run(self, stage: str) -> Path:
        return self.logs(stage) / "lastgood"

    def weights(self, stage: str) -> list[str]:
        folder = self.root / ("GPT_weights_v2" if stage == "s1" else "SoVITS_weights_v2")
        return sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []

    def weights_folder(self, stage: str) -> Path:
        return self.root / ("GPT_weights_v2" if stage == "s1" else "SoVITS_weights_v2")

    def steps(self, stage: str) -> list[int]:
        """The steps of the checkpoints that are whole."""
        found = self.run(stage).glob("step-*/manifest.json")
        return sorted({int(path.parent.name[5:13]) for path in found})

    def tensors(self, stage: str, step: int) -> dict[str, torch.Tensor]:
        """All tensors of a checkpoint, read with the safetensors library."""
        folder = sorted(self.run(stage).glob(f"step-{step:08d}*"))[-1]
        tensors: dict[str, torch.Tensor] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(shard)
        return tensors

    def losses(self, stage: str, name: str | None = None) -> dict[int, float]:
        """A loss of every step that the log file names."""
        name = name or ("loss" if stage == "s1" else "generator")
        log = (self.logs(stage) / "train.log").read_text(encoding="utf-8")
        found = re.findall(rf"step (\d+): .*?\b{name} ([-+.e\d]+)", log)
        return {int(step): float(value) for step, value in found}


def make_experiment(root: Path, *, clips: int = CLIPS, epochs: int = 2) -> Experiment:
    """Clips of noise with features and codes of noise."""
    experiment = Experiment(root)
    folder = experiment.folder
    for part in ("3-bert", "4-cnhubert", "5-wav32k"):
        (folder / part).mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    lines, codes = [], ["item_name\tsemantic_audio"]
    for index in range(clips):
        name, samples = f"clip{index}.wav", 25600 + 1280 * index
        wave = torch.randn(samples, generator=generator) * 0.1
        soundfile.write(folder / "5-wav32k" / name, wave.numpy(), 32000, subtype="PCM_16", format="WAV")
        frames = (samples // 2 - 400) // 320 + 1
        torch.save(torch.randn(1, 12, frames, generator=generator), folder / f"4-cnhubert/{name}.pt")
        lines.append(f"{name}\tHH AH0 L OW1 .\tNone\thello.")
        drawn = torch.randint(0, 1024, (frames // 2,), generator=generator).tolist()
        codes.append(f"{name}\t{' '.join(map(str, drawn))}")
    (folder / "2-name2text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "6-name2semantic.tsv").write_text("\n".join(codes) + "\n", encoding="utf-8")
    experiment.s1 = {
        "train": {
            "seed": 1234,
            "epochs": epochs,
            "batch_size": 16,
            "gradient_clip": 1.0,
            "save_every_n_epoch": 1,
            "precision": "32",
            "if_save_every_weights": True,
            "if_save_latest": True,
            "if_dpo": False,
            "half_weights_save_dir": str(root / "GPT_weights_v2"),
            "exp_name": "voice",
        },
        "optimizer": {"lr": 0.01, "lr_init": 1e-5, "lr_end": 1e-4, "warmup_steps": 2000, "decay_steps": 40000},
        "data": {"max_eval_sample": 8, "max_sec": 54, "num_workers": 4, "pad_val": 1024},
        "model": {
            "vocab_size": 1025,
            "phoneme_vocab_size": 732,
            "embedding_dim": 16,
            "hidden_dim": 16,
            "head": 2,
            "linear_units": 64,
            "n_layer": 2,
            "dropout": 0,
            "EOS": 1024,
            "random_bert": 0,
        },
        "inference": {"top_k": 15},
        "pretrained_s1": "",
        "train_semantic_path": str(folder / "6-name2semantic.tsv"),
        "train_phoneme_path": str(folder / "2-name2text.txt"),
        "output_dir": str(folder / "logs_s1_v2"),
    }
    experiment.s2 = {
        "train": {
            "log_interval": 1,
            "eval_interval": 500,
            "seed": 1234,
            "epochs": epochs,
            "learning_rate": 1e-4,
            "betas": [0.8, 0.99],
            "eps": 1e-9,
            "batch_size": 16,
            "fp16_run": False,
            "lr_decay": 0.9,
            "segment_size": 1280,
            "init_lr_ratio": 1,
            "warmup_epochs": 0,
            "c_mel": 45,
            "c_kl": 1.0,
            "text_low_lr_rate": 0.4,
            "pretrained_s2G": "",
            "pretrained_s2D": "",
            "if_save_latest": True,
            "if_save_every_weights": True,
            "save_every_epoch": 1,
            "gpu_numbers": "0",
            "grad_ckpt": False,
            "lora_rank": "32",
        },
        "data": {
            "max_wav_value": 32768.0,
            "sampling_rate": 32000,
            "filter_length": 2048,
            "hop_length": 640,
            "win_length": 2048,
            "n_mel_channels": 16,
            "mel_fmin": 0.0,
            "mel_fmax": None,
            "add_blank": True,
            "n_speakers": 300,
            "cleaned_text": True,
            "exp_dir": str(folder),
        },
        "model": {"version": "v2", **TINY_S2},
        "s2_ckpt_dir": str(folder),
        "content_module": "cnhubert",
        "save_weight_dir": str(root / "SoVITS_weights_v2"),
        "name": "voice",
        "version": "v2",
    }
    return experiment


@dataclass
class Job:
    """How a training in processes of its own ended."""

    codes: list[int]
    """Exit codes of the ranks; negative for a signal."""
    output: str
    """What they printed, rank 0's first."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(
    stage: str, config: Path, options: dict[str, Any], die: int | None, before: Callable[[], None] | None
) -> int:
    """One rank. With `die`, the process is killed with SIGKILL when that step is done and not yet saved."""
    if before is not None:
        before()
    if die is not None:
        done = Trainer._step

        def step(self: Trainer, batch: Any, number: int, total: int, ckpt: Checkpointer, *rest: Any) -> None:
            done(self, batch, number, total, ckpt, *rest)
            if number == die:
                ckpt.wait()  # what was saved before is on the disk
                os.kill(os.getpid(), signal.SIGKILL)

        Trainer._step = step  # type: ignore[method-assign]
    try:
        return program.train("s1" if stage == "s1" else "s2", config, Options(**{"device": "cpu", **options}))
    except (SovitsError, LastGoodError) as error:
        print(f"Error: {error}")
        return 1
    except SystemExit as error:
        return int(error.code or 0)


def _rank(
    rank: int,
    nproc: int,
    port: int,
    log: Path,
    stage: str,
    config: Path,
    options: dict[str, Any],
    die: int | None,
    before: Callable[[], None] | None,
) -> None:
    """One process; does not return."""
    code = 70
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        for log_name in ("lastgood", "lastgood_sovits", ""):
            logging.getLogger(log_name).handlers.clear()
        names = {"RANK": rank, "WORLD_SIZE": nproc, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": nproc}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        torch.set_num_threads(1)
        code = _child(stage, config, options, die, before)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train(
    experiment: Experiment,
    stage: str,
    nproc: int = 1,
    *,
    die: int | None = None,
    before: Callable[[], None] | None = None,
    stop_when: Callable[[], object] | None = None,
    **options: Any,
) -> Job:
    """Trains in `nproc` processes, which are forks of this one where that is possible: it has imported torch already.

    `die` is the step after which rank 0 is killed; the others are killed then. `before`, which pickle must
    know, is called in every process first. `stop_when` is asked until it holds; then every rank gets SIGTERM.
    """
    config, port = experiment.config(stage), _free_port()
    # Where torch sees CUDA, no fork of a process that has done a backward pass can do one.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    logs = [experiment.root / f"output-{rank}.txt" for rank in range(nproc)]
    jobs = [
        context.Process(
            target=_rank,
            args=(rank, nproc, port, logs[rank], stage, config, options, die if rank == 0 else None, before),
        )
        for rank in range(nproc)
    ]
    for job in jobs:
        job.start()
    deadline = time.monotonic() + 240
    stopped = False
    while any(job.is_alive() for job in jobs):
        if stop_when is not None and not stopped and stop_when():
            stopped = True
            for job in jobs:
                job.terminate()
        failed = any(job.exitcode not in (None, 0, 75) for job in jobs)
        if failed or time.monotonic() > deadline:
            for job in jobs:
                job.kill()
        time.sleep(0.01)
    for job in jobs:
        job.join()
    output = "\n".join(log.read_text() for log in logs)
    return Job([70 if job.exitcode is None else job.exitcode for job in jobs], output)


def train_whole(experiment: Experiment, stage: str, nproc: int = 1, **options: Any) -> Job:
    """Trains to the end, and insists that it got there."""
    job = train(experiment, stage, nproc, **options)
    assert job.codes == [0] * nproc, job.output
    return job


def sovits(*arguments: object, timeout: float = 280) -> tuple[int, str]:
    """Runs ``lastgood sovits ARGUMENTS`` as a program; gives its exit code and what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-m", "lastgood_sovits", *map(str, arguments)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=timeout
    )
    return done.returncode, done.stdout


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Every tensor equals the other's bit by bit."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def start(*arguments: object, log: Path) -> subprocess.Popen[bytes]:
    """Starts ``lastgood sovits ARGUMENTS`` as a program in a process group of its own; it prints into `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-m", "lastgood_sovits", *map(str, arguments)]
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def wait_for(process: subprocess.Popen[bytes], happened: Callable[[], bool], seconds: float = 120) -> None:
    """Waits until `happened`, for as long as the process lives."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)
