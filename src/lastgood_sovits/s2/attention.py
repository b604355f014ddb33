"""Attention over text and content: self-attention with relative positions (Shaw et al., 2018), and cross-attention.

Masks are float tensors (batch, 1, n) of ones for valid and zeros for padded positions. Only keys are masked: what a
padded query attends to reaches no valid position, because every later operation masks its input.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of a (batch, channels, n) tensor."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.transpose(1, 2), self.gamma.shape, self.gamma, self.beta).transpose(1, 2)


def _skew(band: Tensor, length: int) -> Tensor:
    """Puts column r of a band (..., n, 2w + 1) on diagonal r - w of a matrix (..., n, n) of zeros."""
    reach = band.shape[-1] // 2
    width = length + 2 * reach
    # Rows that are one element wider than they are read shift by one more with every row.
    padded = F.pad(band, (0, width + 1 - band.shape[-1])).flatten(-2)[..., : length * width]
    return torch.unflatten(padded, -1, (length, width))[..., reach : reach + length]


def _unskew(matrix: Tensor, reach: int) -> Tensor:
    """Collects the diagonals -reach .. reach of a matrix (..., n, n) as the columns of a band (..., n, 2 reach + 1)."""
    length = matrix.shape[-1]
    width = length + 2 * reach
    padded = F.pad(F.pad(matrix, (reach, reach)).flatten(-2), (0, length))
    return torch.unflatten(padded, -1, (length, width + 1))[..., : 2 * reach + 1]


class MultiHeadAttention(nn.Module):
    """Multi-head attention on (batch, channels, n) tensors, with 1x1 convolutions as projections.

    Args:
        channels: of queries, keys, values and output.
        n_heads: a divisor of `channels`.
        p_dropout: share of attention weights dropped in training.
        window_size: if given, keys and values get a learned term for each distance up to this many positions; then
            keys and queries must be the same sequence.
    """

    def __init__(self, channels: int, n_heads: int, p_dropout: float = 0.0, window_size: int | None = None) -> None:
        super().__init__()
        self.n_heads, self.p_dropout, self.window_size = n_heads, p_dropout, window_size
        if window_size is not None:
            shape, deviation = (1, 2 * window_size + 1, channels // n_heads), (channels // n_heads) ** -0.5
            self.emb_rel_k = nn.Parameter(torch.randn(shape) * deviation)
            self.emb_rel_v = nn.Parameter(torch.randn(shape) * deviation)
        self.conv_q = nn.Conv1d(channels, channels, 1)
        self.conv_k = nn.Conv1d(channels, channels, 1)
        self.conv_v = nn.Conv1d(channels, channels, 1)
        self.conv_o = nn.Conv1d(channels, channels, 1)
        for projection in (self.conv_q, self.conv_k, self.conv_v):
            nn.init.xavier_uniform_(projection.weight)

    def _heads(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, 1, (self.n_heads, -1)).transpose(2, 3)

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor) -> Tensor:
        """Attends from `x` (batch, channels, n) to `context` (batch, channels, m), masked by (batch, 1, m)."""
        query, key, value = (
            self._heads(self.conv_q(x)),
            self._heads(self.conv_k(context)),
            self._heads(self.conv_v(context)),
        )
        visible = context_mask.bool().unsqueeze(2)  # (batch, 1, 1, m)
        dropout = self.p_dropout if self.training else 0.0
        if self.window_size is None:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
        else:
            out = self._relative(query, key, value, visible, dropout)
        projected: Tensor = self.conv_o(out.transpose(2, 3).flatten(1, 2))
        return projected

    def _relative(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, dropout: float) -> Tensor:
        # The relative values need the attention weights themselves, which the fused attention does not give.
        query = query / math.sqrt(query.shape[-1])
        by_distance = query @ self.emb_rel_k.transpose(-2, -1)  # (batch, heads, n, 2w + 1)
        scores = query @ key.transpose(-2, -1) + _skew(by_distance, key.shape[2])
        # Not minus infinity: a text of no valid phoneme then gives numbers, not NaN.
        weights = F.dropout(scores.masked_fill(~visible, -1e4).softmax(-1), dropout)
        return weights @ value + _unskew(weights, self.emb_rel_v.shape[1] // 2) @ self.emb_rel_v


class FeedForward(nn.Module):
    """Two convolutions with a ReLU between them."""

    def __init__(self, channels: int, filter_channels: int, kernel_size: int, p_dropout: float) -> None:
        super().__init__()
        self.conv_1 = nn.Conv1d(channels, filter_channels, kernel_size, padding="same")
        self.conv_2 = nn.Conv1d(filter_channels, channels, kernel_size, padding="same")
        self.p_dropout = p_dropout

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = F.dropout(F.relu(self.conv_1(x * mask)), self.p_dropout, self.training)
        out: Tensor = self.conv_2(hidden * mask)
        return out * mask


class Encoder(nn.Module):
    """A post-norm transformer encoder on (batch, channels, n) tensors whose attention knows distances up to 4."""

    WINDOW_SIZE = 4

    def __init__(
        self, channels: int, filter_channels: int, n_heads: int, n_layers: int, kernel_size: int, p_dropout: float
    ) -> None:
        super().__init__()
        self.p_dropout = p_dropout
        self.attn_layers = nn.ModuleList(
            MultiHeadAttention(channels, n_heads, p_dropout, self.WINDOW_SIZE) for _ in range(n_layers)
        )
        self.norm_layers_1 = nn.ModuleList(ChannelNorm(channels) for _ in range(n_layers))
        self.ffn_layers = nn.ModuleList(
            FeedForward(channels, filter_channels, kernel_size, p_dropout) for _ in range(n_layers)
        )
        self.norm_layers_2 = nn.ModuleList(ChannelNorm(channels) for _ in range(n_layers))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x * mask
        layers = zip(self.attn_layers, self.norm_layers_1, self.ffn_layers, self.norm_layers_2, strict=True)
        for attention, norm_1, feed_forward, norm_2 in layers:
            x = norm_1(x + F.dropout(attention(x, x, mask), self.p_dropout, self.training))
            x = norm_2(x + F.dropout(feed_forward(x, mask), self.p_dropout, self.training))
        return x * mask
