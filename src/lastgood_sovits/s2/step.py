"""One training step of stage 2: the discriminator learns first, then the generator."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.autocast_mode import autocast
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lastgood_sovits.audio import mel_from_spectrogram, spectrogram
from lastgood_sovits.errors import SovitsError
from lastgood_sovits.s2.batch import Batch
from lastgood_sovits.s2.config import Config
from lastgood_sovits.s2.convolution import frozen_weights
from lastgood_sovits.s2.discriminator import split_judgements
from lastgood_sovits.s2.losses import adversarial_loss, discriminator_loss, feature_loss, kl_loss
from lastgood_sovits.s2.synthesizer import Synthesis, slice_frames

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step measured. All tensors are detached scalars on the device: reading them waits for it."""

    losses: dict[str, Tensor]
    """discriminator; adversarial, feature, mel, kl, commitment, and generator, which is the sum of these five."""
    grad_norms: dict[str, Tensor]
    """Length of the whole gradient of discriminator and generator."""
    skipped: str | None = None
    """The network ("discriminator" or "generator") that did not learn, for a loss or gradient was not finite."""


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Computes the length of the gradient over all parameters, without waiting for the device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


def _bare(module: nn.Module) -> nn.Module:
    bare: nn.Module = module.module if isinstance(module, DistributedDataParallel) else module
    return bare


class TrainStep:
    """Does training steps on a generator and a discriminator, which may be wrapped in `DistributedDataParallel`.

    A step whose loss or gradient is not finite changes nothing in the network concerned, on no rank, and is reported
    with the names of its clips; a step of the discriminator that went before stays. Every rank must do every step.

    Args:
        generator: a `Synthesizer`.
        discriminator: a `Discriminator`.
        optimizer_g, optimizer_d: see `build_optimizers`.
        config: the configuration.
        scaler: of the losses, for mixed precision; None for full precision. It belongs into the checkpoint.
        amp_dtype: of mixed precision, torch.float16 or torch.bfloat16; None for full precision.
        max_skipped: number of steps in a row that may be skipped.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        optimizer_g: Optimizer,
        optimizer_d: Optimizer,
        config: Config,
        *,
        scaler: GradScaler | None = None,
        amp_dtype: torch.dtype | None = None,
        max_skipped: int = 10,
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.optimizer_g, self.optimizer_d = optimizer_g, optimizer_d
        self.config, self.amp_dtype, self.max_skipped = config, amp_dtype, max_skipped
        self.scaler = GradScaler("cpu", enabled=False) if scaler is None else scaler
        self._skipped_in_a_row = 0

    def __call__(self, batch: Batch, *, noise: Tensor | None = None, starts: Tensor | None = None) -> StepResult:
        """Does one step.

        Args:
            batch: on the device of the networks.
            noise, starts: see `Synthesizer.forward`; None draws them.

        Raises:
            SovitsError: if more than `max_skipped` steps in a row were not finite.
        """
        with self._autocast(batch.spec.device):
            made: Synthesis = self.generator(
                batch.ssl,
                batch.spec,
                batch.lengths,
                batch.text,
                batch.text_lengths,
                batch.sv,
                noise=noise,
                starts=starts,
            )
        hop = self.config.data.hop_length
        real = slice_frames(batch.wave, made.starts * hop, self.config.train.segment_size)

        losses = {"discriminator": self._discriminator_loss(real, made.wave.detach())}
        norms = {"discriminator": self._backward(losses["discriminator"], self.discriminator, self.optimizer_d)}
        if not self._step(losses["discriminator"], norms["discriminator"], self.optimizer_d):
            return self._skip("discriminator", batch, losses, norms)

        losses |= self._generator_losses(batch, made, real)
        norms["generator"] = self._backward(losses["generator"], self.generator, self.optimizer_g)
        if not self._step(losses["generator"], norms["generator"], self.optimizer_g):
            return self._skip("generator", batch, losses, norms)
        self.scaler.update()
        self._skipped_in_a_row = 0
        return StepResult(losses=_detached(losses), grad_norms=norms)

    def _autocast(self, device: torch.device) -> autocast:
        return autocast(device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def _discriminator_loss(self, real: Tensor, generated: Tensor) -> Tensor:
        with self._autocast(real.device):
            # No layer mixes samples, so one pass over both gives what two passes would.
            judgements = self.discriminator(torch.cat((real, generated.to(real.dtype))))
        return discriminator_loss(*split_judgements(judgements, len(real)))

    def _generator_losses(self, batch: Batch, made: Synthesis, real: Tensor) -> dict[str, Tensor]:
        # Not through DDP: the discriminator gets no gradients here that would have to be averaged.
        discriminator = _bare(self.discriminator)
        with self._autocast(real.device), frozen_weights(discriminator):
            with torch.no_grad():
                judged_real = discriminator(real)
            judged_made = discriminator(made.wave)
        train = self.config.train
        target, actual = self.mels(batch.spec, made)
        losses = {
            "adversarial": adversarial_loss(judged_made),
            "feature": feature_loss(judged_real, judged_made),
            "mel": F.l1_loss(target, actual) * train.c_mel,
            "commitment": made.commitment,
            "kl": kl_loss(made.z_p, made.logs_q, made.m_p, made.logs_p, made.mask, _mean_frames(made.mask))
            * train.c_kl,
        }
        return losses | {"generator": torch.stack(list(losses.values())).sum()}

    def mels(self, spec: Tensor, made: Synthesis) -> tuple[Tensor, Tensor]:
        """Computes the mel spectrograms (batch, bands, segment_frames) of the real and the generated slices."""
        data = self.config.data
        bands = (data.sampling_rate, data.filter_length, data.n_mel_channels, data.mel_fmin, data.mel_fmax)
        cut = slice_frames(spec, made.starts, self.config.segment_frames)
        wave = made.wave.float().squeeze(1)
        again = spectrogram(wave, data.filter_length, data.hop_length, data.win_length)
        return mel_from_spectrogram(cut.float(), *bands), mel_from_spectrogram(again, *bands)

    def _backward(self, loss: Tensor, network: nn.Module, optimizer: Optimizer) -> Tensor:
        optimizer.zero_grad()
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.unscale_(optimizer)
        return gradient_norm(network.parameters())

    def _step(self, loss: Tensor, norm: Tensor, optimizer: Optimizer) -> bool:
        """Steps the optimizer if the numbers of all ranks are finite, and tells whether they are."""
        # With a scaler, gradients that overflow are its business: it skips the step and lowers the scale.
        finite = loss.detach() if self.scaler.is_enabled() else torch.stack((loss.detach(), norm))
        agreed = torch.isfinite(finite).all().float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(agreed, dist.ReduceOp.MIN)
        if not bool(agreed):
            return False
        self.scaler.step(optimizer)
        return True

    def _skip(self, network: str, batch: Batch, losses: dict[str, Tensor], norms: dict[str, Tensor]) -> StepResult:
        for optimizer in (self.optimizer_g, self.optimizer_d):
            optimizer.zero_grad()
        self.scaler.update()
        self._skipped_in_a_row += 1
        values = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in losses.items())
        message = (
            f"the {network} did not learn from this batch, because a loss or its gradient is not finite on some rank "
            f"({values}; gradient {float(norms[network]):.4g}); the clips on this rank are {', '.join(batch.names)}"
        )
        if self._skipped_in_a_row > self.max_skipped:
            raise SovitsError(
                f"{message}. This is step {self._skipped_in_a_row} of this kind in a row, so training stops: continue "
                "from the last checkpoint with a lower train.learning_rate, without train.fp16_run, or these clips"
            )
        logger.warning("%s", message)
        return StepResult(losses=_detached(losses), grad_norms=norms, skipped=network)


def _mean_frames(mask: Tensor) -> Tensor:
    """Valid frames per rank, averaged over the ranks. A collective call."""
    frames = mask.detach().float().sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(frames)
        frames /= dist.get_world_size()
    return frames


def _detached(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in losses.items()}
