"""What restore refuses, skips and reports: objects that do not fit, and checkpoints that are damaged."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lastgood
from lastgood import DamagedError, LastGoodError, MismatchError, catalog, program
from roundtrip import seed


def net(width: int = 4, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2)).to(dtype)


def job(model: nn.Module, **more: Any) -> dict[str, Any]:
    opt = torch.optim.Adam(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    opt.step()
    return {"opt": opt, "model": model, **more}


def save(run: Path, objects: dict[str, Any], *steps: int) -> None:
    with lastgood.Checkpointer(run, **objects) as ckpt:
        ckpt.restore()
        for step in steps:
            for parameter in objects["model"].parameters() if "model" in objects else ():
                parameter.data.fill_(step)
            ckpt.save(step)


def contents(objects: dict[str, Any]) -> list[torch.Tensor]:
    model, opt = objects["model"], objects["opt"]
    return [p.detach().clone() for p in model.parameters()] + [s["exp_avg"].clone() for s in opt.state.values()]


def test_all_differences_are_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    save(tmp_path, job(net(), epoch=1, gone=2), 1)
    other = job(net(5))
    other["model"].extra = nn.Parameter(torch.zeros(1))
    other["model"][1].bias = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    other |= {"new": 3, "epoch": nn.Linear(1, 1)}
    other["opt"] = torch.optim.SGD(list(other["model"].parameters())[:2], lr=0.5)
    before = [p.detach().clone() for p in other["model"].parameters()]
    with lastgood.Checkpointer(tmp_path, **other) as ckpt, pytest.raises(MismatchError) as caught:
        ckpt.restore()
    text = str(caught.value)
    for words in (
        "step-00000001 does not fit",
        "nothing was changed",
        "model.0.weight is float32 [4, 3] in the checkpoint and float32 [5, 3] here",
        "model.0.bias is float32 [4] in the checkpoint and float32 [5] here",
        "model.1.weight is float32 [2, 4]",
        "model.1.bias is float32 [2] in the checkpoint and float64 [2] here",
        "model.extra is not in the checkpoint",
        "new is not in the checkpoint",
        "epoch was saved as a value and is a module here",
        "opt, group 0: the parameter model.1.weight was in it when it was saved",
        "strict=False",
    ):
        assert words in text
    for now, then in zip(other["model"].parameters(), before, strict=True):
        assert torch.equal(now, then)
    assert other["opt"].param_groups[0]["lr"] == 0.5


def test_not_strict_loads_what_fits_and_reports_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lastgood")
    saved = job(net(), gone={"a": 1})
    save(tmp_path, saved, 3)
    other = job(net(dtype=torch.float64))
    other["model"][0] = nn.Linear(3, 7).double()
    model = other["model"]
    other["opt"] = torch.optim.Adam(model.parameters(), lr=0.5)
    other["new"] = {"b": 2}
    kept = model[0].weight.detach().clone()
    with lastgood.Checkpointer(tmp_path, **other) as ckpt:
        assert ckpt.restore(strict=False) == 3
        assert ckpt["new"] == {"b": 2}
    assert torch.equal(model[0].weight, kept)
    assert (model[1].bias == 3).all() and model[1].bias.dtype == torch.float64
    for words in (
        "not restored: model.0.weight is float32 [4, 3]",
        "not restored: new is not in the checkpoint",
        "gone is in the checkpoint but was not given",
        "model.1.bias is float32 [2] in the checkpoint: converted to float64 [2]",
        "opt: the state of model.0.weight is not restored",
    ):
        assert words in caplog.text
    # The optimizer has no state of a wrong shape: it can go on.
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
        state = other["opt"].state.get(parameter, {})
        assert all(item.shape in (parameter.shape, ()) for item in state.values())
        assert state == {} or state["exp_avg"].dtype == torch.float64
    assert model[1].bias in other["opt"].state and model[0].weight not in other["opt"].state
    other["opt"].step()


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


SHARD, MANIFEST = "00000.safetensors", "manifest.json"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard missing": (
        lambda d: (d / SHARD).unlink(),
        r"00000\.safetensors cannot be .*(No such file|WinError 2)",
    ),
    "shard short": (lambda d: os.truncate(d / SHARD, 5000), r"00000\.safetensors has 5000 bytes instead of"),
    "shard long": (lambda d: (d / SHARD).open("ab").write(b"x"), r"00000\.safetensors has .* bytes instead of"),
    "shard empty": (lambda d: (d / SHARD).write_bytes(b""), r"00000\.safetensors has 0 bytes"),
    "last byte": (lambda d: flip(d / SHARD), r"00000\.safetensors is damaged: tensor '.*' \(bytes \d+ to \d+\)"),
    "first byte": (lambda d: flip(d / SHARD, 0), r"00000\.safetensors is damaged: its header"),
    "padding": (lambda d: flip(d / SHARD, 4000), r"00000\.safetensors is damaged: its header"),
    "shard a directory": (lambda d: ((d / SHARD).unlink(), (d / SHARD).mkdir()), r"00000\.safetensors"),
    "shard a dangling link": (lambda d: ((d / SHARD).unlink(), (d / SHARD).symlink_to("x")), "cannot be read"),
    "manifest empty": (lambda d: (d / MANIFEST).write_bytes(b""), r"manifest\.json is empty"),
    "manifest short": (lambda d: os.truncate(d / MANIFEST, 300), r"manifest\.json is cut off or was altered"),
    "manifest flipped": (lambda d: flip(d / MANIFEST, 500), r"manifest\.json was altered: its checksum"),
    "manifest a directory": (lambda d: ((d / MANIFEST).unlink(), (d / MANIFEST).mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_skipped(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, words = DAMAGES[kind]
    save(tmp_path, job(net(), n=0), 1, 2)
    damage(tmp_path / "step-00000002")
    objects = job(net(), n=0)
    with lastgood.Checkpointer(tmp_path, **objects) as ckpt:
        assert ckpt.restore() == 1
        assert {v for p in objects["model"].parameters() for v in p.reshape(-1).tolist()} == {1.0}
        with pytest.raises(LastGoodError, match=f"none that can be restored for step 2(.|\n)*{words}"):
            ckpt.restore(step=2)
    (skip, _) = [e for e in program.read_events(tmp_path) if e["event"] == "skip"]
    assert skip["checkpoint"] == "step-00000002" and "skipped step-00000002" in caplog.text
    assert [e.step for e in catalog.committed(tmp_path)] == [1, 2]


@pytest.mark.parametrize("kind", ["shard missing", "last byte", "manifest flipped"])
def test_where_none_verifies_restore_raises_and_never_starts_anew(tmp_path: Path, kind: str) -> None:
    save(tmp_path, job(net()), 1, 2)
    for step in (1, 2):
        DAMAGES[kind][0](tmp_path / f"step-0000000{step}")
    before = sorted(tmp_path.rglob("*"))
    with lastgood.Checkpointer(tmp_path, **job(net())) as ckpt:
        with pytest.raises(DamagedError) as caught:
            ckpt.restore()
        text = str(caught.value)
        for words in ("step-00000001", "step-00000002", "Nothing was deleted", "do not train on", "lastgood verify"):
            assert words in text
        with pytest.raises(LastGoodError, match=r"call restore\(\)"):
            ckpt.save(3)
    assert {p for p in before if "step-" in str(p)} <= set(tmp_path.rglob("*"))


def test_a_damaged_tensor_is_named_and_the_older_checkpoint_overwrites_all(tmp_path: Path) -> None:
    """Half of the newest was read before the damage was met: nothing of it may stay."""
    objects = job(net(64), z=torch.zeros(3000))
    save(tmp_path, objects, 1, 2)
    manifest = catalog.read_manifest(catalog.committed(tmp_path)[-1])
    chunk = manifest.tensors["opt.state.model.1.weight.exp_avg"].chunks[0]
    flip(tmp_path / "step-00000002" / SHARD, chunk.begin)
    with lastgood.Checkpointer(tmp_path, **objects) as ckpt:
        assert ckpt.restore() == 1
        values = {v for p in objects["model"].parameters() for v in p.reshape(-1).tolist()}
        assert values == {1.0}
    skips = [e["why"] for e in program.read_events(tmp_path) if e["event"] == "skip"]
    assert len(skips) == 1 and "opt.state.model.1.weight.exp_avg" in skips[0]


def test_a_new_run_has_nothing_to_restore(tmp_path: Path) -> None:
    objects = job(net())
    before = contents(objects)
    with lastgood.Checkpointer(tmp_path, **objects) as ckpt:
        assert ckpt.restore() == 0
        for step in (3, "best"):
            with pytest.raises(LastGoodError, match=r"has no checkpoint yet: restore\(step="):
                ckpt.restore(step=step)
        assert ckpt.last_step is None
    assert all(torch.equal(a, b) for a, b in zip(before, contents(objects), strict=True))


@pytest.mark.parametrize("step", ["newest", -1, 1.5, True])
def test_a_step_to_restore_is_a_number_or_best(tmp_path: Path, step: Any) -> None:
    save(tmp_path, job(net()), 1)
    with lastgood.Checkpointer(tmp_path, **job(net())) as ckpt, pytest.raises(LastGoodError, match=r"restore\(step="):
        ckpt.restore(step=step)


def test_a_roll_back_in_the_same_process(tmp_path: Path) -> None:
    seed(1)
    objects = job(net(), log=[0])
    with lastgood.Checkpointer(tmp_path, keep=lastgood.Keep(last=9), **objects) as ckpt:
        kept = {}
        for step in range(1, 5):
            objects["opt"].step()
            objects["log"].append(step)
            ckpt.save(step)
            kept[step] = contents(objects)
        assert ckpt.restore(step=2) == 2
        assert all(torch.equal(a, b) for a, b in zip(contents(objects), kept[2], strict=True))
        assert objects["log"] == [0, 1, 2]
        ckpt.save(3).result()
    with lastgood.Checkpointer(tmp_path, **objects) as ckpt:
        assert ckpt.restore() == 3
        assert [e.name for e in catalog.committed(tmp_path)][-1] == "step-00000003.g2"


def test_an_error_of_an_object_that_loads_is_told_with_its_name(tmp_path: Path) -> None:
    class Picky:
        def state_dict(self) -> dict[str, int]:
            return {"n": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise ValueError("I want more")

    with lastgood.Checkpointer(tmp_path, picky=Picky()) as ckpt:
        ckpt.save(1)
        with pytest.raises(LastGoodError, match=r"picky.*ValueError: I want more"):
            ckpt.restore()
