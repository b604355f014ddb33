"""A tiny experiment folder, as upstream's preparation writes it."""

from pathlib import Path

import pytest
import soundfile
import torch
from s2_tiny import Prepare


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """Makes an experiment folder of clips that are 0.8, 0.9, ... s long."""

    def make(names: tuple[str, ...] = ("b.wav", "a.wav", "c.wav"), *, ssl_channels: int = 12, sv: int = 20) -> Path:
        for part in ("4-cnhubert", "5-wav32k", "7-sv_cn"):
            (tmp_path / part).mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(0)
        lines = []
        for index, name in enumerate(names):
            samples = 25600 + 3200 * index
            wave = torch.randn(samples, generator=generator) * 0.1
            soundfile.write(tmp_path / "5-wav32k" / name, wave.numpy(), 32000, subtype="PCM_16", format="WAV")
            frames = (samples // 2 - 400) // 320 + 1
            torch.save(torch.randn(1, ssl_channels, frames, generator=generator), tmp_path / f"4-cnhubert/{name}.pt")
            torch.save(torch.randn(1, sv, generator=generator), tmp_path / f"7-sv_cn/{name}.pt")
            lines.append(f"{name}\tHH AH0 L OW1 .\tNone\thello.\n")
        (tmp_path / "2-name2text.txt").write_text("".join(lines), encoding="utf-8")
        return tmp_path

    return make
