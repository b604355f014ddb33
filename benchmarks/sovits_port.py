"""A straightforward port of upstream's training step of stage 2: what the numbers of this package are held against.

What one writes first, operation by operation in upstream's order: weight normalisation by torch's hook, which computes
a weight anew in each pass; the discriminators on real and made waves one after the other; the generator's step with
gradients for everything that it passes; mels of whole spectrograms, cut afterwards; AdamW as it comes. The parameters
and the rest of the networks are this package's.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from lastgood_sovits.audio import mel_from_spectrogram, spectrogram
from lastgood_sovits.s2.batch import Batch
from lastgood_sovits.s2.config import Config
from lastgood_sovits.s2.convolution import Conv1d, Conv2d, ConvTranspose1d, WeightNorm
from lastgood_sovits.s2.discriminator import Discriminator, Judgement, PeriodDiscriminator
from lastgood_sovits.s2.losses import adversarial_loss, discriminator_loss, feature_loss, kl_loss
from lastgood_sovits.s2.synthesizer import Synthesizer, slice_frames
from lastgood_sovits.s2.vocoder import LEAK, Generator, ResBlock1
from lastgood_sovits.s2.wavenet import WaveNet


def _plain(part: WeightNorm) -> nn.Module:
    """The same convolution with torch's own weight normalisation."""
    shape, more = part.weight_v.shape, {"padding": part.padding, "stride": part.stride}  # type: ignore[attr-defined]
    plain: nn.Module
    if isinstance(part, ConvTranspose1d):
        plain = nn.ConvTranspose1d(shape[0], shape[1], shape[2], **more)
    elif isinstance(part, Conv2d):
        plain = nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]), **more)
    else:
        assert isinstance(part, Conv1d)
        groups = part.groups
        plain = nn.Conv1d(shape[1] * groups, shape[0], shape[2], dilation=part.dilation, groups=groups, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and what upstream uses
        plain = torch.nn.utils.weight_norm(plain)
    plain.load_state_dict(part.state_dict())
    return plain


def _replace_convolutions(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, WeightNorm):
            setattr(module, name, _plain(child))
        else:
            _replace_convolutions(child)


def _judge(network: nn.Module, wave: Tensor) -> Judgement:
    if isinstance(network, PeriodDiscriminator):
        missing = -wave.shape[-1] % network.period
        if missing:
            wave = F.pad(wave, (0, missing), "reflect")
        wave = wave.view(wave.shape[0], 1, -1, network.period)
    x, features = wave, []
    for conv in network.convs:  # type: ignore[union-attr]
        x = F.leaky_relu(conv(x), LEAK)
        features.append(x)
    x = network.conv_post(x)  # type: ignore[operator]
    features.append(x)
    return torch.flatten(x, 1, -1), features


def _wavenet(self: WaveNet, x: Tensor, mask: Tensor, g: Tensor) -> Tensor:
    width, output = self.channels, torch.zeros_like(x)
    g = self.cond_layer(g)
    for index, (in_layer, res_skip_layer) in enumerate(zip(self.in_layers, self.res_skip_layers, strict=True)):
        both = in_layer(x) + g[:, index * 2 * width : (index + 1) * 2 * width]
        res_skip = res_skip_layer(torch.tanh(both[:, :width]) * torch.sigmoid(both[:, width:]))
        if index < len(self.in_layers) - 1:
            x = (x + res_skip[:, :width]) * mask
            output = output + res_skip[:, width:]
        else:
            output = output + res_skip
    return output * mask


def _vocoder(self: Generator, x: Tensor, g: Tensor) -> Tensor:
    x = self.conv_pre(x) + self.cond(g)
    for stage, up in enumerate(self.ups):
        x = up(F.leaky_relu(x, LEAK))
        total = torch.zeros_like(x)
        for block in self.resblocks[stage * self.n_kernels : (stage + 1) * self.n_kernels]:
            assert isinstance(block, ResBlock1)
            y = x
            for dilated, plain in zip(block.convs1, block.convs2, strict=True):
                y = plain(F.leaky_relu(dilated(F.leaky_relu(y, LEAK)), LEAK)) + y
            total = total + y
        x = total / self.n_kernels
    return torch.tanh(self.conv_post(F.leaky_relu(x)))


class PortStep:
    """Upstream's step on the parameters that `generator` and `discriminator` have now; called like `TrainStep`."""

    def __init__(self, generator: Synthesizer, discriminator: Discriminator, config: Config) -> None:
        self.generator, self.discriminator, self.config = generator, discriminator, config
        for network in (generator, discriminator):
            _replace_convolutions(network)
        generator.dec.forward = _vocoder.__get__(generator.dec)  # type: ignore[method-assign]
        for part in generator.modules():
            if isinstance(part, WaveNet):
                part.forward = _wavenet.__get__(part)  # type: ignore[method-assign]
        train = config.train
        text = (generator.enc_p.text_embedding, generator.enc_p.encoder_text, generator.enc_p.mrte)
        lowered = {id(p) for part in text for p in part.parameters()}
        groups = [{"params": [p for p in generator.parameters() if id(p) not in lowered and p.requires_grad]}]
        groups += [
            {"params": list(part.parameters()), "lr": train.learning_rate * train.text_low_lr_rate} for part in text
        ]
        self.optimizer_g = AdamW(groups, train.learning_rate, betas=train.betas, eps=train.eps)
        self.optimizer_d = AdamW(discriminator.parameters(), train.learning_rate, betas=train.betas, eps=train.eps)

    def _both(self, real: Tensor, made: Tensor) -> tuple[list[Judgement], list[Judgement]]:
        pairs = [(_judge(d, real), _judge(d, made)) for d in self.discriminator.discriminators]
        return [a for a, _ in pairs], [b for _, b in pairs]

    def __call__(self, batch: Batch, *, noise: Tensor | None = None, starts: Tensor | None = None) -> dict[str, Tensor]:
        """Does one step; returns its losses."""
        data, train = self.config.data, self.config.train
        made = self.generator(
            batch.ssl,
            batch.spec,
            batch.lengths,
            batch.text,
            batch.text_lengths,
            batch.sv,
            noise=noise,
            starts=starts,
        )
        bands = (data.sampling_rate, data.filter_length, data.n_mel_channels, data.mel_fmin, data.mel_fmax)
        mel = slice_frames(mel_from_spectrogram(batch.spec, *bands), made.starts, self.config.segment_frames)
        again = spectrogram(made.wave.squeeze(1), data.filter_length, data.hop_length, data.win_length)
        made_mel = mel_from_spectrogram(again, *bands)
        real = slice_frames(batch.wave, made.starts * data.hop_length, train.segment_size)

        loss_d = discriminator_loss(*self._both(real, made.wave.detach()))
        self.optimizer_d.zero_grad()
        torch.autograd.backward(loss_d)
        _norm(self.discriminator)
        self.optimizer_d.step()

        judged_real, judged_made = self._both(real, made.wave)
        losses = [
            F.l1_loss(mel, made_mel) * train.c_mel,
            kl_loss(made.z_p, made.logs_q, made.m_p, made.logs_p, made.mask) * train.c_kl,
            feature_loss(judged_real, judged_made),
            adversarial_loss(judged_made),
            made.commitment,
        ]
        loss_g = torch.stack(losses).sum()
        self.optimizer_g.zero_grad()
        torch.autograd.backward(loss_g)
        _norm(self.generator)
        self.optimizer_g.step()
        return {"discriminator": loss_d.detach(), "generator": loss_g.detach()}


def _norm(network: nn.Module) -> float:
    total = 0.0
    for parameter in network.parameters():
        if parameter.grad is not None:
            total += parameter.grad.norm(2).item() ** 2
    return total**0.5
