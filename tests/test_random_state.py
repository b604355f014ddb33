"""The random state of python, numpy and torch goes on where it was; numpy is never imported only for that."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lastgood
from lastgood import random_state
from lastgood.values import encode


def draws() -> list[Any]:
    """Numbers of every kind, also those that are drawn in pairs and cached."""
    torch_numbers = [*torch.rand(3).tolist(), *torch.randn(5).tolist(), *torch.randperm(5).tolist()]
    numpy_numbers = [*np.random.rand(2).tolist(), float(np.random.standard_normal()), int(np.random.randint(1 << 30))]
    return [random.random(), random.gauss(0, 1), random.sample(range(99), 3), torch_numbers, numpy_numbers]


@pytest.mark.parametrize("before", [0, 1, 2, 700])
def test_the_next_numbers_are_those_that_would_have_come(before: int) -> None:
    random.seed(before)
    torch.manual_seed(before)
    np.random.seed(before)
    for _ in range(before):
        draws()
    if before == 1:
        random.gauss(0, 1)  # Leaves the other of the pair behind, as do the two below.
        np.random.standard_normal()
        torch.randn(1)
    saved = json.loads(json.dumps(random_state.capture(), allow_nan=False))
    expected = [draws() for _ in range(3)]
    assert random_state.apply(saved) == []
    assert [draws() for _ in range(3)] == expected
    assert random_state.capture() != saved
    random_state.apply(saved)
    assert random_state.capture() == saved


def test_a_dropout_sequence_continues(tmp_path: Path) -> None:
    dropout, data = nn.Dropout(0.5), torch.ones(50)
    torch.manual_seed(3)
    with lastgood.Checkpointer(tmp_path, n=0) as ckpt:
        dropout(data)
        ckpt.save(1)
        expected = [dropout(data), draws(), dropout(data)]
        torch.manual_seed(4)
        dropout(data)
        ckpt.restore()
        found = [dropout(data), draws(), dropout(data)]
    assert torch.equal(expected[0], found[0]) and expected[1] == found[1] and torch.equal(expected[2], found[2])


def test_saving_and_restoring_draw_no_numbers(tmp_path: Path) -> None:
    with lastgood.Checkpointer(tmp_path, w=torch.zeros(3)) as ckpt:
        before = random_state.capture()
        ckpt.save(1).result()
        assert random_state.capture() == before


def test_a_place_outside_of_the_numbers_is_refused() -> None:
    """numpy does not look, and would read there."""
    state = np.random.get_state(legacy=False)
    state["state"]["pos"] = 5 * 10**8
    saved = {**random_state.capture(), "numpy": encode(random_state.without_arrays(state), "", str)}
    (note,) = random_state.apply(saved)
    assert "pos of a generator of numpy is 500000000" in note
    assert np.random.get_state(legacy=False)["state"]["pos"] <= 624


@pytest.mark.parametrize("kind", ["PCG64", "Philox", "SFC64", "MT19937"])
def test_numpy_with_another_generator(kind: str) -> None:
    kept = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(getattr(np.random, kind)(7))
        np.random.standard_normal()
        saved = json.loads(json.dumps(random_state.capture()))
        expected = draws()
        assert random_state.apply(saved) == []
        assert draws() == expected
        np.random.set_bit_generator(np.random.MT19937(1) if kind == "PCG64" else np.random.PCG64(1))
        (note,) = random_state.apply(saved)
        assert "the random state of numpy" in note
    finally:
        np.random.set_bit_generator(kept)


WITHOUT_NUMPY = """
import sys

sys.modules["numpy"] = None  # As if it were not installed.
import warnings
warnings.simplefilter("ignore")
import torch
import lastgood

model = torch.nn.Linear(2, 2)
for run in sys.argv[1:]:
    with lastgood.Checkpointer(run, model=model, epoch=1) as ckpt:
        step = ckpt.restore()
        print(step, flush=True)
        ckpt.save(step + 1)
        ckpt.save(step + 1, blocking=True)
assert sys.modules["numpy"] is None
"""


def test_a_program_without_numpy_saves_and_restores_also_what_one_with_numpy_saved(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with lastgood.Checkpointer(tmp_path / "with", model=model, epoch=1) as ckpt:
        ckpt.save(7)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMPY, tmp_path / "new", tmp_path / "with"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "7"]
    assert "the random state of numpy (import of numpy halted" in done.stderr
