"""The training step: windows, exact resume, what is not finite, and several ranks."""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.s1 import Batch, LockedRate, Text2Semantic, TrainStep, make_optimizer
from lastgood_sovits.s1.config import ModelConfig
from lastgood_sovits.s1.model import Scores

LENGTHS = ((7, 12), (5, 9))


def make(config: ModelConfig, seed: int = 0, **options: Any) -> TrainStep:
    torch.manual_seed(seed)
    model = Text2Semantic(config)
    optimizer = make_optimizer(model)
    return TrainStep(model, optimizer, LockedRate(optimizer), **options)


def parameters(step: TrainStep) -> list[torch.Tensor]:
    return [p.detach().clone() for p in step.model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def with_rejected(batch: Batch, seed: int = 0) -> Batch:
    return batch.with_rejected([torch.Generator().manual_seed(seed)] * len(batch))


def without_dropout(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


@pytest.fixture
def batches(random_batch: Callable[..., Batch]) -> list[Batch]:
    return [random_batch(*LENGTHS, seed=seed) for seed in range(14)]


def test_steps_after_every_fourth_micro_batch_of_the_run(small_config: ModelConfig, batches: list[Batch]) -> None:
    step = make(small_config)
    results = []
    for batch in batches[:12]:
        before = parameters(step)
        results.append(step(batch))
        assert same(before, parameters(step)) != results[-1].stepped
    assert [r.stepped for r in results] == [False, False, False, True] * 3
    assert [r.lr for r in results] == [0.01] * 4 + [0.002] * 8
    assert all((r.grad_norm is not None) == r.window_ended for r in results)
    assert step.optimizer_steps == 3 and step.micro_batches == 12 and step.position == 0


def test_a_window_sums_the_gradients_of_its_micro_batches(small_config: ModelConfig, batches: list[Batch]) -> None:
    step = make(small_config)
    model = copy.deepcopy(step.model)
    torch.manual_seed(1)
    for batch in batches[:3]:
        step(batch)
    torch.manual_seed(1)
    sum(model.train()(batch).total for batch in batches[:3]).backward()
    for mine, expected in zip(step.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preference", [False, True])
@pytest.mark.parametrize("at", [0, 4, 6, 11])
def test_resumes_exactly_also_in_an_open_window(
    small_config: ModelConfig, batches: list[Batch], at: int, preference: bool
) -> None:
    if preference:
        batches = [with_rejected(batch, seed) for seed, batch in enumerate(batches)]
    step = make(small_config)
    for batch in batches[:at]:
        step(batch)
    saved = copy.deepcopy([x.state_dict() for x in (step.model, step.optimizer, step.schedule, step)])
    grads = [None if p.grad is None else p.grad.clone() for p in step.model.parameters()]
    random_state = torch.get_rng_state()
    losses = [step(batch).losses.total.item() for batch in batches[at:]]

    resumed = make(small_config, seed=9)
    for target, state in zip((resumed.model, resumed.optimizer, resumed.schedule, resumed), saved, strict=True):
        target.load_state_dict(state)
    for parameter, grad in zip(resumed.model.parameters(), grads, strict=True):
        parameter.grad = grad
    torch.set_rng_state(random_state)
    assert [resumed(batch).losses.total.item() for batch in batches[at:]] == losses
    assert same(parameters(step), parameters(resumed))
    assert resumed.state_dict() == step.state_dict()


def test_an_open_window_without_its_gradients_starts_again_and_says_so(
    small_config: ModelConfig, batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    step = make(small_config)
    for batch in batches[:6]:
        step(batch)
    resumed = make(small_config)
    resumed.load_state_dict(step.state_dict())
    assert [resumed(batch).stepped for batch in batches[:4]] == [False, False, False, True]
    assert "gradients of 2 micro-batches" in caplog.text


def test_flush_uses_an_open_window_once(small_config: ModelConfig, batches: list[Batch]) -> None:
    step = make(small_config)
    assert not step.flush()
    for batch in batches[:6]:
        step(batch)
    before = parameters(step)
    assert step.flush() and not same(before, parameters(step))
    assert step.optimizer_steps == 2 and step.position == 0 and not step.flush()


def test_flush_works_right_after_a_resume(small_config: ModelConfig, batches: list[Batch]) -> None:
    step = make(small_config)
    step(batches[0])
    resumed = make(small_config)
    resumed.load_state_dict(step.state_dict())
    for parameter, source in zip(resumed.model.parameters(), step.model.parameters(), strict=True):
        parameter.grad = source.grad.clone()
    assert resumed.flush() and step.flush() and same(parameters(step), parameters(resumed))
    lost = make(small_config)
    lost.load_state_dict({**step.state_dict(), "position": 1})
    assert not lost.flush()


def test_a_window_that_is_not_finite_changes_nothing_and_names_its_clips(
    small_config: ModelConfig, batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    step = make(small_config)
    for batch in batches[:4]:
        step(batch)
    before, state = parameters(step), copy.deepcopy(step.optimizer.state_dict())
    broken = replace(batches[5], bert=batches[5].bert * float("nan"), names=("broken.wav", "too.wav"))
    results = [step(batch) for batch in (batches[4], broken, batches[6], batches[7])]
    assert results[-1].window_ended and not results[-1].stepped
    assert same(before, parameters(step)) and all(p.grad is None for p in step.model.parameters())
    assert str(step.optimizer.state_dict()) == str(state)
    assert "A loss is not finite" in caplog.text and "broken.wav too.wav" in caplog.text and "clip0" not in caplog.text
    assert step.skips == 1 and step.optimizer_steps == 1
    assert [step(batch).stepped for batch in batches[:4]][-1] and step.skips == 0


def test_gradients_that_are_not_finite_change_nothing(
    small_config: ModelConfig, batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    step = make(small_config, window=1)
    before = parameters(step)
    handle = step.model.model.ar_predict_layer.weight.register_hook(lambda grad: grad * float("inf"))  # type: ignore[union-attr]
    assert not step(batches[0]).stepped and same(before, parameters(step))
    assert "The gradients are not finite" in caplog.text
    handle.remove()
    assert step(batches[1]).stepped


def test_too_many_windows_that_are_not_finite_end_the_training(small_config: ModelConfig, batches: list[Batch]) -> None:
    step = make(small_config, window=1, max_skips=3)
    broken = replace(batches[0], bert=batches[0].bert * float("inf"))
    assert not step(broken).stepped
    resumed = make(small_config, window=1, max_skips=3)
    resumed.load_state_dict(step.state_dict())
    resumed(broken)
    with pytest.raises(SovitsError, match="3 windows in a row were not finite"):
        resumed(broken)


def test_learns_a_batch_by_heart(small_config: ModelConfig, random_batch: Callable[..., Batch]) -> None:
    step = make(small_config, window=1)
    without_dropout(step.model)
    batch = random_batch(*LENGTHS)
    losses = [step(batch).losses.total.item() for _ in range(60)]
    assert losses[-1] < 0.9 * losses[0]


def test_mixed_precision_falls_back_on_the_cpu_and_bfloat16_works(
    small_config: ModelConfig, batches: list[Batch]
) -> None:
    exact = make(small_config, precision="16-mixed")
    plain = make(small_config)
    torch.manual_seed(3)
    first = exact(batches[0]).losses.total.item()
    torch.manual_seed(3)
    assert plain(batches[0]).losses.total.item() == first
    torch.manual_seed(3)
    rounded = make(small_config, precision="bf16-mixed")
    torch.manual_seed(3)
    assert first != rounded(batches[0]).losses.total.item() == pytest.approx(first, rel=0.02)


def test_the_preference_loss_is_upstreams_default_beta_and_reproducible(
    small_config: ModelConfig, batches: list[Batch]
) -> None:
    values = []
    for _ in range(2):
        step = make(small_config)
        without_dropout(step.model)
        values.append([step(with_rejected(batches[0], seed)).losses.preference.item() for seed in range(3)])
    assert values[0] == values[1] and len(set(values[0])) == 3 and min(values[0]) > 0
    assert step.model.beta == 0.2


def test_one_pass_over_chosen_and_rejected_equals_two(small_config: ModelConfig, batches: list[Batch]) -> None:
    model = make(small_config).model.eval()
    batch = with_rejected(batches[0], 3)
    losses = model(batch)
    chosen = model.score(batch)
    rejected = model.score(batch, [batch.rejected])
    expected = -torch.nn.functional.logsigmoid(0.2 * (rejected.per_clip() - chosen.per_clip())).mean()
    torch.testing.assert_close(losses.preference, expected)
    torch.testing.assert_close(losses.cross_entropy, chosen.negative_log_probs().sum())


def test_top3_counts_a_target_with_at_most_two_likelier_codes() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 4)
    scores = Scores(logits=logits, targets=torch.arange(4), counts=(4,), hidden=logits)
    assert scores.top3().tolist() == [True, True, True, False]


def test_corruption_touches_real_codes_only(random_batch: Callable[..., Batch]) -> None:
    batch = random_batch((5, 30), (5, 8), (5, 1))
    kinds = set()
    for seed in range(50):
        rejected = with_rejected(batch, seed).rejected
        for row, length, own, count in zip(
            rejected.ids, rejected.lengths, batch.codes.ids, batch.codes.lengths, strict=True
        ):
            assert 1 <= length < 2 * count or length == count == 1
            assert set(row[:length].tolist()) <= set(own[:count].tolist())
            kinds.add((length > count) - (length < count))
    assert kinds == {-1, 0, 1}


def test_the_attention_grid_equals_the_attention_clip_by_clip(
    small_config: ModelConfig, random_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout that GPUs use, computed on the CPU."""
    from lastgood_sovits.s1 import layout

    model = make(small_config).model.eval()
    batch = random_batch((7, 12), (3, 20), (9, 1))
    expected = model(batch)
    expected.total.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(layout, "_attends_per_clip", lambda device: False)
    found = model(batch)
    found.total.backward()
    torch.testing.assert_close(found.total, expected.total)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(batch)
    rounded.total.backward()
    torch.testing.assert_close(rounded.total, expected.total, rtol=0.02, atol=0.0)


def test_positions_reach_as_far_as_the_longest_clip(
    random_batch: Callable[..., Batch], small_config: ModelConfig
) -> None:
    model = make(small_config).model.eval()
    with torch.no_grad():
        assert model(random_batch((3, 4100))).total.isfinite()
    position = model.model.ar_audio_position
    grown = position._table
    assert grown.shape[0] == 4100
    assert torch.equal(grown[:4000], type(position)(small_config.hidden_dim)._table)


def test_refuses_what_cannot_work(small_config: ModelConfig) -> None:
    with pytest.raises(SovitsError, match="window of 0"):
        make(small_config, window=0)
    linear = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    with pytest.raises(SovitsError, match="not a Linear"):
        TrainStep(linear, optimizer, LockedRate(optimizer))


def run_rank(rank: int, store: Path, config: ModelConfig, batches: list[Batch], local: bool, out: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Text2Semantic(config)
    without_dropout(model)
    optimizer = make_optimizer(model)
    step = TrainStep(DistributedDataParallel(model), optimizer, LockedRate(optimizer), local_gradients=local, window=2)
    mine = batches[rank::2]
    stepped = []
    for number, batch in enumerate(mine):
        if number == 3 and rank == 1 and not batches[5].bert.isnan().any():
            step._seen.append((torch.tensor(float("nan")), ("odd.wav",)))  # a loss alone, with sound gradients
        stepped.append(step(batch).stepped)
        if number == 0:
            first_grad = model.model.bert_proj.weight.grad.clone()
    stepped.append(step.flush())
    result = {"stepped": stepped, "weights": model.state_dict(), "steps": step.optimizer_steps, "grad": first_grad}
    torch.save(result, out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("local", "broken"), [(True, "input"), (False, "input"), (True, "loss")])
def test_two_ranks_step_alike_and_skip_alike(
    small_config: ModelConfig, batches: list[Batch], tmp_path: Path, local: bool, broken: str
) -> None:
    """A loss that is not finite on one rank costs both ranks that window; the rest equals one process, averaged."""
    data = batches[:10]
    if broken == "input":
        data[5] = replace(data[5], bert=data[5].bert * float("nan"))  # the third of rank 1: in the second window
    # A fork has imported torch already. Where torch sees CUDA, a backward pass fails after a fork.
    forks = hasattr(os, "fork") and not torch.cuda.is_available()
    context = multiprocessing.get_context("fork" if forks else "spawn")
    ranks = [
        context.Process(target=run_rank, args=(rank, tmp_path / "store", small_config, data, local, tmp_path))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for result in results:
        assert result["stepped"] == [False, True, False, False, False, True] and result["steps"] == 2
    assert torch.equal(results[0]["grad"], results[1]["grad"]) != local
    assert all(torch.equal(results[0]["weights"][k], v) for k, v in results[1]["weights"].items())

    alone = make(small_config)
    without_dropout(alone.model)
    for batch in data[:4]:
        alone(batch)
    for batch in data[8:]:
        alone(batch)
    alone.flush()
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(results[0]["weights"][name], value, rtol=1e-4, atol=2e-5)
