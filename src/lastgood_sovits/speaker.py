"""Speaker vectors (7-sv_cn) of the Pro versions: the network ERes2NetV2 (Chen et al., 2024) on log mel bands.

Only what makes these vectors is here. The last layers, which tell speakers apart, are in the published file and are
not used. Parameters have the names of that file (pretrained_eres2netv2w24s4ep4.ckpt of 3D-Speaker).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lastgood
from lastgood_sovits.errors import SovitsError

RATE = 16000
"""Samples per second that the network hears."""
BANDS = 80
_FRAME, _HOP, _FFT = 400, 160, 512
_LOWEST_HZ, _PREEMPHASIS = 20.0, 0.97
_SCALE, _EXPANSION, _REDUCTION, _WIDTH = 4, 4, 4, 24
_CEILING = 20.0
"""Where the ReLUs of the blocks end."""
_UNUSED = ("seg_1.", "seg_2.", "seg_bn_1.")


@lru_cache(maxsize=2)
def _filters(device: torch.device) -> Tensor:
    """Triangles (257, 80) on the mel scale 1127 ln(1 + Hz / 700), as Kaldi places them: not on whole bins."""
    with torch.inference_mode(False):
        hertz = torch.arange(_FFT // 2 + 1, dtype=torch.float64) * RATE / _FFT
        ends = torch.tensor([_LOWEST_HZ, RATE / 2], dtype=torch.float64)
        mel, (low, high) = (1127 * torch.log1p(x / 700) for x in (hertz, ends))
        corners = torch.linspace(float(low), float(high), BANDS + 2, dtype=torch.float64)
        left, centre, right = corners[:-2], corners[1:-1], corners[2:]
        rising = (mel[:, None] - left) / (centre - left)
        falling = (right - mel[:, None]) / (right - centre)
        return torch.minimum(rising, falling).clamp(min=0).float().to(device)


def log_mel_bands(wave: Tensor) -> Tensor:
    """Computes Kaldi's filter bank features, with its defaults and without dither.

    Args:
        wave: float32 (n,) at 16 kHz in -1 .. 1, at least 400 samples.

    Returns:
        Tensor (frames, 80), a frame every 10 ms of what fits whole.
    """
    frames = wave.unfold(0, _FRAME, _HOP)
    frames = frames - frames.mean(1, keepdim=True)
    before = torch.cat((frames[:, :1], frames[:, :-1]), dim=1)
    # Kaldi's own window ("povey"): Hann, symmetric, to the power of 0.85.
    window = torch.hann_window(_FRAME, periodic=False, device=wave.device).pow(0.85)
    power = torch.fft.rfft((frames - _PREEMPHASIS * before) * window, _FFT).abs().square()
    bands: Tensor = (power @ _filters(wave.device)).clamp(min=torch.finfo(torch.float32).eps).log()
    return bands


class _Fusion(nn.Module):
    """Weighs two maps (batch, channels, bands, frames) against each other, position by position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // _REDUCTION
        self.local_att = nn.Sequential(
            nn.Conv2d(2 * channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, channels, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weight: Tensor = torch.tanh(self.local_att(torch.cat((x, y), dim=1)))
        return x * (1 + weight) + y * (1 - weight)


class _Block(nn.Module):
    """A residual block whose channels pass one convolution after the other, in four parts."""

    def __init__(self, in_channels: int, planes: int, stride: int, *, fused: bool) -> None:
        super().__init__()
        width, out_channels = planes * _WIDTH // 64, planes * _EXPANSION
        self.width = width
        self.conv1 = nn.Conv2d(in_channels, width * _SCALE, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width * _SCALE)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(_SCALE))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(_SCALE))
        self.fuse_models = nn.ModuleList(_Fusion(width) for _ in range(_SCALE - 1 if fused else 0))
        self.conv3 = nn.Conv2d(width * _SCALE, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(_limited(self.bn1(self.conv1(x))), self.width, dim=1)
        done: list[Tensor] = []
        for index, (part, conv, norm) in enumerate(zip(parts, self.convs, self.bns, strict=True)):
            if done:
                part = self.fuse_models[index - 1](done[-1], part) if self.fuse_models else done[-1] + part
            done.append(_limited(norm(conv(part))))
        return _limited(self.bn3(self.conv3(torch.cat(done, dim=1))) + self.shortcut(x))


def _limited(x: Tensor) -> Tensor:
    return x.clamp(0, _CEILING)


class SpeakerNetwork(nn.Module):
    """ERes2NetV2 up to its last feature map.

    Args:
        channels: width of the first layers. The published network has 64, and vectors of 320 times that.
    """

    BLOCKS = (3, 4, 6, 3)

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        width = channels
        for number, count in enumerate(self.BLOCKS, start=1):
            planes, layer = channels * 2 ** (number - 1), nn.Sequential()
            for block in range(count):
                layer.append(_Block(width, planes, 2 if number > 1 and block == 0 else 1, fused=number > 2))
                width = planes * _EXPANSION
            self.add_module(f"layer{number}", layer)
        self.layer3_ds = nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False)
        self.fuse34 = _Fusion(width)

    def forward(self, bands: Tensor) -> Tensor:
        """Maps log mel bands (batch, frames, 80) to vectors (batch, 320 * channels)."""
        x = F.relu(self.bn1(self.conv1(bands.transpose(1, 2).unsqueeze(1))))
        for number in (1, 2, 3):
            x = self.get_submodule(f"layer{number}")(x)
        joined: Tensor = self.fuse34(self.get_submodule("layer4")(x), self.layer3_ds(x))
        return joined.flatten(1, 2).mean(-1)


class SpeakerVectors:
    """Computes speaker vectors with the weights in a file.

    Args:
        path: pretrained_eres2netv2w24s4ep4.ckpt, or another width of the same network.
        device: where it runs.

    Raises:
        SovitsError: the file is missing, damaged or of another network.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self._device = device
        try:
            found = lastgood.load(path)
        except (OSError, lastgood.LastGoodError) as error:
            raise SovitsError(f"the speaker network cannot be loaded from {path}: {error}") from error
        first = found.get("conv1.weight") if isinstance(found, dict) else None
        if not isinstance(first, Tensor) or first.dim() != 4:
            raise SovitsError(f"{path} has no weights of ERes2NetV2: give pretrained_eres2netv2w24s4ep4.ckpt")
        self._network = SpeakerNetwork(first.shape[0])
        try:
            self._network.load_state_dict({k: v for k, v in found.items() if not k.startswith(_UNUSED)})
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise SovitsError(f"the weights in {path} are not those of ERes2NetV2 (w24s4ep4): {reason}") from error
        self._network.eval().to(device)

    @torch.no_grad()
    def __call__(self, wave: Tensor) -> Tensor:
        """The vector (1, 320 * channels) of a wave (n,) at 16 kHz in -1 .. 1. Raises SovitsError for too short ones."""
        if len(wave) < _FRAME:
            raise SovitsError(f"it has {len(wave)} samples at 16 kHz, and the speaker network needs {_FRAME}")
        vector: Tensor = self._network(log_mel_bands(wave.to(self._device)).unsqueeze(0)).cpu()
        if not torch.isfinite(vector).all():
            raise SovitsError("its speaker vector is not finite")
        return vector
