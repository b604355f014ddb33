"""Training of tiny models: it learns, resumes exactly, survives what is not finite, and agrees across ranks."""

import copy
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from s2_tiny import start_ranks, tiny_config
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.s2.batch import Batch
from lastgood_sovits.s2.discriminator import Discriminator
from lastgood_sovits.s2.optimization import build_optimizers
from lastgood_sovits.s2.step import TrainStep
from lastgood_sovits.s2.synthesizer import Synthesizer


def make_step(version: str = "v2", ddp: bool = False, **kwargs: Any) -> TrainStep:
    torch.manual_seed(0)
    config = tiny_config(version, train={"learning_rate": 1e-3})
    g: nn.Module = Synthesizer(config.model, config.data.spec_channels, config.segment_frames)
    d: nn.Module = Discriminator(config.model.periods, config.model.discriminator_channels)
    assert isinstance(g, Synthesizer)
    g.quantizer.codebook.initialise(torch.randn(64, 12))
    optimizers = build_optimizers(g, d, config.train)
    if ddp:
        g, d = DistributedDataParallel(g), DistributedDataParallel(d)
    return TrainStep(g.train(), d.train(), *optimizers, config, **kwargs)


def make_batch(version: str = "v2", rows: int = 4, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([20, 18, 16, 14])[:rows]
    return Batch(
        names=tuple(f"{i}.wav" for i in range(rows)),
        ssl=torch.randn(rows, 12, 20, generator=generator),
        spec=torch.rand(rows, 1025, 20, generator=generator),
        lengths=lengths,
        wave=torch.randn(rows, 1, 12800, generator=generator).clamp(-1, 1) * 0.3,
        text=torch.randint(0, 322, (rows, 7), generator=generator),
        text_lengths=torch.tensor([7, 6, 5, 4])[:rows],
        sv=torch.randn(rows, 20, generator=generator) if version.startswith("v2Pro") else None,
    )


def parameters(step: TrainStep) -> list[Tensor]:
    return [p.detach().clone() for net in (step.generator, step.discriminator) for p in net.parameters()]


@pytest.mark.parametrize("version", ["v1", "v2", "v2Pro", "v2ProPlus"])
def test_a_tiny_model_of_every_version_learns(version: str) -> None:
    step, batch = make_step(version), make_batch(version)
    first = step(batch).losses
    for _ in range(25):
        last = step(batch).losses
    assert float(last["mel"]) < 0.8 * float(first["mel"]) and float(last["kl"]) < float(first["kl"])


def test_going_on_from_saved_states_gives_the_same_numbers() -> None:
    whole = make_step()
    for _ in range(2):
        whole(make_batch())
    saved = copy.deepcopy(
        [part.state_dict() for part in (whole.generator, whole.discriminator, whole.optimizer_g, whole.optimizer_d)]
    )
    random_state = torch.get_rng_state()
    expected = whole(make_batch()).losses
    resumed = make_step()
    parts = (resumed.generator, resumed.discriminator, resumed.optimizer_g, resumed.optimizer_d)
    for part, state in zip(parts, saved, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random_state)
    assert resumed(make_batch()).losses == expected
    assert all(torch.equal(a, b) for a, b in zip(parameters(resumed), parameters(whole), strict=True))


def test_the_discriminator_gets_no_gradient_from_the_generators_step() -> None:
    step = make_step()
    calls: list[int] = []
    step.optimizer_d.register_step_post_hook(lambda *_: calls.append(1))
    step(make_batch())
    by_own_step = [p.grad.clone() for p in step.discriminator.parameters() if p.grad is not None]
    torch.manual_seed(0)
    assert len(calls) == 1 and len(by_own_step) == len(list(step.discriminator.parameters()))
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in by_own_step]))
    again = make_step()
    result = again(make_batch())
    assert float(result.grad_norms["discriminator"]) == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize(
    ("spoilt", "network"), [("wave", "discriminator"), ("spec", "discriminator"), ("kl", "generator")]
)
def test_a_step_that_is_not_finite_is_skipped_and_reported(
    spoilt: str, network: str, caplog: pytest.LogCaptureFixture
) -> None:
    step, batch = make_step(), make_batch()
    if spoilt == "kl":
        step.config = replace(step.config, train=replace(step.config.train, c_kl=float("inf")))
    else:
        value = getattr(batch, spoilt).clone()
        value[:] = float("nan")
        batch = replace(batch, **{spoilt: value})
    before = parameters(step)
    with caplog.at_level(logging.WARNING):
        result = step(batch)
    assert result.skipped == network and "0.wav, 1.wav" in caplog.text and network in caplog.text
    learned = [not torch.equal(a, b) for a, b in zip(parameters(step), before, strict=True)]
    in_generator = len(list(step.generator.parameters()))
    assert not any(learned[:in_generator])
    assert any(learned[in_generator:]) == (network == "generator")


def test_too_many_skipped_steps_in_a_row_raise_and_one_good_step_forgives() -> None:
    step, good = make_step(max_skipped=1), make_batch()
    bad = replace(good, wave=torch.full_like(good.wave, float("inf")))
    step(bad)
    step(good)
    step(bad)
    with pytest.raises(SovitsError, match="step 2 of this kind in a row"):
        step(bad)


def test_mixed_precision_trains_close_to_full_precision() -> None:
    full, mixed = make_step(), make_step(amp_dtype=torch.bfloat16)
    noise, starts = torch.randn(4, 8, 20), torch.tensor([3, 2, 1, 0])
    for step in (full, mixed):
        step.generator.eval()  # dropout draws other numbers in another precision
    expected = full(make_batch(), noise=noise, starts=starts).losses
    result = mixed(make_batch(), noise=noise, starts=starts)
    assert result.skipped is None
    for name in ("discriminator", "adversarial", "feature", "kl"):
        assert float(result.losses[name]) == pytest.approx(float(expected[name]), rel=0.05, abs=1e-3), name
    # An untrained model is almost silent, and there the logarithm of the mel bands sees the rounding of the wave.
    assert float(result.losses["mel"]) == pytest.approx(float(expected["mel"]), rel=0.5)
    assert all(p.dtype == torch.float32 for p in mixed.generator.parameters())


def _train_one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        step, whole = make_step(ddp=True), make_batch()
        rows = slice(rank, None, 2)
        mine = replace(
            whole,
            names=whole.names[rows],
            **{k: v[rows] for k, v in vars(whole).items() if isinstance(v, Tensor)},
        )
        noise = torch.randn(4, 8, 20, generator=torch.Generator().manual_seed(5))[rows]
        starts = torch.tensor([3, 2, 1, 0])[rows]
        step.generator.eval()  # dropout would draw other numbers than a single process
        for _ in range(2):
            step(mine, noise=noise, starts=starts)
        bad = replace(mine, wave=mine.wave * float("nan")) if rank == 1 else mine
        assert step(bad, noise=noise, starts=starts).skipped == "discriminator"
        if rank == 1:  # a constant has no gradient, so the other rank cannot see this in the averaged gradients
            finite_loss = step._discriminator_loss
            step._discriminator_loss = lambda *waves: finite_loss(*waves) + float("inf")  # type: ignore[method-assign]
        assert step(mine, noise=noise, starts=starts).skipped == "discriminator"
        if rank == 1:
            step._discriminator_loss = finite_loss  # type: ignore[method-assign]
        step(mine, noise=noise, starts=starts)
        torch.save(parameters(step), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks_stay_equal_and_skip_together(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    start_ranks(2, _train_one_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # One process with the whole batch gets almost the same: only the KL mean over frames of unequal halves differs.
    step = make_step()
    step.generator.eval()
    noise = torch.randn(4, 8, 20, generator=torch.Generator().manual_seed(5))
    for _ in range(3):
        step(make_batch(), noise=noise, starts=torch.tensor([3, 2, 1, 0]))
    moved = make_step()
    near = sum(float((a - b).abs().sum()) for a, b in zip(first, parameters(step), strict=True))
    far = sum(float((a - b).abs().sum()) for a, b in zip(parameters(moved), parameters(step), strict=True))
    assert near < 0.2 * far
