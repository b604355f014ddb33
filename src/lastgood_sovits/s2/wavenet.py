"""The non-causal WaveNet of VITS (Kim et al., 2021), and the posterior encoder and the flow that are made of it."""

import torch
from torch import Tensor, nn

from lastgood_sovits.s2.convolution import Conv1d, same_padding

KERNEL_SIZE = 5


class WaveNet(nn.Module):
    """Gated convolutions with residual and skip connections, conditioned on one vector per sample.

    Args:
        channels: of input, hidden layers and output.
        n_layers: number of gated convolutions, all with dilation 1.
        gin_channels: of the conditioning vector.
    """

    def __init__(self, channels: int, n_layers: int, gin_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.in_layers = nn.ModuleList(
            Conv1d(channels, 2 * channels, KERNEL_SIZE, padding=same_padding(KERNEL_SIZE)) for _ in range(n_layers)
        )
        # The last layer has no successor that a residual could feed.
        self.res_skip_layers = nn.ModuleList(
            Conv1d(channels, 2 * channels if layer < n_layers - 1 else channels, 1) for layer in range(n_layers)
        )
        self.cond_layer = Conv1d(gin_channels, 2 * channels * n_layers, 1)

    def forward(self, x: Tensor, mask: Tensor, g: Tensor) -> Tensor:
        """Maps `x` (batch, channels, n), with mask (batch, 1, n) and condition (batch, gin, 1), to the shape of x."""
        conditions = self.cond_layer(g).split(2 * self.channels, dim=1)
        skipped: Tensor | None = None
        for in_layer, res_skip_layer, condition in zip(self.in_layers, self.res_skip_layers, conditions, strict=True):
            filtered, gate = (in_layer(x) + condition).chunk(2, dim=1)
            out = res_skip_layer(torch.tanh(filtered) * torch.sigmoid(gate))
            if out.shape[1] > self.channels:
                residual, out = out.chunk(2, dim=1)
                x = (x + residual) * mask
            skipped = out if skipped is None else skipped + out
        assert skipped is not None
        return skipped * mask


class PosteriorEncoder(nn.Module):
    """Encodes the linear spectrogram as the mean and log standard deviation of a normal distribution per frame."""

    def __init__(self, spec_channels: int, out_channels: int, channels: int, n_layers: int, gin_channels: int) -> None:
        super().__init__()
        self.pre = nn.Conv1d(spec_channels, channels, 1)
        self.enc = WaveNet(channels, n_layers, gin_channels)
        self.proj = nn.Conv1d(channels, 2 * out_channels, 1)

    def forward(
        self, spec: Tensor, mask: Tensor, g: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws a latent from the posterior.

        Args:
            spec: (batch, spec_channels, frames).
            mask: (batch, 1, frames).
            g: voice (batch, gin, 1); no gradient flows into it from here.
            noise: standard normal (batch, out_channels, frames); None draws it.

        Returns:
            The latent, its mean and its log standard deviation, each (batch, out_channels, frames), zero where masked.
        """
        x = self.enc(self.pre(spec) * mask, mask, g.detach())
        mean, log_std = (self.proj(x) * mask).chunk(2, dim=1)
        drawn = torch.randn_like(mean) if noise is None else noise
        return (mean + drawn * torch.exp(log_std)) * mask, mean, log_std


class CouplingLayer(nn.Module):
    """Shifts the second half of the channels by a function of the first half (volume-preserving)."""

    def __init__(self, channels: int, hidden_channels: int, n_layers: int, gin_channels: int) -> None:
        super().__init__()
        self.pre = nn.Conv1d(channels // 2, hidden_channels, 1)
        self.enc = WaveNet(hidden_channels, n_layers, gin_channels)
        self.post = nn.Conv1d(hidden_channels, channels // 2, 1)
        # Starts as the identity.
        nn.init.zeros_(self.post.weight)
        assert self.post.bias is not None
        nn.init.zeros_(self.post.bias)

    def forward(self, x: Tensor, mask: Tensor, g: Tensor, *, reverse: bool) -> Tensor:
        kept, shifted = x.chunk(2, dim=1)
        shift = self.post(self.enc(self.pre(kept) * mask, mask, g)) * mask
        shifted = (shifted - shift) * mask if reverse else shift + shifted * mask
        return torch.cat((kept, shifted), dim=1)


class Flip(nn.Module):
    """Reverses the channels, so that the next coupling shifts what the last one kept. Its own inverse."""

    def forward(self, x: Tensor, mask: Tensor, g: Tensor, *, reverse: bool) -> Tensor:
        return x.flip(1)


class Flow(nn.Module):
    """Couplings and flips in turn; only the couplings have weights, so their keys are flows.0, flows.2, ..."""

    def __init__(self, channels: int, hidden_channels: int, n_couplings: int, n_layers: int, gin_channels: int) -> None:
        super().__init__()
        self.flows = nn.ModuleList()
        for _ in range(n_couplings):
            self.flows.append(CouplingLayer(channels, hidden_channels, n_layers, gin_channels))
            self.flows.append(Flip())

    def forward(self, x: Tensor, mask: Tensor, g: Tensor, *, reverse: bool = False) -> Tensor:
        """Maps posterior latents to the prior's space, or back with `reverse`. All (batch, channels, frames)."""
        for flow in reversed(self.flows) if reverse else self.flows:
            x = flow(x, mask, g, reverse=reverse)
        return x
