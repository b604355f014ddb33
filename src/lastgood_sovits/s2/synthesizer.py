"""The generator of stage 2, for the versions v1, v2, v2Pro and v2ProPlus."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.s2.config import ModelConfig
from lastgood_sovits.s2.encoders import PriorEncoder, StyleEncoder, length_mask
from lastgood_sovits.s2.quantizer import Quantizer
from lastgood_sovits.s2.vocoder import Generator
from lastgood_sovits.s2.wavenet import Flow, PosteriorEncoder


@dataclass(frozen=True, kw_only=True)
class Synthesis:
    """What a training pass returns. All latents are (batch, inter_channels, frames)."""

    wave: Tensor
    """Generated slices (batch, 1, segment_frames * hop)."""
    starts: Tensor
    """First frame of each slice (batch,), int64."""
    mask: Tensor
    """Of the frames (batch, 1, frames)."""
    z_p: Tensor
    """The posterior's draw in the prior's space."""
    m_p: Tensor
    """Mean of the prior."""
    logs_p: Tensor
    """Log standard deviation of the prior."""
    logs_q: Tensor
    """Log standard deviation of the posterior."""
    commitment: Tensor
    """Loss of the quantizer; 0 where it is frozen."""


def slice_frames(x: Tensor, starts: Tensor, size: int) -> Tensor:
    """Cuts `size` positions out of each sample of `x` (batch, channels, n), from `starts` (batch,) on."""
    index = starts[:, None] + torch.arange(size, device=x.device)
    return x.gather(2, index.unsqueeze(1).expand(-1, x.shape[1], -1))


def draw_starts(lengths: Tensor, size: int) -> Tensor:
    """Draws the first position of a slice of `size` positions, uniformly within each of the `lengths` (batch,)."""
    room = (lengths - size + 1).clamp(min=1)
    return (torch.rand(lengths.shape, device=lengths.device) * room).long()


class Synthesizer(nn.Module):
    """The generator. Its state dict has the keys, shapes and order of the published weights.

    Args:
        config: section "model" of the configuration.
        spec_channels: bins of the linear spectrogram.
        segment_frames: frames that a training pass turns into sound.
    """

    def __init__(self, config: ModelConfig, spec_channels: int = 1025, segment_frames: int = 32) -> None:
        super().__init__()
        self.config, self.segment_frames = config, segment_frames
        self.style_bins = spec_channels if config.version == "v1" else min(config.style_bins, spec_channels)
        self.enc_p = PriorEncoder(
            n_symbols=config.n_symbols,
            ssl_channels=config.ssl_channels,
            out_channels=config.inter_channels,
            hidden_channels=config.hidden_channels,
            filter_channels=config.filter_channels,
            mrte_channels=config.mrte_channels,
            n_heads=config.n_heads,
            n_layers=config.n_layers,
            kernel_size=config.kernel_size,
            p_dropout=config.p_dropout,
        )
        self.dec = Generator(
            config.inter_channels,
            config.resblock,
            config.resblock_kernel_sizes,
            config.resblock_dilation_sizes,
            config.upsample_rates,
            config.upsample_initial_channel,
            config.upsample_kernel_sizes,
            config.gin_channels,
        )
        self.enc_q = PosteriorEncoder(
            spec_channels, config.inter_channels, config.hidden_channels, config.posterior_layers, config.gin_channels
        )
        self.flow = Flow(
            config.inter_channels,
            config.hidden_channels,
            config.flow_couplings,
            config.flow_layers,
            config.gin_channels,
        )
        self.ref_enc = StyleEncoder(self.style_bins, config.style_channels, config.gin_channels)
        self.frames_per_code = 2 if config.semantic_frame_rate == "25hz" else 1
        self.ssl_proj = nn.Conv1d(
            config.ssl_channels, config.ssl_channels, self.frames_per_code, stride=self.frames_per_code
        )
        self.quantizer = Quantizer(config.codebook_size, config.ssl_channels)
        if config.freeze_quantizer:
            # A lookup passes no gradient on. Saying so keeps distributed training from waiting for one.
            self.ssl_proj.requires_grad_(False)
        if config.is_pro:
            self.sv_emb = nn.Linear(config.sv_channels, config.gin_channels)
            self.ge_to512 = nn.Linear(config.gin_channels, config.mrte_channels)
            self.prelu = nn.PReLU(config.gin_channels)

    def train(self, mode: bool = True) -> "Synthesizer":
        super().train(mode)
        if self.config.freeze_quantizer:
            self.ssl_proj.eval()
            self.quantizer.eval()
        return self

    def voice(self, spec: Tensor, mask: Tensor, sv: Tensor | None) -> tuple[Tensor, Tensor]:
        """Computes the voice vector of a reference.

        Args:
            spec: linear spectrogram (batch, spec_channels, frames).
            mask: (batch, 1, frames).
            sv: speaker vectors (batch, sv_channels); Pro versions only.

        Returns:
            The voice (batch, gin_channels, 1), and the same at the width of the text-content mixer.

        Raises:
            SovitsError: if speaker vectors are missing or not wanted.
        """
        ge = self.ref_enc(spec[:, : self.style_bins], mask)
        if self.config.is_pro != (sv is not None):
            need = "needs" if self.config.is_pro else "does not take"
            raise SovitsError(f"a {self.config.version} model {need} speaker vectors (7-sv_cn)")
        if sv is None:
            return ge, ge
        ge = self.prelu(ge + self.sv_emb(sv).unsqueeze(-1))
        return ge, self.ge_to512(ge.transpose(1, 2)).transpose(1, 2)

    def _content(self, ssl: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Quantises features (batch, ssl_channels, frames); returns them at the frame rate, and the commitment loss."""
        # In full precision: rounding would choose other codes.
        with torch.autocast(ssl.device.type, enabled=False):
            features = self.ssl_proj(ssl.to(self.ssl_proj.weight.dtype))
            code_lengths = (lengths + self.frames_per_code - 1) // self.frames_per_code
            mask = length_mask(code_lengths, features.shape[2], features.dtype)
            self.quantizer.initialise_if_new(features, mask)
            quantized, _, commitment = self.quantizer(features, mask)
        return self._at_frame_rate(quantized), commitment

    def _at_frame_rate(self, content: Tensor) -> Tensor:
        return content.repeat_interleave(self.frames_per_code, dim=2)

    def forward(
        self,
        ssl: Tensor,
        spec: Tensor,
        lengths: Tensor,
        text: Tensor,
        text_lengths: Tensor,
        sv: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Synthesis:
        """Does a training pass.

        Args:
            ssl: HuBERT features (batch, ssl_channels, frames).
            spec: linear spectrogram (batch, spec_channels, frames), with the same even number of frames.
            lengths: valid frames of each sample (batch,).
            text: phoneme ids (batch, n), int64.
            text_lengths: (batch,).
            sv: speaker vectors (batch, sv_channels); Pro versions only.
            noise: for the posterior, standard normal (batch, inter_channels, frames); None draws it.
            starts: first frame of the slice of each sample (batch,); None draws them.
        """
        mask = length_mask(lengths, spec.shape[2], spec.dtype)
        ge, ge_text = self.voice(spec, mask, sv)
        content, commitment = self._content(ssl, lengths)
        _, m_p, logs_p, _ = self.enc_p(content, mask, text, text_lengths, ge_text)
        z, _, logs_q = self.enc_q(spec, mask, ge, noise)
        if starts is None:
            starts = draw_starts(lengths, self.segment_frames)
        return Synthesis(
            wave=self.dec(slice_frames(z, starts, self.segment_frames), ge),
            starts=starts,
            mask=mask,
            z_p=self.flow(z, mask, ge),
            m_p=m_p,
            logs_p=logs_p,
            logs_q=logs_q,
            commitment=commitment,
        )

    @torch.no_grad()
    def extract_codes(self, ssl: Tensor) -> Tensor:
        """Gives the semantic codes (batch, 1, codes), int64, of features (batch, ssl_channels, frames)."""
        return self.quantizer.encode(self.ssl_proj(ssl)).unsqueeze(1)

    @torch.no_grad()
    def decode(
        self,
        codes: Tensor,
        text: Tensor,
        references: Sequence[Tensor],
        sv: Sequence[Tensor] = (),
        *,
        noise_scale: float = 0.5,
        speed: float = 1.0,
    ) -> Tensor:
        """Speaks semantic codes in the mean voice of some references.

        Args:
            codes: (batch, codes), int64.
            text: phoneme ids (batch, n), int64, without padding.
            references: linear spectrograms, each (batch, spec_channels, frames).
            sv: a speaker vector (batch, sv_channels) for each reference; Pro versions only.
            noise_scale: of the prior's noise; 0 gives its mean.
            speed: above 1 speaks faster.

        Returns:
            Waves (batch, 1, samples) in -1 .. 1.

        Raises:
            SovitsError: without references, or with another number of speaker vectors than of references.
        """
        vectors: Sequence[Tensor | None] = sv or [None] * len(references)
        if not references or len(vectors) != len(references):
            raise SovitsError(
                f"{len(references)} references and {len(sv)} speaker vectors were given: at least one reference is "
                "needed, and in the Pro versions a speaker vector for each"
            )
        voices = [
            self.voice(reference, torch.ones_like(reference[:, :1]), vector)[0]
            for reference, vector in zip(references, vectors, strict=True)
        ]
        ge = torch.stack(voices).mean(0)
        content = self._at_frame_rate(self.quantizer.decode(codes))
        mask = torch.ones_like(content[:, :1])
        return self._speak(content, mask, text, ge, noise_scale, speed)

    @torch.no_grad()
    def infer(
        self,
        ssl: Tensor,
        spec: Tensor,
        lengths: Tensor,
        text: Tensor,
        sv: Tensor | None = None,
        *,
        noise_scale: float = 0.5,
    ) -> Tensor:
        """Speaks the content of features again, in the voice of the spectrogram that belongs to them.

        Args:
            ssl, spec, lengths, sv: see `forward`.
            text: phoneme ids (batch, n), int64, without padding.
            noise_scale: of the prior's noise; 0 gives its mean.

        Returns:
            Waves (batch, 1, frames * hop) in -1 .. 1.
        """
        mask = length_mask(lengths, spec.shape[2], spec.dtype)
        ge, _ = self.voice(spec, mask, sv)
        content = self._at_frame_rate(self.quantizer.decode(self.quantizer.encode(self.ssl_proj(ssl))))
        return self._speak(content, mask, text, ge, noise_scale, 1.0)

    def _speak(
        self, content: Tensor, mask: Tensor, text: Tensor, ge: Tensor, noise_scale: float, speed: float
    ) -> Tensor:
        ge_text = self.ge_to512(ge.transpose(1, 2)).transpose(1, 2) if self.config.is_pro else ge
        text_lengths = torch.full((text.shape[0],), text.shape[1], device=text.device)
        _, mean, log_std, mask = self.enc_p(content, mask, text, text_lengths, ge_text, speed)
        z_p = mean + torch.randn_like(mean) * torch.exp(log_std) * noise_scale
        z = self.flow(z_p, mask, ge, reverse=True)
        return cast(Tensor, self.dec(z * mask, ge))
