"""The losses of stage 2, all computed in float32.

VITS (Kim et al., 2021) with the GAN losses of HiFi-GAN (Kong et al., 2020).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lastgood_sovits.s2.discriminator import Judgement


def discriminator_loss(real: Sequence[Judgement], generated: Sequence[Judgement]) -> Tensor:
    """Least-squares GAN loss: real waves should score 1 and generated ones 0, summed over the discriminators."""
    terms = [(1 - scores.float()).square().mean() for scores, _ in real]
    terms += [scores.float().square().mean() for scores, _ in generated]
    return torch.stack(terms).sum()


def adversarial_loss(generated: Sequence[Judgement]) -> Tensor:
    """Least-squares GAN loss of the generator: its waves should score 1."""
    return torch.stack([(1 - scores.float()).square().mean() for scores, _ in generated]).sum()


def feature_loss(real: Sequence[Judgement], generated: Sequence[Judgement]) -> Tensor:
    """Twice the sum, over all layers of all discriminators, of the mean absolute difference of the feature maps."""
    terms = [
        F.l1_loss(fake.float(), true.detach().float())
        for (_, true_features), (_, fake_features) in zip(real, generated, strict=True)
        for true, fake in zip(true_features, fake_features, strict=True)
    ]
    return 2 * torch.stack(terms).sum()


def kl_loss(
    z_p: Tensor, logs_q: Tensor, m_p: Tensor, logs_p: Tensor, mask: Tensor, frames: Tensor | None = None
) -> Tensor:
    """Kullback-Leibler divergence of the posterior from the prior, estimated at one draw.

    Args:
        z_p: the draw from the posterior, carried to the prior's space by the flow.
        logs_q: log standard deviation of the posterior.
        m_p, logs_p: mean and log standard deviation of the prior. These four are (batch, channels, frames).
        mask: (batch, 1, frames).
        frames: what to divide by, where it is not the number of valid frames: with several ranks their mean, so that
            the mean of the ranks' losses is the loss of all their clips together.

    Returns:
        The sum over the channels, averaged over the valid frames.
    """
    z_p, logs_q, m_p, logs_p, mask = (x.float() for x in (z_p, logs_q, m_p, logs_p, mask))
    divergence = logs_p - logs_q - 0.5 + 0.5 * (z_p - m_p).square() * torch.exp(-2 * logs_p)
    return (divergence * mask).sum() / (mask.sum() if frames is None else frames)
