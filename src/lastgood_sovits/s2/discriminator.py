"""The discriminators of HiFi-GAN (Kong et al., 2020): one on the wave as it is, and one for each of several periods."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lastgood_sovits.s2.convolution import Conv1d, Conv2d
from lastgood_sovits.s2.vocoder import LEAK

Judgement = tuple[Tensor, list[Tensor]]
"""Scores (batch, n) of one discriminator, and its feature maps, the last of which is the scores again."""


class WaveDiscriminator(nn.Module):
    """Judges the wave with strided, grouped convolutions of growing width up to `channels`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        a, b, c, d = channels // 64, channels // 16, channels // 4, channels
        self.convs = nn.ModuleList([Conv1d(1, a, 15, padding=7)])
        for narrow, wide in ((a, b), (b, c), (c, d), (d, d)):
            groups = max(narrow // 4, 1)
            self.convs.append(Conv1d(narrow, wide, 41, stride=4, groups=groups, padding=20))
        self.convs.append(Conv1d(d, d, 5, padding=2))
        self.conv_post = Conv1d(d, 1, 3, padding=1)

    def forward(self, wave: Tensor) -> Judgement:
        return _judge(wave, self.convs, self.conv_post)


class PeriodDiscriminator(nn.Module):
    """Judges every `period`-th sample together, with convolutions along time of growing width up to `channels`."""

    KERNEL_SIZE, STRIDE = 5, 3

    def __init__(self, period: int, channels: int) -> None:
        super().__init__()
        self.period = period
        widths = [1, channels // 32, channels // 8, channels // 2, channels, channels]
        strides = [self.STRIDE] * 4 + [1]
        self.convs = nn.ModuleList(
            Conv2d(narrow, wide, (self.KERNEL_SIZE, 1), stride=(stride, 1), padding=(self.KERNEL_SIZE // 2, 0))
            for narrow, wide, stride in zip(widths, widths[1:], strides, strict=False)
        )
        self.conv_post = Conv2d(channels, 1, (3, 1), padding=(1, 0))

    def forward(self, wave: Tensor) -> Judgement:
        missing = -wave.shape[-1] % self.period
        if missing:
            # What F.pad(mode="reflect") gives; but the gradient of that has no fixed order of sums on CUDA.
            wave = torch.cat((wave, wave[..., -missing - 1 : -1].flip(-1)), dim=-1)
        return _judge(torch.unflatten(wave, -1, (-1, self.period)), self.convs, self.conv_post)


def _judge(x: Tensor, convs: nn.ModuleList, conv_post: nn.Module) -> Judgement:
    features = []
    for conv in convs:
        x = F.leaky_relu_(conv(x), LEAK)  # in place: the gradient of a convolution does not need what it returned
        features.append(x)
    scores = conv_post(x)
    features.append(scores)
    return scores.flatten(1), features


class Discriminator(nn.Module):
    """All discriminators together.

    Args:
        periods: one period discriminator for each. The published v1 and v2 have 2, 3, 5, 7, 11; the Pro versions
            also 17, 23.
        channels: width of the widest layers, a multiple of 64. The published ones have 1024.
    """

    def __init__(self, periods: Sequence[int], channels: int = 1024) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList([WaveDiscriminator(channels)])
        self.discriminators.extend(PeriodDiscriminator(period, channels) for period in periods)

    def forward(self, wave: Tensor) -> list[Judgement]:
        """Judges waves (batch, 1, n); real and generated ones may be stacked, since no layer mixes samples."""
        return [discriminator(wave) for discriminator in self.discriminators]


def split_judgements(judgements: Sequence[Judgement], first: int) -> tuple[list[Judgement], list[Judgement]]:
    """Separates the judgement of the first samples of a batch from that of the others."""
    head = [(scores[:first], [f[:first] for f in features]) for scores, features in judgements]
    tail = [(scores[first:], [f[first:] for f in features]) for scores, features in judgements]
    return head, tail
