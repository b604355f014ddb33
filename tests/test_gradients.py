"""Saves inside an open accumulation window continue bit for bit, with the gradients that were there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lastgood
from roundtrip import Objects, bits, difference, round_trip


def build() -> Objects:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 2), nn.Linear(2, 2))
    model[3].weight.requires_grad_(False)
    return {"model": model, "opt": torch.optim.Adam(model.parameters(), lr=0.1), "window": {"batches": 0}}


def batch(objects: Objects) -> torch.Tensor:
    """One backward pass; every fourth is followed by a step."""
    window = objects["window"]
    loss = objects["model"](torch.randn(5, 3)).square().mean() / 4
    loss.backward()
    window["batches"] += 1
    if window["batches"] % 4 == 0:
        objects["opt"].step()
        objects["opt"].zero_grad()
    return loss.detach()


@pytest.mark.parametrize("batches", [1, 3, 4, 6])
def test_an_open_window_continues(tmp_path: Path, batches: int) -> None:
    round_trip(tmp_path, build, batch, steps=batches, gradients=True)


def test_without_gradients_an_open_window_would_not(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        round_trip(tmp_path, build, batch, steps=6)


def gradients(objects: Objects) -> dict[str, Any]:
    return {name: parameter.grad for name, parameter in objects["model"].named_parameters()}


def test_a_roll_back_takes_away_gradients_of_the_future(tmp_path: Path) -> None:
    objects = build()
    with lastgood.Checkpointer(tmp_path, gradients=True, **objects) as ckpt:
        ckpt.save(0)
        batch(objects)
        first = {name: None if g is None else g.clone() for name, g in gradients(objects).items()}
        ckpt.save(1)
        batch(objects)
        ckpt.restore(step=1)
        assert difference(first, gradients(objects)) is None
        ckpt.restore(step=0)
        assert all(gradient is None for gradient in gradients(objects).values())


def test_gradients_of_other_types_and_layouts(tmp_path: Path) -> None:
    def make() -> Objects:
        model = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last, dtype=torch.bfloat16)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        return {"model": model}

    first, second = round_trip(tmp_path, make, gradients=True)
    assert bits(first["model"].weight.grad) == bits(second["model"].weight.grad)
    assert second["model"].weight.grad.dtype == torch.bfloat16


def test_sparse_gradients_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Embedding(4, 2, sparse=True)
    with lastgood.Checkpointer(tmp_path, gradients=True, model=model) as ckpt:
        model(torch.tensor([1])).sum().backward()
        with pytest.raises(lastgood.LastGoodError, match=r"model\.weight\.grad: a sparse"):
            ckpt.save(1)
        model.zero_grad()
        ckpt.save(1).result()


def test_tied_and_frozen_parameters(tmp_path: Path) -> None:
    def make() -> Objects:
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        model["b"].weight = model["a"].weight
        return {"model": model}

    def step(objects: Objects) -> None:
        objects["model"]["b"](objects["model"]["a"](torch.randn(3, 2))).sum().backward()

    first, second = round_trip(tmp_path, make, step, gradients=True)
    assert difference(gradients(first), gradients(second)) is None
