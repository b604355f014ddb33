"""What a training step works on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One clip of the data set, not padded."""

    name: str
    """Its name in 2-name2text.txt."""
    ssl: Tensor
    """HuBERT features (channels, frames), float32."""
    spec: Tensor
    """Linear spectrogram (bins, frames), float32."""
    wave: Tensor
    """Samples (n,), float32, in -1 .. 1."""
    text: Tensor
    """Phoneme ids (m,), int64."""
    sv: Tensor | None
    """Speaker vector (channels,), float32; Pro versions only."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Clips padded with zeros at the end, the longest first. frames is even, as the quantizer may join two."""

    names: tuple[str, ...]
    """Of the clips."""
    ssl: Tensor
    """HuBERT features (batch, channels, frames)."""
    spec: Tensor
    """Linear spectrograms (batch, bins, frames)."""
    lengths: Tensor
    """Valid frames (batch,), int64."""
    wave: Tensor
    """Samples (batch, 1, n)."""
    text: Tensor
    """Phoneme ids (batch, m), int64."""
    text_lengths: Tensor
    """Valid phonemes (batch,), int64."""
    sv: Tensor | None
    """Speaker vectors (batch, channels); Pro versions only."""

    def to(self, device: torch.device | str) -> "Batch":
        """Copies the tensors to a device, without waiting where the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by a `DataLoader` with `pin_memory=True`."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {key: change(value) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)


def collate(clips: list[Clip]) -> Batch:
    """Pads clips to the longest of them."""
    clips = sorted(clips, key=lambda clip: clip.spec.shape[1], reverse=True)
    frames = clips[0].spec.shape[1] // 2 * 2 + 2
    vectors = [clip.sv for clip in clips if clip.sv is not None]
    return Batch(
        names=tuple(clip.name for clip in clips),
        ssl=_padded([clip.ssl for clip in clips], frames),
        spec=_padded([clip.spec for clip in clips], frames),
        lengths=torch.tensor([clip.spec.shape[1] for clip in clips]),
        wave=_padded([clip.wave.unsqueeze(0) for clip in clips], max(len(clip.wave) for clip in clips)),
        text=_padded([clip.text for clip in clips], max(len(clip.text) for clip in clips)),
        text_lengths=torch.tensor([len(clip.text) for clip in clips]),
        sv=torch.stack(vectors) if vectors else None,
    )


def _padded(rows: list[Tensor], size: int) -> Tensor:
    out = rows[0].new_zeros(len(rows), *rows[0].shape[:-1], size)
    for target, row in zip(out, rows, strict=True):
        target[..., : row.shape[-1]] = row
    return out
