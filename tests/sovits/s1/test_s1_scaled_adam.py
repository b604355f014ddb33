"""ScaledAdam takes upstream's steps, keeps upstream's state, and resumes exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.s1 import LockedRate, ScaledAdam

CASES = ["as_trained", "clip", "clip_off", "extreme"]


def make(case: dict[str, Any], initial: dict[str, torch.Tensor]) -> tuple[dict[str, Parameter], ScaledAdam]:
    parameters = {name: Parameter(initial[name].clone()) for name in case["param_order"]}
    options = {k: v for k, v in case["param_group_without_params"].items() if k != "lr"}
    return parameters, ScaledAdam(parameters.values(), lr=0.01, **options)


def take_step(
    golden: Any, case: dict[str, Any], parameters: dict[str, Parameter], optimizer: ScaledAdam, step: int
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = case["lr_per_step"][step]
    for name, parameter in parameters.items():
        grad = golden.fill.fixed_input(f"adam.grad.{step}.{name}", parameter.shape)
        missing = [step, name] in case["grad_none_at"]
        parameter.grad = None if missing else grad * case["grad_multiplier"].get(str(step), 1.0)
    optimizer.step()


def initial_values(stored: dict[str, torch.Tensor], name: str, case: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {p: stored[f"{name}.init.{p}"] for p in case["param_order"]}


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-6 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_every_step_and_the_final_state_are_upstreams(golden: Any, name: str) -> None:
    """1e-6 of each tensor's largest element: an absolute bound would say nothing of the tensor whose rms is 1e-6."""
    case, stored = golden.json("scaled_adam")[name], golden.tensors("scaled_adam")
    parameters, optimizer = make(case, initial_values(stored, name, case))
    for step in range(12):
        take_step(golden, case, parameters, optimizer, step)
        for p, value in parameters.items():
            check(value.detach(), stored[f"{name}.after.{p}"][step])
    state = optimizer.state_dict()["state"]
    found = {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}
    prefix = f"{name}.state."
    expected = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    assert set(found) == set(expected) | set(case["non_tensor_state"])
    for key, value in expected.items():
        check(found[key], value)
    for key, value in case["non_tensor_state"].items():
        assert found[key] == pytest.approx(value, rel=1e-6), key
    group = optimizer.state_dict()["param_groups"][0]
    expected_group = case["param_group_without_params"]
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in group.items() if k != "params"} == expected_group


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("at", [0, 1, 5, 8])
def test_resumes_exactly_from_its_state(golden: Any, name: str, at: int) -> None:
    case, stored = golden.json("scaled_adam")[name], golden.tensors("scaled_adam")
    parameters, optimizer = make(case, initial_values(stored, name, case))
    for step in range(at):
        take_step(golden, case, parameters, optimizer, step)
    saved = copy.deepcopy(optimizer.state_dict())
    again, resumed = make(case, {p: v.detach() for p, v in parameters.items()})
    resumed.load_state_dict(saved)
    for step in range(at, 12):
        take_step(golden, case, parameters, optimizer, step)
        take_step(golden, case, again, resumed, step)
    assert all(torch.equal(parameters[p], again[p]) for p in parameters)


def test_continues_from_the_state_of_upstreams_checkpoint(golden: Any) -> None:
    """Upstream's state after step 12, as its checkpoint numbers it, loads and is kept as it is."""
    case, stored = golden.json("scaled_adam")["clip"], golden.tensors("scaled_adam")
    _, optimizer = make(case, {p: stored[f"clip.after.{p}"][11] for p in case["param_order"]})
    state: dict[int, dict[str, Any]] = {}
    entries = {k.removeprefix("clip.state."): v for k, v in stored.items() if k.startswith("clip.state.")}
    for key, value in (entries | case["non_tensor_state"]).items():
        index, field = key.split(".")
        state.setdefault(int(index), {})[field] = value
    group = {**case["param_group_without_params"], "params": [0, 1, 2, 3, 4]}
    optimizer.load_state_dict({"state": state, "param_groups": [group]})
    loaded = optimizer.state_dict()["state"]
    assert {i: set(entry) for i, entry in loaded.items()} == {i: set(entry) for i, entry in state.items()}
    assert torch.equal(loaded[3]["model_norms"], stored["clip.state.3.model_norms"])
    assert loaded[0]["step"] == 12


def test_stacks_are_ordered_by_shape_whatever_the_order_of_parameters() -> None:
    shapes = [(3, 2), (10,), (3,), (3, 2), (1,), (10,)]
    parameters = [Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = ScaledAdam(parameters, clipping_scale=2.0)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    state = optimizer.state_dict()["state"]
    assert sorted(state) == [0, 1, 2, 4]
    assert [index for index, entry in state.items() if "model_norms" in entry] == [4]
    assert state[0]["delta"].shape == (2, 3, 2)


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"betas": (0.9, 0.5)}, {"eps": 0.0}, {"size_update_period": 0}])
def test_refuses_what_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(SovitsError):
        ScaledAdam([Parameter(torch.ones(2))], **options)


def test_the_learning_rate_is_upstreams_at_every_step(golden: Any) -> None:
    expected = golden.json("lr")["s1"]["lr_used_by_optimizer_step_0_to_29"]
    optimizer = ScaledAdam([Parameter(torch.ones(2))])
    schedule = LockedRate(optimizer)
    used = []
    for _ in expected:
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert used == expected  # exact


@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("optimizer_first", [True, False])
def test_the_learning_rate_resumes_exactly_in_any_order_of_loading(steps: int, optimizer_first: bool) -> None:
    parameter = Parameter(torch.ones(2))
    optimizer = ScaledAdam([parameter])
    schedule = LockedRate(optimizer)
    for _ in range(steps):
        optimizer.step()
        schedule.step()
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    resumed = ScaledAdam([parameter])
    again = LockedRate(resumed)
    if optimizer_first:
        resumed.load_state_dict(saved[0])
        again.load_state_dict(saved[1])
    else:
        again.load_state_dict(saved[1])
        resumed.load_state_dict(saved[0])
    assert resumed.param_groups[0]["lr"] == schedule.lr == again.lr
