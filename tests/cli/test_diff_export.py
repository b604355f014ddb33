"""`diff` and `export`: what is taken out is what was saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from conftest import flip_byte, model
from safetensors.torch import load_file
from torch import nn

import lastgood

Call = Callable[..., Result]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_exported_model_has_the_saved_values_and_plain_names(
    call: Call, branched: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"model{suffix}"
    assert call("export", branched / "step-00000300", out).exit_code == 0
    state = torch.load(out, weights_only=True) if suffix == ".pth" else load_file(out)
    net, saved = model(1), model(2)
    net.load_state_dict(state)
    shutil.copytree(branched, tmp_path / "run")
    with lastgood.Checkpointer(tmp_path / "run", model=saved, rank=0, world_size=1) as checkpointer:
        checkpointer.restore(step=300)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor)
    assert call("diff", branched / "step-00000300", out).exit_code == 0
    # Copies: on Windows a file cannot be replaced while tensors of load_file, which are maps of it, are in use.
    state = {name: tensor.clone() for name, tensor in state.items()}
    state["0.weight"][0, 0] += 1
    lastgood.save(state, out)
    assert call("diff", branched / "step-00000300", out).exit_code == 1


def test_an_exported_optimizer_is_what_load_state_dict_takes(call: Call, branched: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.pth"
    assert call("export", branched, out, "--part", "optimizer", "--part", "model").exit_code == 0
    state = torch.load(out, weights_only=True)
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    optimizer.load_state_dict(state["optimizer"])
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.state[net[0].weight]["exp_avg"].shape == (16, 8)
    assert "0.weight" in state["model"]


def test_half_precision_that_overflows_is_refused_by_name(call: Call, tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.bias[1] = 1e6
    with lastgood.Checkpointer(tmp_path / "run", model=net, rank=0, world_size=1) as checkpointer:
        checkpointer.restore()
        checkpointer.save(1)
    out = tmp_path / "half.safetensors"
    result = call("export", tmp_path / "run", out, "--half")
    assert result.exit_code == 1 and "model.bias (1e+06)" in result.stderr and not out.exists()
    assert call("export", tmp_path / "run", out, "--bfloat16").exit_code == 0
    assert load_file(out)["bias"].dtype is torch.bfloat16


def test_tied_weights_are_exported_under_both_names(call: Call, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    with lastgood.Checkpointer(tmp_path / "run", model=net, rank=0, world_size=1) as checkpointer:
        checkpointer.restore()
        checkpointer.save(1)
    for name in ("tied.safetensors", "tied.pth"):
        assert call("export", tmp_path / "run", tmp_path / name).exit_code == 0
        assert torch.equal(lastgood.load(tmp_path / name)["1.weight"], net[0].weight)


def test_export_never_replaces_a_file_unasked_nor_writes_damaged_tensors(call: Call, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.pth"
    out.write_bytes(b"mine")
    assert call("export", run, out).exit_code == 1
    assert out.read_bytes() == b"mine"
    flip_byte(run / "step-00000250.g3" / "00000.safetensors", 4096 + 16)
    result = call("export", run, out, "--overwrite")
    assert result.exit_code == 1 and "does not match its checksum" in result.stderr
    assert out.read_bytes() == b"mine"


def test_diff_gives_the_largest_difference_of_each_tensor(call: Call, tmp_path: Path) -> None:
    a = {"w": torch.zeros(5), "same": torch.ones(2), "gone": torch.ones(1), "shape": torch.ones(2), "epoch": 3}
    b = {"w": torch.zeros(5), "same": torch.ones(2), "shape": torch.ones(3), "epoch": 4, "new": (1, 2)}
    b["w"][3] = -0.25
    torch.save(a, tmp_path / "a.pth")
    torch.save(b, tmp_path / "b.pth")
    result = call("diff", tmp_path / "a.pth", tmp_path / "b.pth", "--json")
    assert result.exit_code == 1
    found = {d["name"]: d for d in json.loads(result.stdout)["differences"]}
    assert {name: d["what"] for name, d in found.items()} == {
        "w": "tensor",
        "gone": "only-a",
        "shape": "shape",
        "epoch": "value",
        "new": "only-b",
    }
    assert found["w"]["max_abs"] == 0.25
    assert (found["epoch"]["a"], found["epoch"]["b"]) == ("3", "4")


def test_equal_nan_is_no_difference_and_a_lost_nan_is_one(call: Call, tmp_path: Path) -> None:
    nan = torch.tensor([1.0, float("nan"), float("inf")])
    torch.save({"w": nan}, tmp_path / "a.pth")
    torch.save({"w": nan.clone()}, tmp_path / "b.pth")
    torch.save({"w": torch.tensor([1.0, 2.0, float("inf")])}, tmp_path / "c.pth")
    assert call("diff", tmp_path / "a.pth", tmp_path / "b.pth").exit_code == 0
    result = call("diff", tmp_path / "a.pth", tmp_path / "c.pth")
    assert result.exit_code == 1 and "inf" in result.stdout


def test_checkpoints_of_different_steps_differ_and_the_same_is_equal(call: Call, branched: Path) -> None:
    assert call("diff", branched, branched / "step-00000250.g3").exit_code == 0
    result = call("diff", branched / "step-00000100", branched / "step-00000200", "--part", "model")
    assert result.exit_code == 1 and "0.weight: F32 16×8, largest difference" in result.stdout


def test_ranks_with_their_own_versions_are_compared_too(call: Call, two_ranks: Path, tmp_path: Path) -> None:
    assert call("diff", two_ranks, two_ranks).exit_code == 0
    copy = tmp_path / "run"
    shutil.copytree(two_ranks, copy)
    other = model()
    objects = {"model": other, "own": torch.zeros(3), "note": "rank 0"}
    with lastgood.Checkpointer(copy, rank=0, world_size=1, **objects) as checkpointer:
        checkpointer.restore()
        checkpointer.save(11)
    result = call("diff", two_ranks, copy, "--json")
    found = {d["name"]: d["what"] for d in json.loads(result.stdout)["differences"]}
    assert found == {"rank1/own": "only-a", "rank1/note": "only-a"}


def test_what_cannot_be_compared_has_exit_code_2(call: Call, branched: Path, tmp_path: Path) -> None:
    (tmp_path / "b.pth").write_bytes(b"no torch file")
    assert call("diff", branched, tmp_path / "b.pth").exit_code == 2
