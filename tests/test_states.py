"""A run is read for evaluation while a job holds it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lastgood
from lastgood import Checkpointer, catalog, states
from lastgood.errors import DamagedError, LastGoodError


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model(torch.randn(4, 3)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer.step()
    return model, optimizer


def test_a_run_is_loaded_while_a_job_holds_it(tmp_path: Path) -> None:
    model, optimizer = make()
    run = tmp_path / "run"
    with Checkpointer(run, model=model, optimizer=optimizer, epoch=7) as ckpt:
        ckpt.save(1, blocking=True)
        loaded = lastgood.load(run)
        assert loaded["epoch"] == 7 and set(loaded) == {"model", "optimizer", "epoch"}
        fresh = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        fresh.load_state_dict(loaded["model"])
        assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())
        other = torch.optim.AdamW(fresh.parameters())
        other.load_state_dict(loaded["optimizer"])
        assert other.param_groups[0]["lr"] == 0.1
        assert torch.equal(other.state[fresh[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])
        with torch.no_grad():
            model[0].weight.zero_()
        ckpt.save(2, blocking=True)
        assert not lastgood.load(run)["model"]["0.weight"].any()
        assert lastgood.load(run / "step-00000001")["model"]["0.weight"].any()
        assert lastgood.load(run, map_location="meta")["model"]["0.weight"].is_meta


def test_a_damaged_checkpoint_is_skipped_and_all_damaged_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = make()
    run = tmp_path / "run"
    with Checkpointer(run, model=model) as ckpt:
        ckpt.save(1, blocking=True)
        ckpt.save(2, blocking=True)
    for number in (2, 1):
        shard = run / f"step-0000000{number}" / "00000.safetensors"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        if number == 2:
            assert set(lastgood.load(run)) == {"model"}
            assert "step-00000002 is skipped" in caplog.text
    with pytest.raises(DamagedError, match="has no checkpoint that can be loaded"):
        lastgood.load(run)
    with pytest.raises(DamagedError):
        lastgood.load(run / "step-00000002")


def test_a_checkpoint_that_is_deleted_while_it_is_read_gives_way_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with Checkpointer(run, x={"w": torch.ones(2)}) as ckpt:
        ckpt.save(1, blocking=True)
        ckpt.save(2, blocking=True)
    real = states.read_tensors

    def read(entry: catalog.Entry, *args: Any) -> Any:
        if entry.step == 2:
            shutil.rmtree(entry.path)
        return real(entry, *args)

    monkeypatch.setattr(states, "read_tensors", read)
    assert lastgood.load(run)["x"]["w"].tolist() == [1.0, 1.0]


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LastGoodError, match="There is no checkpoint"):
        lastgood.load(tmp_path)
