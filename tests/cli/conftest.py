"""Real runs for the commands, made once by real jobs: one with a roll-back, one of two ranks."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import lastgood
from lastgood.cli import main

KEEP = lastgood.Keep(last=20)


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))


def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()


def job(run: Path, steps: list[int], *, back_to: int | None = None, mirror: Path | None = None) -> nn.Module:
    """A life of a job on a run."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    objects = {"model": net, "optimizer": optimizer, "best": (1, float("inf")), "epoch": 3}
    with lastgood.Checkpointer(run, keep=KEEP, rank=0, world_size=1, mirror=mirror, **objects) as checkpointer:
        checkpointer.restore(step=back_to)
        for step in steps:
            train(net, optimizer)
            checkpointer.save(step, metrics={"loss": 1 / step}).result()
    return net


def rank_job(run: Path, rank: int) -> None:
    net = model()
    objects = {"model": net, "own": torch.full((3,), float(rank)), "note": f"rank {rank}"}
    with lastgood.Checkpointer(
        run, rank=rank, world_size=2, local=["own"], replicated=["model.*"], deadline=30, **objects
    ) as checkpointer:
        checkpointer.restore()
        checkpointer.save(10).result()


@pytest.fixture(scope="session")
def branched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 100, 200, 300, then a roll-back to 200, and 250 (generation 3)."""
    run = tmp_path_factory.mktemp("runs") / "branched"
    job(run, [100, 200, 300])
    job(run, [250], back_to=200)
    return run


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "two"
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    ranks = [context.Process(target=rank_job, args=(run, rank)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    return run


@pytest.fixture
def run(branched: Path, tmp_path: Path) -> Path:
    """A copy of the branched run that the test may change."""
    return Path(shutil.copytree(branched, tmp_path / "run"))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in this process, in English."""
    monkeypatch.setenv("LASTGOOD_LANG", "en")

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return invoke


def flip_byte(path: Path, at: int) -> None:
    """Change one byte of a file, as a failing disk would."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
