"""Convolutions with weight normalisation (Salimans and Kingma, 2016), under the names of the published weights.

`torch.nn.utils.weight_norm` has these names (`weight_g`, `weight_v`) but is deprecated and recomputes the weight in a
hook; `torch.nn.utils.parametrizations.weight_norm` has others. What is needed is one line of arithmetic, so here it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lastgood_sovits.s2 import minimal_filtering

Pair = tuple[int, int]


class WeightNorm(nn.Module):
    """A weight held as length (`weight_g`) and direction (`weight_v`) of its slices along the first dimension."""

    bias: nn.Parameter | None
    weight_g: nn.Parameter
    weight_v: nn.Parameter

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        # The order of registration is the order in the state dict: bias, g, v.
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
        length = torch.linalg.vector_norm(weight.detach().flatten(1), dim=1)
        self.weight_g = nn.Parameter(length.view(-1, *[1] * (weight.dim() - 1)))
        self.weight_v = nn.Parameter(weight.detach().clone())
        self._held: Tensor | None = None
        self._held_factors: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weight g * v / |v|, with the shape of `weight_v`."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0) if self._held is None else self._held

    def _filtered(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        factors = minimal_filtering.factors(self.weight) if self._held_factors is None else self._held_factors
        if self._held is not None:
            self._held_factors = factors
        return minimal_filtering.convolve(x, factors, self.bias)


@contextmanager
def frozen_weights(module: nn.Module) -> Iterator[None]:
    """Treats every parameter of `module` as a constant, and computes each normalised weight only once.

    For passes through a network that is not being trained, such as the discriminator while the generator learns:
    gradients still flow to the input, but none is computed for the parameters.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    normed = [part for part in module.modules() if isinstance(part, WeightNorm)]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for part in normed:
            part._held = part.weight
        yield
    finally:
        for part in normed:
            part._held = part._held_factors = None
        for parameter in trained:
            parameter.requires_grad_(True)


class Conv1d(WeightNorm):
    """Weight-normalised `nn.Conv1d`: (batch, in, n) to (batch, out, n')."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        plain = nn.Conv1d(in_channels, out_channels, kernel_size, groups=groups)
        super().__init__(plain.weight, plain.bias)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self._same = (stride, padding, dilation, groups) == (1, 2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self._same and minimal_filtering.fits(x, self.weight_v):
            return self._filtered(x)
        return F.conv1d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Conv2d(WeightNorm):
    """Weight-normalised `nn.Conv2d`: (batch, in, h, w) to (batch, out, h', w')."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Pair, *, stride: Pair = (1, 1), padding: Pair = (0, 0)
    ) -> None:
        plain = nn.Conv2d(in_channels, out_channels, kernel_size)
        super().__init__(plain.weight, plain.bias)
        self.stride, self.padding = stride, padding
        self._same = stride == (1, 1) and padding == (2, 0)

    def forward(self, x: Tensor) -> Tensor:
        if self._same and minimal_filtering.fits(x, self.weight_v):
            return self._filtered(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class ConvTranspose1d(WeightNorm):
    """Weight-normalised `nn.ConvTranspose1d`: (batch, in, n) to (batch, out, n')."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: int = 0
    ) -> None:
        plain = nn.ConvTranspose1d(in_channels, out_channels, kernel_size)
        super().__init__(plain.weight, plain.bias)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose1d(x, self.weight, self.bias, self.stride, self.padding)


def same_padding(kernel_size: int, dilation: int = 1) -> int:
    """Padding on each side with which a convolution of odd kernel size keeps the length."""
    return dilation * (kernel_size - 1) // 2
