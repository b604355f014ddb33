"""A synthetic experiment of a realistic number of clips, for the benchmarks of whole trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import soundfile
import torch


def make_experiment(folder: Path, clips: int, seed: int = 0) -> None:
    """Writes clips of 4 to 6 seconds of noise and random features of HuBERT's width, laid out as upstream does."""
    draw = torch.Generator().manual_seed(seed)
    for part in ("4-cnhubert", "5-wav32k"):
        (folder / part).mkdir(parents=True)
    lines = []
    for number in range(clips):
        name, frames = f"clip{number:04}.wav", int(torch.randint(201, 301, (), generator=draw))
        wave = torch.randn(frames * 640, generator=draw) * 0.1
        soundfile.write(folder / "5-wav32k" / name, wave.numpy(), 32000, subtype="PCM_16", format="WAV")
        torch.save(torch.randn(1, 768, frames, generator=draw), folder / "4-cnhubert" / f"{name}.pt")
        lines.append(f"{name}\t{' '.join(['HH', 'AH0', 'L', 'OW1'] * (frames // 20))}\tNone\thello\n")
    (folder / "2-name2text.txt").write_text("".join(lines), encoding="utf-8")


def write_config(folder: Path, run: Path, batch_size: int, model: dict[str, Any], train: dict[str, Any]) -> Path:
    """Writes a configuration of stage 2, whose logs and weights go to `run`."""
    values = {
        "train": {"epochs": 1, "batch_size": batch_size, "fp16_run": False, "save_every_epoch": 1, **train},
        "data": {"exp_dir": str(folder)},
        "model": {"version": "v2", **model},
        "s2_ckpt_dir": str(run),
        "save_weight_dir": str(run / "weights"),
        "name": "benchmark",
    }
    run.mkdir(parents=True, exist_ok=True)
    path = run / "s2.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path
