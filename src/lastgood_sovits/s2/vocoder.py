"""The waveform generator of HiFi-GAN (Kong et al., 2020), conditioned on the voice."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lastgood_sovits.s2.convolution import Conv1d, ConvTranspose1d, same_padding

LEAK = 0.1
"""Slope of every leaky ReLU in the generator but the last, which has torch's default of 0.01."""


class ResBlock1(nn.Module):
    """For every dilation: a dilated and a plain convolution around which the input is added."""

    def __init__(self, channels: int, kernel_size: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            Conv1d(channels, channels, kernel_size, dilation=d, padding=same_padding(kernel_size, d)) for d in dilations
        )
        self.convs2 = nn.ModuleList(
            Conv1d(channels, channels, kernel_size, padding=same_padding(kernel_size)) for _ in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            x = plain(F.leaky_relu_(dilated(F.leaky_relu(x, LEAK)), LEAK)).add_(x)
        return x


class ResBlock2(nn.Module):
    """The smaller variant: one dilated convolution for every dilation."""

    def __init__(self, channels: int, kernel_size: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            Conv1d(channels, channels, kernel_size, dilation=d, padding=same_padding(kernel_size, d)) for d in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        for dilated in self.convs:
            x = dilated(F.leaky_relu(x, LEAK)).add_(x)
        return x


class Generator(nn.Module):
    """Upsamples latents (batch, channels, frames) to waves (batch, 1, frames * product of the rates) in -1 .. 1."""

    def __init__(
        self,
        channels: int,
        resblock: str,
        resblock_kernel_sizes: Sequence[int],
        resblock_dilation_sizes: Sequence[Sequence[int]],
        upsample_rates: Sequence[int],
        upsample_initial_channel: int,
        upsample_kernel_sizes: Sequence[int],
        gin_channels: int,
    ) -> None:
        super().__init__()
        self.n_kernels = len(resblock_kernel_sizes)
        self.conv_pre = nn.Conv1d(channels, upsample_initial_channel, 7, padding=3)
        widths = [upsample_initial_channel // 2**i for i in range(len(upsample_rates) + 1)]
        self.ups = nn.ModuleList(
            ConvTranspose1d(wide, narrow, kernel, stride=rate, padding=(kernel - rate) // 2)
            for wide, narrow, rate, kernel in zip(
                widths, widths[1:], upsample_rates, upsample_kernel_sizes, strict=False
            )
        )
        block = ResBlock1 if resblock == "1" else ResBlock2
        self.resblocks = nn.ModuleList(
            block(width, kernel, dilations)
            for width in widths[1:]
            for kernel, dilations in zip(resblock_kernel_sizes, resblock_dilation_sizes, strict=True)
        )
        self.conv_post = nn.Conv1d(widths[-1], 1, 7, padding=3, bias=False)
        self.cond = nn.Conv1d(gin_channels, upsample_initial_channel, 1)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        # In place wherever no gradient needs what was there before: these tensors are the largest of a step.
        x = self.conv_pre(x).add_(self.cond(g))
        for stage, up in enumerate(self.ups):
            x = up(F.leaky_relu_(x, LEAK))
            blocks = self.resblocks[stage * self.n_kernels : (stage + 1) * self.n_kernels]
            total = blocks[0](x)
            for block in blocks[1:]:
                total.add_(block(x))
            x = total.div_(self.n_kernels)
        return torch.tanh(self.conv_post(F.leaky_relu_(x)))
