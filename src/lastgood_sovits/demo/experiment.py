"""A prepared experiment of real speech, with small models and stand-ins for the features of HuBERT.

Sound, text and phonemes are real. The features are not HuBERT's, whose weights are 380 MB: they are mel spectrograms
under a fixed random projection, so that the quantizer and everything behind it has something to do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile  # type: ignore[import-untyped]
import soxr  # type: ignore[import-not-found, import-untyped, unused-ignore]
import torch
import yaml
from torch import Tensor

from lastgood_sovits.audio import mel_from_spectrogram, spectrogram
from lastgood_sovits.demo.speech import phonemes, speech

RATE = 32000
FEATURES = 64
"""Width of the stand-in features; HuBERT's is 768."""
STAND_IN = "4-cnhubert/THESE-ARE-STAND-INS.txt"


@dataclass(frozen=True)
class Experiment:
    """Where the demo's data are."""

    root: Path
    source: str
    """Where the speech is from."""
    clips: int
    seconds: float

    @property
    def folder(self) -> Path:
        return self.root / "voice"


def build(root: Path, clips: int = 16) -> Experiment:
    """Makes the experiment folder ``root/voice`` as upstream's preparation does. Raises SovitsError without speech."""
    source, spoken = speech(clips)
    folder = root / "voice"
    for part in ("4-cnhubert", "5-wav32k"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    lines, seconds = [], 0.0
    for sentence in spoken:
        wave = torch.from_numpy(soxr.resample(sentence.wave.numpy(), sentence.rate, RATE).copy())
        wave = wave / wave.abs().max().clamp(min=1e-4) * 0.7
        soundfile.write(folder / "5-wav32k" / sentence.name, wave.numpy(), RATE, subtype="PCM_16", format="WAV")
        torch.save(stand_in_features(wave), folder / "4-cnhubert" / f"{sentence.name}.pt")
        lines.append(f"{sentence.name}\t{' '.join(phonemes(sentence.text) or [])}\tNone\t{sentence.text}\n")
        seconds += len(wave) / RATE
    (folder / "2-name2text.txt").write_text("".join(lines), encoding="utf-8")
    (folder / STAND_IN).write_text(
        "The features beside this file are mel spectrograms under a random projection, not HuBERT's.\n"
    )
    return Experiment(root, source, len(spoken), seconds)


def stand_in_features(wave: Tensor) -> Tensor:
    """(1, 64, frames) at 50 Hz, with as many frames as HuBERT has for a wave (n,) at 32 kHz."""
    mel = mel_from_spectrogram(spectrogram(wave.unsqueeze(0), 2048, 640, 2048), RATE, 2048, 80)[0]
    projection = torch.randn(FEATURES, 80, generator=torch.Generator().manual_seed(7)) / 80**0.5
    frames = (len(wave) // 2 - 400) // 320 + 1
    features: Tensor = (projection @ (mel + 5.0))[:, :frames].unsqueeze(0) / 3
    return features


def s2_config(experiment: Experiment, run: str, epochs: int, nproc: int) -> Path:
    """Writes the configuration of a small stage 2, whose logs go to ``root/run``."""
    model = {
        "version": "v2",
        "inter_channels": 32,
        "hidden_channels": 32,
        "filter_channels": 64,
        "n_heads": 2,
        "n_layers": 2,
        "kernel_size": 3,
        "p_dropout": 0.1,
        "resblock": "1",
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
        "upsample_rates": [10, 8, 2, 2, 2],
        "upsample_initial_channel": 64,
        "upsample_kernel_sizes": [16, 16, 8, 2, 2],
        "gin_channels": 32,
        "semantic_frame_rate": "25hz",
        "freeze_quantizer": True,
        "ssl_channels": FEATURES,
        "codebook_size": 128,
        "mrte_channels": 32,
        "style_channels": 32,
        "posterior_layers": 4,
        "flow_couplings": 2,
        "flow_layers": 2,
        "discriminator_channels": 64,
        "discriminator_periods": [2, 3],
    }
    values = {
        "train": {
            "epochs": epochs,
            "batch_size": max(1, 16 // nproc),
            "fp16_run": False,
            "segment_size": 6400,
            "log_interval": 3,
            "save_every_epoch": epochs,
            "pretrained_s2G": "",
            "pretrained_s2D": "",
        },
        "data": {"exp_dir": str(experiment.folder), "n_mel_channels": 80},
        "model": model,
        "s2_ckpt_dir": str(experiment.root / run),
        "save_weight_dir": str(experiment.root / run / "SoVITS_weights_v2"),
        "name": "demo",
    }
    return _write(experiment.root / f"{run}-s2.json", json.dumps(values, indent=2))


def s1_config(experiment: Experiment, run: str, epochs: int, nproc: int) -> Path:
    """Writes the configuration of a small stage 1, whose logs go to ``root/run``."""
    values: dict[str, Any] = {
        "train": {
            "epochs": epochs,
            "batch_size": max(1, 16 // nproc),
            "save_every_n_epoch": epochs,
            "precision": "32",
            "half_weights_save_dir": str(experiment.root / run / "GPT_weights_v2"),
            "exp_name": "demo",
        },
        "data": {"max_sec": 54, "num_workers": 0},
        "model": {"embedding_dim": 64, "hidden_dim": 64, "head": 4, "n_layer": 3},
        "train_semantic_path": str(experiment.folder / "6-name2semantic.tsv"),
        "train_phoneme_path": str(experiment.folder / "2-name2text.txt"),
        "output_dir": str(experiment.root / run / "logs_s1_v2"),
    }
    return _write(experiment.root / f"{run}-s1.yaml", yaml.safe_dump(values))


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
