"""The voice encoder, and the prior encoder that joins semantic content, phonemes and voice."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lastgood_sovits.s2.attention import Encoder, MultiHeadAttention


def length_mask(lengths: Tensor, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Makes a mask (batch, 1, size) of ones below each of `lengths` (batch,) and zeros from there on."""
    return (torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)).unsqueeze(1).to(dtype)


class _Wrapped(nn.Module):
    """Puts a layer one name deeper: the published weights call these `fc` and `conv`."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.add_module(name, layer)
        self._name = name

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.get_submodule(self._name)(x)
        return out


class GatedConvolution(nn.Module):
    """A convolution with a gated linear unit, around which the input is added."""

    def __init__(self, channels: int, kernel_size: int, p_dropout: float) -> None:
        super().__init__()
        self.conv1 = _Wrapped("conv", nn.Conv1d(channels, 2 * channels, kernel_size, padding="same"))
        self.p_dropout = p_dropout

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = F.glu(self.conv1(x), dim=1)
        return x + F.dropout(gated, self.p_dropout, self.training)


class StyleAttention(nn.Module):
    """Self-attention of the voice encoder, with the input added. Scaled by the full width, not by the head's."""

    def __init__(self, channels: int, n_heads: int, p_dropout: float) -> None:
        super().__init__()
        self.n_heads, self.p_dropout = n_heads, p_dropout
        self.w_qs = nn.Linear(channels, channels)
        self.w_ks = nn.Linear(channels, channels)
        self.w_vs = nn.Linear(channels, channels)
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Maps `x` (batch, n, channels) with boolean `visible` (batch, n) to the shape of x."""
        query, key, value = (
            torch.unflatten(projection(x), -1, (self.n_heads, -1)).transpose(1, 2)
            for projection in (self.w_qs, self.w_ks, self.w_vs)
        )
        dropout = self.p_dropout if self.training else 0.0
        scale = 1.0 / math.sqrt(x.shape[-1])
        out = F.scaled_dot_product_attention(query, key, value, visible[:, None, None], dropout, scale=scale)
        projected: Tensor = self.fc(out.transpose(1, 2).flatten(2))
        return x + F.dropout(projected, self.p_dropout, self.training)


class StyleEncoder(nn.Module):
    """Sums up a spectrogram in one voice vector (the mel-style encoder of Meta-StyleSpeech, Min et al., 2021).

    Args:
        in_channels: frequency bins that are read.
        channels: width of the hidden layers.
        out_channels: width of the voice vector.
    """

    KERNEL_SIZE, HEADS, DROPOUT = 5, 2, 0.1

    def __init__(self, in_channels: int, channels: int, out_channels: int) -> None:
        super().__init__()
        self.spectral = nn.Sequential(
            _Wrapped("fc", nn.Linear(in_channels, channels)),
            nn.Mish(),
            nn.Dropout(self.DROPOUT),
            _Wrapped("fc", nn.Linear(channels, channels)),
            nn.Mish(),
            nn.Dropout(self.DROPOUT),
        )
        self.temporal = nn.Sequential(*(GatedConvolution(channels, self.KERNEL_SIZE, self.DROPOUT) for _ in range(2)))
        self.slf_attn = StyleAttention(channels, self.HEADS, self.DROPOUT)
        self.fc = _Wrapped("fc", nn.Linear(channels, out_channels))

    def forward(self, spec: Tensor, mask: Tensor) -> Tensor:
        """Maps a spectrogram (batch, in_channels, frames) with mask (batch, 1, frames) to a voice (batch, out, 1)."""
        visible = mask.squeeze(1).bool()
        x = self.spectral((spec * mask).transpose(1, 2))
        x = self.temporal(x.transpose(1, 2)).transpose(1, 2).masked_fill(~visible.unsqueeze(-1), 0)
        x = self.fc(self.slf_attn(x, visible)).masked_fill(~visible.unsqueeze(-1), 0)
        mean: Tensor = (x.float() / visible.sum(1)[:, None, None]).sum(1)
        return mean.to(x.dtype).unsqueeze(-1)


class ContentTextMixer(nn.Module):
    """Lets the content attend to the phonemes and adds the voice (the MRTE of Mega-TTS 2, Jiang et al., 2023)."""

    N_HEADS = 4

    def __init__(self, content_channels: int, channels: int) -> None:
        super().__init__()
        self.cross_attention = MultiHeadAttention(channels, self.N_HEADS)
        self.c_pre = nn.Conv1d(content_channels, channels, 1)
        self.text_pre = nn.Conv1d(content_channels, channels, 1)
        self.c_post = nn.Conv1d(channels, content_channels, 1)

    def forward(self, content: Tensor, content_mask: Tensor, text: Tensor, text_mask: Tensor, ge: Tensor) -> Tensor:
        content = self.c_pre(content * content_mask)
        text = self.text_pre(text * text_mask)
        mixed = self.cross_attention(content * content_mask, text * text_mask, text_mask) + content + ge
        out: Tensor = self.c_post(mixed * content_mask)
        return out


class PriorEncoder(nn.Module):
    """Predicts mean and log standard deviation of the latent of every frame from content, phonemes and voice."""

    def __init__(
        self,
        *,
        n_symbols: int,
        ssl_channels: int,
        out_channels: int,
        hidden_channels: int,
        filter_channels: int,
        mrte_channels: int,
        n_heads: int,
        n_layers: int,
        kernel_size: int,
        p_dropout: float,
    ) -> None:
        super().__init__()
        widths = (hidden_channels, filter_channels, n_heads)
        self.ssl_proj = nn.Conv1d(ssl_channels, hidden_channels, 1)
        self.encoder_ssl = Encoder(*widths, n_layers // 2, kernel_size, p_dropout)
        self.encoder_text = Encoder(*widths, n_layers, kernel_size, p_dropout)
        self.text_embedding = nn.Embedding(n_symbols, hidden_channels)
        self.mrte = ContentTextMixer(hidden_channels, mrte_channels)
        self.encoder2 = Encoder(*widths, n_layers // 2, kernel_size, p_dropout)
        self.proj = nn.Conv1d(hidden_channels, 2 * out_channels, 1)

    def forward(
        self, content: Tensor, mask: Tensor, text: Tensor, text_lengths: Tensor, ge: Tensor, speed: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encodes a batch.

        Args:
            content: quantised features (batch, ssl_channels, frames).
            mask: of the frames (batch, 1, frames).
            text: phoneme ids (batch, n), int64.
            text_lengths: (batch,).
            ge: voice (batch, mrte_channels, 1).
            speed: above 1 speaks faster: the result has int(frames / speed) + 1 frames.

        Returns:
            Hidden (batch, hidden_channels, frames), mean and log standard deviation (batch, out_channels, frames), and
            the mask of these frames, which differs from the given one if `speed` is not 1.
        """
        text_mask = length_mask(text_lengths, text.shape[1], mask.dtype)
        x = self.encoder_ssl(self.ssl_proj(content * mask) * mask, mask)
        phonemes = self.encoder_text(self.text_embedding(text).transpose(1, 2) * text_mask, text_mask)
        x = self.encoder2(self.mrte(x, mask, phonemes, text_mask, ge) * mask, mask)
        if speed != 1:
            x = F.interpolate(x, size=int(x.shape[-1] / speed) + 1, mode="linear")
            mask = F.interpolate(mask, size=x.shape[-1], mode="nearest")
        mean, log_std = (self.proj(x) * mask).chunk(2, dim=1)
        return x, mean, log_std, mask
