"""What is known of certain programs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Preset:
    """The options that fit a program."""

    complete: tuple[str, ...]
    """Patterns for --complete."""
    says: str
    """What it does, for the doctor."""


PRESETS = {
    "gpt-sovits": Preset(
        ("G_*.pth,D_*.pth",), "G_*.pth and D_*.pth are one checkpoint: after a crash both are of the same step"
    ),
    "hf": Preset(("checkpoint-*",), "checkpoint-* directories that were not finished are set aside"),
    "lightning": Preset(("*.ckpt",), "sharded *.ckpt directories that were not finished are set aside"),
}

DEFECTS = (
    ("GPT_SoVITS/s2_train.py", "except:", "a damaged G or D file is not reported: it begins at epoch 1 again"),
    ("GPT_SoVITS/utils.py", "shutil.move", "saves go through <time>.pth in the working directory: a crash leaves it"
     " there, and across file systems half a file under the name of the only one"),
    ("GPT_SoVITS/process_ckpt.py", "shutil.move", "exported weights go through <time>.pth in the working directory"),
    ("GPT_SoVITS/process_ckpt.py", 'open(path, "wb")', "weights of v2Pro and LoRA models are written in place: a crash"
     " leaves half a file"),
    ("GPT_SoVITS/s1_train.py", "os.remove", "with if_save_latest, stage 1 deletes everything else in its checkpoint"
     " directory after a save"),
    ("GPT_SoVITS/s1_train.py", "LOCAL_RANK", "stage 1 takes the local rank for the global one: each node exports the"
     " weights, under one name"),
    ("GPT_SoVITS/AR/models/t2s_lightning_module.py", "save_hyperparameters", "with torch and Lightning 2.6 or newer,"
     " stage 1 cannot resume, since its checkpoints hold a path; TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 lets it"),
)  # fmt: skip


def recognise(command: list[str]) -> str | None:
    """The preset of a command, by the script that it runs; frameworks are recognised later, when they are imported."""
    if any(re.fullmatch(r"s[12]_train\w*\.py", os.path.basename(part)) for part in command):
        return "gpt-sovits"
    return None


def gpt_sovits_defects(command: list[str], directory: Path) -> list[str] | None:
    """The known saving defects of the GPT-SoVITS checkout that a command runs in; None where it runs in none."""
    candidates = [directory, *(parent for part in command for parent in (directory / part).resolve().parents)]
    for root in candidates:
        if (root / "GPT_SoVITS" / "s2_train.py").is_file():
            return [f"{name}: {says}" for name, text, says in DEFECTS if _contains(root / name, text)]
    return None


def _contains(path: Path, text: str) -> bool:
    try:
        return text in path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
