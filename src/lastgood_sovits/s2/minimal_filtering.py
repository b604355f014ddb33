"""Convolutions of kernel size 5 along the height, with 2 multiplications for an output and a weight instead of 5.

The minimal filtering algorithm F(4, 5) (Winograd, 1980): four outputs are a linear map of eight products, each of a
linear map of eight inputs with a linear map of the five weights. Over many channels each product is one of matrices,
beside which the maps cost little. In float32 the result is as far from the exact one as a few roundings more.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

KERNEL, TILE = 5, 4
POINTS = KERNEL + TILE - 1
CHANNELS = 128
"""From so many channels on, in and out, the products outweigh the maps."""


def _evaluation(coefficients: int) -> Tensor:
    """The matrix (8, coefficients) that evaluates a polynomial at 7 numbers and at infinity: its last coefficient."""
    finite = torch.tensor([0, 1, -1, 2, -2, 0.5, -0.5], dtype=torch.float64)
    last = torch.eye(coefficients, dtype=torch.float64)[-1:]
    return torch.cat((torch.vander(finite, coefficients, increasing=True), last))


# With such matrices V the product of polynomials p and q has the coefficients V8^-1 (V4 p * V5 q), and a convolution is
# the transpose of that in p: V4^T (V8^-T x * V5 w).
_OF_INPUT = _evaluation(POINTS).inverse().T.float().contiguous()
_OF_WEIGHT = _evaluation(KERNEL).float()
_TO_OUTPUT = _evaluation(TILE).T.float().contiguous()


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether `convolve` takes these tensors and is the faster way for them. On CUDA, cuDNN chooses by itself."""
    wide = min(weight.shape[:2]) >= CHANNELS and tuple(weight.shape[2:]) in ((KERNEL,), (KERNEL, 1))
    float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return wide and float32 and x.device.type == "cpu"


def _spread(x: Tensor) -> Tensor:
    """Maps (n, height, width, channels) to its eight factors (8, n * tiles * width, channels)."""
    height, channels = x.shape[1], x.shape[3]
    tiles = -(-height // TILE)
    # Zeros: 2 above, and below as many as fill the last tile and the 4 rows that it overlaps with the next.
    padded = F.pad(x, (0, 0, 0, 0, KERNEL // 2, tiles * TILE + KERNEL // 2 - height))
    rows = torch.unflatten(padded, 1, (tiles + 1, TILE)).movedim(2, 0)  # (4, n, tiles + 1, width, channels)
    tiled = torch.cat((rows[:, :, :-1], rows[:, :, 1:]))
    return (_OF_INPUT @ tiled.view(POINTS, -1)).view(POINTS, -1, channels)


def _spread_transposed(spread: Tensor, shape: torch.Size) -> Tensor:
    n, height, width, channels = shape
    tiles = -(-height // TILE)
    tiled = (_OF_INPUT.T @ spread.view(POINTS, -1)).view(POINTS, n, tiles, width, channels)
    padded = spread.new_zeros(n, tiles + 1, TILE, width, channels)
    padded[:, :-1] = tiled[:TILE].movedim(0, 2)
    padded[:, 1:] += tiled[TILE:].movedim(0, 2)
    return padded.flatten(1, 2)[:, KERNEL // 2 : KERNEL // 2 + height]


def _join(products: Tensor, shape: torch.Size) -> Tensor:
    """Maps products (8, n * tiles * width, channels) to outputs of `shape` (n, height, width, channels)."""
    n, height, width, channels = shape
    rows = (_TO_OUTPUT @ products.view(POINTS, -1)).view(TILE, n, -1, width, channels)
    return rows.movedim(0, 2).flatten(1, 2)[:, :height]


def _join_transposed(y: Tensor) -> Tensor:
    padded = F.pad(y, (0, 0, 0, 0, 0, -y.shape[1] % TILE))
    rows = torch.unflatten(padded, 1, (-1, TILE)).movedim(2, 0).reshape(TILE, -1)
    return (_TO_OUTPUT.T @ rows).view(POINTS, -1, y.shape[3])


def factors(weight: Tensor) -> Tensor:
    """Maps weights (out, in, 5) or (out, in, 5, 1) to their eight factors (8, out, in)."""
    return (_OF_WEIGHT @ weight.reshape(-1, KERNEL).T).view(POINTS, *weight.shape[:2])


class _Convolve(torch.autograd.Function):
    """On rows: (n, height, width, in) to (n, height, width, out)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = rows.contiguous()
        spread = _spread(rows)
        joined = _join(torch.bmm(spread, weight.transpose(1, 2)), rows.shape[:3] + bias.shape)
        ctx.save_for_backward(spread if ctx.needs_input_grad[1] else None, weight)
        ctx.shape = rows.shape
        return joined + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        spread, weight = ctx.saved_tensors
        grad = grad.contiguous()
        products = _join_transposed(grad)
        grad_rows = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_rows = _spread_transposed(torch.bmm(products, weight), ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.bmm(products.transpose(1, 2), spread)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, 2).sum(0)
        return grad_rows, grad_weight, grad_bias


def convolve(x: Tensor, weight_factors: Tensor, bias: Tensor) -> Tensor:
    """Computes ``F.conv1d(x, weight, bias, padding=2)``, or ``F.conv2d(x, weight, bias, padding=(2, 0))``.

    Args:
        x: (n, in, height) or (n, in, height, width).
        weight_factors: see `factors`.
        bias: (out,).
    """
    flat = x.dim() == 3
    rows = (x.unsqueeze(3) if flat else x).permute(0, 2, 3, 1)
    y: Tensor = _Convolve.apply(rows, weight_factors, bias)  # type: ignore[no-untyped-call]
    y = y.permute(0, 3, 1, 2)
    return y.squeeze(3) if flat else y
