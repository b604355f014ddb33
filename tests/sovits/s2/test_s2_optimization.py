"""Parameter groups and learning rates against upstream's (exact)."""

from pathlib import Path

import pytest
import torch
from s2_golden import read_json
from s2_reference import published_config
from s2_tiny import tiny_config

from lastgood_sovits.s2.config import TrainConfig
from lastgood_sovits.s2.discriminator import Discriminator
from lastgood_sovits.s2.optimization import build_optimizers, learning_rate, published_state, set_learning_rates
from lastgood_sovits.s2.synthesizer import Synthesizer
from lastgood_sovits.train.initial import load_optimizer

REFERENCE = read_json("lr.json")["s2"]


@pytest.fixture(scope="module")
def optimizers() -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    config = published_config("v2")
    with torch.device("meta"):
        return build_optimizers(Synthesizer(config.model), Discriminator(config.model.periods), config.train)


def test_groups_have_upstreams_parameters_and_settings(
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
) -> None:
    g, d = optimizers
    assert [len(group["params"]) for group in g.param_groups] == [649, 1, 108, 14]
    assert sum(p.numel() for group in g.param_groups[1:] for p in group["params"]) == 7_705_792
    assert [len(group["params"]) for group in d.param_groups] == [111]
    for group in g.param_groups + d.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.99), 1e-9, 0.01)


def test_rates_are_upstreams_in_every_epoch_in_any_order(
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
) -> None:
    g, d = optimizers
    train = TrainConfig()
    for epoch in ("3", "1", "5", "2", "4", "3"):  # a resume comes back to an epoch: nothing decays twice
        base, text = REFERENCE["lr_during_epoch(base, text groups)"][epoch]
        assert set_learning_rates(g, d, train, int(epoch)) == base == learning_rate(train, int(epoch))
        assert [group["lr"] for group in g.param_groups] == [base, text, text, text]
        assert d.param_groups[0]["lr"] == base


def test_rates_do_not_depend_on_what_the_optimizers_state_holds(
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
) -> None:
    g, d = optimizers
    for group in g.param_groups:
        group["lr"] = 7.0
    set_learning_rates(g, d, TrainConfig(), 2)
    assert g.param_groups[0]["lr"] == REFERENCE["lr_during_epoch(base, text groups)"]["2"][0]


def test_a_state_of_upstreams_does_not_slow_the_steps_down_and_ours_does_not_change_its(tmp_path: Path) -> None:
    config = tiny_config()
    pairs = [
        build_optimizers(
            Synthesizer(config.model),
            Discriminator(config.model.periods, config.model.discriminator_channels),
            config.train,
        )
        for _ in range(2)
    ]
    (_, ours), (_, other) = pairs
    for parameter in ours.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    ours.step()
    state = published_state(ours)
    assert state["param_groups"][0]["fused"] is None and ours.param_groups[0]["fused"] is True
    load_optimizer(other, state, tmp_path)
    assert other.param_groups[0]["fused"] is True and len(other.state) == len(ours.state)
