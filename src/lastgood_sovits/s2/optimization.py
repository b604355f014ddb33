"""The optimizers of stage 2 and their learning rates.

The learning rate is a pure function of the epoch. A scheduler object with a state of its own would have to be saved and
loaded in step with the optimizer, whose state already holds the decayed rate; doing only half of that decays it twice.
"""

from itertools import chain
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from lastgood_sovits.s2.config import TrainConfig
from lastgood_sovits.s2.synthesizer import Synthesizer


def learning_rate(train: TrainConfig, epoch: int) -> float:
    """Gives the rate of an epoch, counted from 1. The decay is already applied once in epoch 1."""
    rate = train.learning_rate
    for _ in range(epoch):  # multiplied one by one, so that it equals the published schedule to the last bit
        rate *= train.lr_decay
    return rate


def set_learning_rates(optimizer_g: Optimizer, optimizer_d: Optimizer, train: TrainConfig, epoch: int) -> float:
    """Sets the rates of all groups of both optimizers for an epoch, counted from 1, whatever they were before.

    Returns:
        The rate of the generator's first group.
    """
    base = learning_rate(train, epoch)
    lowered = learning_rate_of_text(train, epoch)
    for index, group in enumerate(optimizer_g.param_groups):
        group["lr"] = lowered if index else base
    for group in optimizer_d.param_groups:
        group["lr"] = base
    return base


def learning_rate_of_text(train: TrainConfig, epoch: int) -> float:
    """Gives the lowered rate of the text parts in an epoch, counted from 1."""
    rate = train.learning_rate * train.text_low_lr_rate
    for _ in range(epoch):
        rate *= train.lr_decay
    return rate


def build_optimizers(generator: Synthesizer, discriminator: nn.Module, train: TrainConfig) -> tuple[AdamW, AdamW]:
    """Makes AdamW for both networks, with the rates of epoch 1.

    The generator's groups are, in this order: everything else, text embedding, text encoder, text-content mixer. They
    list the parameters in the published order, frozen ones too, so that optimizer states of upstream's files fit.

    Args:
        generator: not wrapped in DDP.
        discriminator: wrapped or not.
        train: section "train" of the configuration.
    """
    text_parts = (generator.enc_p.text_embedding, generator.enc_p.encoder_text, generator.enc_p.mrte)
    lowered = set(chain.from_iterable(part.parameters() for part in text_parts))
    base = [parameter for parameter in generator.parameters() if parameter not in lowered]
    groups = [{"params": base}, *({"params": list(part.parameters())} for part in text_parts)]
    # Fused: one pass over the memory instead of a dozen.
    optimizer_g = AdamW(groups, train.learning_rate, betas=train.betas, eps=train.eps, fused=True)
    optimizer_d = AdamW(discriminator.parameters(), train.learning_rate, betas=train.betas, eps=train.eps, fused=True)
    set_learning_rates(optimizer_g, optimizer_d, train, epoch=1)
    return optimizer_g, optimizer_d


def published_state(optimizer: Optimizer) -> dict[str, Any]:
    """The state as upstream's files have it: the reader chooses how its steps are computed."""
    state: dict[str, Any] = optimizer.state_dict()
    return {**state, "param_groups": [{**group, "fused": None} for group in state["param_groups"]]}
