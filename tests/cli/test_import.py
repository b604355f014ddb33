"""`import`: existing files become a checkpoint that a job restores like its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from conftest import model, train
from safetensors.torch import save_file
from torch import nn

import lastgood

Call = Callable[..., Result]


@pytest.fixture
def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    net = model()
    optimizer = torch.optim.AdamW([{"params": net[0].parameters()}, {"params": net[1:].parameters(), "lr": 0.5}])
    train(net, optimizer)
    return net, optimizer


def test_a_state_dict_becomes_the_model_of_a_new_run(
    call: Call, tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    net, _ = trained
    torch.save({f"module.{key}": tensor for key, tensor in net.state_dict().items()}, tmp_path / "a.pth")
    save_file(net.state_dict(), tmp_path / "b.safetensors")
    for file in ("a.pth", "b.safetensors"):
        run = tmp_path / f"run-{file}"
        result = call("import", tmp_path / file, run, "--step", 7)
        assert result.exit_code == 0, result.output
        fresh = model(1)
        with lastgood.Checkpointer(run, model=fresh, rank=0, world_size=1) as checkpointer:
            assert checkpointer.restore() == 7
        assert all(
            torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), net.state_dict().values(), strict=True)
        )


def test_the_parts_of_a_training_checkpoint_are_mapped_and_the_optimizer_finds_its_parameters(
    call: Call, tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    net, optimizer = trained
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    nested = {"net": net.state_dict(), "train": {"optim": optimizer.state_dict(), "sched": scheduler.state_dict()}}
    torch.save({**nested, "epoch": 5}, tmp_path / "ckpt.pth")
    maps = ["model=net", "optimizer=train.optim", "scheduler=train.sched", "epoch=epoch"]
    result = call("import", *[item for m in maps for item in ("--map", m)], tmp_path / "ckpt.pth", tmp_path / "run")
    assert result.exit_code == 0, result.output
    fresh = model(1)
    other = torch.optim.AdamW([{"params": fresh[0].parameters()}, {"params": fresh[1:].parameters()}])
    schedule = torch.optim.lr_scheduler.StepLR(other, 9)
    objects = {"model": fresh, "optimizer": other, "scheduler": schedule, "epoch": 0}
    with lastgood.Checkpointer(tmp_path / "run", rank=0, world_size=1, **objects) as checkpointer:
        checkpointer.restore()
        assert checkpointer["epoch"] == 5
    assert schedule.step_size == 3 and other.param_groups[1]["lr"] == 0.5
    for name, parameter in fresh.named_parameters():
        saved = optimizer.state[net.get_parameter(name)]
        assert torch.equal(other.state[parameter]["exp_avg"], saved["exp_avg"])


def test_several_files_become_several_objects(
    call: Call, tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    torch.save(trained[0].state_dict(), tmp_path / "G.pth")
    torch.save(model(5).state_dict(), tmp_path / "D.pth")
    files = ["--as", f"generator={tmp_path / 'G.pth'}", "--as", f"discriminator={tmp_path / 'D.pth'}"]
    assert call("import", *files, tmp_path / "run").exit_code == 0
    fresh = {"generator": model(1), "discriminator": model(2)}
    with lastgood.Checkpointer(tmp_path / "run", rank=0, world_size=1, **fresh) as checkpointer:
        checkpointer.restore()
    assert torch.equal(fresh["generator"][0].weight, trained[0][0].weight)
    assert torch.equal(fresh["discriminator"][0].weight, model(5)[0].weight)


def test_an_optimizer_that_does_not_fit_the_model_is_refused(
    call: Call, tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    torch.save({"m": nn.Linear(8, 16).state_dict(), "o": trained[1].state_dict()}, tmp_path / "x.pth")
    result = call("import", "--map", "model=m", "--map", "optimizer=o", tmp_path / "x.pth", tmp_path / "run")
    assert result.exit_code == 1 and "which is which cannot be known" in result.stderr
    assert not list((tmp_path / "run").glob("step-*"))


def test_a_nested_file_is_refused_with_the_mapping_to_use(
    call: Call, tmp_path: Path, trained: tuple[nn.Module, torch.optim.Optimizer]
) -> None:
    torch.save({"weights": trained[0].state_dict(), "o": trained[1].state_dict()}, tmp_path / "x.pth")
    result = call("import", tmp_path / "x.pth", tmp_path / "run")
    assert result.exit_code == 1 and "--map model=weights --map optimizer=o" in result.stderr


def test_a_run_with_checkpoints_is_never_imported_into(call: Call, run: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "x.pth")
    result = call("import", tmp_path / "x.pth", run)
    assert result.exit_code == 1 and "already has checkpoints" in result.stderr


class Hostile:
    def __reduce__(self) -> object:
        return os.mkdir, ("executed",)


def test_no_code_of_a_file_is_run(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Hostile()}, "bad.pth")
    result = call("import", "bad.pth", "run")
    assert result.exit_code == 1 and "mkdir" in result.stderr
    assert not (tmp_path / "executed").exists()
