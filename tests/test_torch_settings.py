"""Programs that change what torch does everywhere: saves and restores are what they are without."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import nn

import lastgood


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    # For a program that does so, torch.empty() is memory of another device: of one that has none, here.
    "another device by default": lambda: torch.device("meta"),
    "another type by default": lambda: default_dtype(torch.float64),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "deterministic": deterministic,
}


class Job:
    """A model with everything that takes another way through a save: large, small and changing tensors, a generator."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(5, 7).t()

    def objects(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("model", "optimizer", "generator", "table")}

    def step(self) -> None:
        self.model(torch.randn(4, 300)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self) -> dict[str, torch.Tensor]:
        found = dict(self.model.state_dict()) | {"table": self.table, "drawn": torch.rand(3, generator=self.generator)}
        for number, held in self.optimizer.state_dict()["state"].items():
            found |= {f"{number}.{key}": value for key, value in held.items()}
        return {name: value.clone() for name, value in found.items()}


@pytest.mark.parametrize("what", SETTINGS)
def test_what_a_program_sets_for_all_of_torch_changes_no_save(tmp_path: Path, what: str) -> None:
    job = Job(0)
    with lastgood.Checkpointer(tmp_path / "run", **job.objects()) as ckpt:
        for step in (1, 2, 3):
            job.step()
            with SETTINGS[what]() if step != 2 else contextlib.nullcontext():
                ckpt.save(step).result()
    expected = job.values()
    job = Job(1)
    with lastgood.Checkpointer(tmp_path / "run", **job.objects()) as ckpt:
        with SETTINGS[what]():
            assert ckpt.restore() == 3
        drawn = torch.rand(2)
        found = job.values()
        job.step()  # What was restored can be trained with.
        ckpt.save(4).result()
    assert {name: value.dtype for name, value in found.items()} == {n: v.dtype for n, v in expected.items()}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    job = Job(2)
    with lastgood.Checkpointer(tmp_path / "run", **job.objects()) as ckpt:
        ckpt.restore(3)
        assert torch.equal(torch.rand(2), drawn), "the random state is the same one"


@pytest.mark.parametrize("what", SETTINGS)
def test_a_job_that_has_a_setting_from_beginning_to_end(tmp_path: Path, what: str) -> None:
    job, again = Job(0), Job(1)
    with SETTINGS[what]():
        with lastgood.Checkpointer(tmp_path / "run", **job.objects()) as ckpt:
            ckpt.save(1).result()
            ckpt.save(2).result()
            assert ckpt.save(2) is not None, "the same step again is compared with what was saved"
        with lastgood.Checkpointer(tmp_path / "run", **again.objects()) as ckpt:
            assert ckpt.restore() == 2
    assert torch.equal(again.model[0].weight, job.model[0].weight)
    assert torch.equal(again.table, job.table)


def test_tensors_made_in_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        held = {"large": torch.rand(1 << 18), "turned": torch.rand(300, 500).t(), "small": torch.rand(3)}
        other = {name: torch.zeros_like(value) for name, value in held.items()}
    with lastgood.Checkpointer(tmp_path / "run", **held) as ckpt:
        for step in range(1, 5):  # Until the large one counts as frozen.
            ckpt.save(step).result()
    with lastgood.Checkpointer(tmp_path / "run", **other) as ckpt:
        assert ckpt.restore() == 4
    assert all(torch.equal(other[name], value) for name, value in held.items())


class Counted(nn.Module):
    """Its state_dict holds a value besides tensors, so that it is loaded by load_state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.count = nn.Parameter(torch.rand(40, 40)), 7

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state


class Average:
    """Loads its state in place."""

    def __init__(self) -> None:
        self.mean = nn.Parameter(torch.rand(40))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.mean.copy_(state["mean"])


@pytest.mark.parametrize("what", ["inference", "no gradients"])
def test_objects_are_loaded_in_the_mode_of_the_program(tmp_path: Path, what: str) -> None:
    model, average = Counted(), Average()
    with lastgood.Checkpointer(tmp_path / "run", model=model, average=average) as ckpt:
        ckpt.save(1).result()
    with SETTINGS[what]():
        other, second = Counted(), Average()
        other.count = 0
        with lastgood.Checkpointer(tmp_path / "run", model=other, average=second) as ckpt:
            assert ckpt.restore() == 1
            assert not torch.is_grad_enabled()
    assert torch.equal(other.weight, model.weight) and other.count == 7 and torch.equal(second.mean, average.mean)


def test_a_tensor_without_a_version_counter_is_of_the_moment_of_the_save(tmp_path: Path) -> None:
    with torch.inference_mode():
        table = torch.zeros(1 << 12, 1 << 12)
    with lastgood.Checkpointer(tmp_path / "run", table=table, other=torch.zeros(3)) as ckpt:
        for step in range(1, 4):
            ckpt.save(step).result()
        ckpt["more"] = torch.zeros(1 << 20)  # Another structure: the buffer holds nothing of before.
        ckpt.save(4)
        with torch.inference_mode():
            table[1000] = 1
    with lastgood.Checkpointer(tmp_path / "run", table=table, other=torch.zeros(3), more=torch.zeros(1 << 20)) as ckpt:
        assert ckpt.restore() == 4
    assert not table.any()
