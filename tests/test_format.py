"""The format on disk: docs/format.md suffices to read it, and what was written in version 1 stays readable."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lastgood
from lastgood import shard, values
from lastgood.manifest import DTYPE_BYTES

FIXTURES = Path(__file__).parent / "fixtures"
FORMAT_1 = FIXTURES / "format-1"
DOCUMENT = Path(__file__).parent.parent / "docs" / "format.md"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FIXTURES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


make, reader = module("make_format_1"), module("reader")
make.objects(0)  # What torch imports at the first step is imported before ranks are forked.


def forked(action: Any, *arguments: Any) -> None:
    """Run `action` as two ranks."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=action, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A copy of the run that format version 1 wrote once."""
    return Path(shutil.copytree(FORMAT_1, tmp_path / "run"))


def blank(rank: int) -> dict[str, Any]:
    """Objects built as the fixture's were, with other values."""
    objects: dict[str, Any] = make.objects(rank)
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in objects["model"].state_dict().values():
            tensor.zero_()
    return {**objects, "values": {}, "own": torch.zeros(5, dtype=torch.int64), "name": ""}


NUMPY_GOES_ON = [[319379928, 1909383912, 1697326059, 433635927], [1870555526, 186459401, 939337812, 15174415]]


def restore_as_rank(rank: int, run: Path) -> None:
    expected = make.objects(rank)
    numbers = torch.rand(3)  # The stored run was saved at this point of the random sequence.
    objects = blank(rank)
    with lastgood.Checkpointer(run, rank=rank, world_size=2, **objects) as checkpointer:
        assert checkpointer.restore() == 15
        assert checkpointer["name"] == f"rank {rank}"
        assert torch.equal(torch.rand(3), numbers)
        # Of the form in which numpy's state was written first; another reader of the same file gave these numbers.
        assert np.random.randint(0, 2**31, 4).tolist() == NUMPY_GOES_ON[rank]
    assert torch.equal(objects["own"], expected["own"])
    same_model(objects["model"], expected["model"])


def same_model(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    for name, tensor in expected.state_dict().items():
        # The fixture was computed on another machine: its last bits may differ from this one's. The gradient of the
        # last layer is zero but for rounding errors, and Adam makes a whole step, up or down, of each.
        atol = 0.26 if name == "2.weight" else 1e-5
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-4, atol=atol)


def test_two_ranks_restore_the_stored_run(stored: Path) -> None:
    forked(restore_as_rank, stored)


def test_one_process_restores_the_stored_run_with_values_of_every_type(stored: Path) -> None:
    objects, expected = blank(0), make.objects(0)
    del objects["own"]
    with lastgood.Checkpointer(stored, rank=0, world_size=1, **objects) as checkpointer:
        assert checkpointer.restore() == 15
    same_model(objects["model"], expected["model"])
    assert objects["optimizer"].param_groups[0]["lr"] == 0.125
    found, wanted = objects["values"], make.values()
    for name in ("half", "empty"):
        left, right = found.pop(name), wanted.pop(name)
        assert left.dtype == right.dtype and torch.equal(left, right)
    assert found.pop("path").parts == wanted.pop("path").parts
    assert found == wanted
    assert {name: type(value) for name, value in found.items()} == {name: type(v) for name, v in wanted.items()}
    assert found["deque"].maxlen == 5 and found["default"].default_factory is list


def test_the_stored_run_falls_back_along_its_branch(stored: Path) -> None:
    (stored / "step-00000015.g3" / "00000.safetensors").write_bytes(b"")
    objects = blank(0)
    del objects["own"]
    with lastgood.Checkpointer(stored, rank=0, world_size=1, **objects) as checkpointer:
        assert checkpointer.restore() == 10  # Not 20: that is history.


def test_a_reader_made_from_the_document_alone_reads_the_stored_run() -> None:
    done = subprocess.run([sys.executable, str(FIXTURES / "reader.py"), str(FORMAT_1)], capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert found["name"] == "step-00000015.g3"
    assert found["tensors"]["model.2.bias"]["shape"] == [4]
    assert found["tensors"]["own"]["numbers"] == [0, 1, 2, 3, 4]
    assert found["tensors"]["rank1/own"]["numbers"] == [100, 101, 102, 103, 104]
    assert found["tensors"]["values.half"] == {"dtype": "BF16", "shape": [2], "numbers": [1.5, -2.0]}
    assert found["manifest"]["ranks"]["1"]["local"] == {"own": "rank1/own"}


def test_the_reader_gets_every_value_that_python_has(stored: Path) -> None:
    found = reader.read(stored)["objects"]["values"]
    expected = make.values()
    for name in ("none", "numbers", "text", "tuple", "int keys", "ordered", "counter", "default", "sets", "bytes"):
        assert found[name] == expected[name], name
    assert found["deque"] == ("deque", [1, 2]) and found["ranges"][0] == ("range", [1, 9, 2])
    assert found["torch"] == [("Size", [2, 3]), ("dtype", "bfloat16"), ("device", "cpu")]


def test_the_reader_follows_the_branches_and_notices_damage(stored: Path) -> None:
    assert list(reader.history(stored)) == ["step-00000015.g3", "step-00000010"]
    path = stored / "step-00000015.g3" / "00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert reader.read(stored)["name"] == "step-00000010"


def save_large(rank: int, run: Path) -> None:
    tensor = torch.nn.Parameter(torch.arange(1000 * 301, dtype=torch.float64).reshape(1000, 301))
    # Under an optimizer: what nothing changes goes whole into a file of its own.
    objects = {"t": torch.nn.ParameterList([tensor]), "sgd": torch.optim.SGD([tensor])}
    with lastgood.Checkpointer(run, rank=rank, world_size=2, replicated=["*"], **objects) as checkpointer:
        checkpointer.restore()
        checkpointer.save(1).result()


def test_the_reader_puts_a_tensor_together_from_its_chunks(tmp_path: Path) -> None:
    forked(save_large, tmp_path / "run")
    found = reader.read(tmp_path / "run")
    assert len(found["manifest"]["tensors"]["t.0"][2]) == 2
    assert found["tensors"]["t.0"]["numbers"] == list(range(1000 * 301))


def test_shards_are_plain_safetensors_files() -> None:
    tensors = load_file(FORMAT_1 / "step-00000010" / "00000.safetensors")
    assert torch.equal(tensors["own"], torch.arange(5))


def test_the_document_names_every_type_key_and_version() -> None:
    text = DOCUMENT.read_text("utf-8")
    for name in DTYPE_BYTES:
        assert re.search(rf"\b{name}\b", text), name
    tree = values.encode(make.values(), "", lambda name, tensor: name)
    kinds = set(re.findall(r'"\$": "(\w+)"', json.dumps(tree))) | {"numpy", "ndarray"}
    assert len(kinds) >= 19
    for kind in kinds:
        assert f"`{kind}`" in text, kind
    manifest = json.loads((FORMAT_1 / "step-00000010" / "manifest.json").read_text())["manifest"]
    for key in manifest:
        assert f"`{key}`" in text, key
    assert f"multiple of {shard.PAGE}" in text
    for event in (FORMAT_1 / "events.jsonl").read_text().splitlines():
        assert f"`{json.loads(event, parse_constant=pytest.fail)['event']}`" in text


def test_the_log_is_json_also_with_an_infinite_metric(tmp_path: Path) -> None:
    with lastgood.Checkpointer(tmp_path / "run", rank=0, world_size=1, x=1) as checkpointer:
        checkpointer.restore()
        checkpointer.save(1, metrics={"loss": float("nan"), "worst": float("inf")})
    (line,) = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    event = json.loads(line, parse_constant=pytest.fail)
    assert event["metrics"]["worst"] == {"$": "float", "v": "inf"}


def test_the_stored_run_is_small() -> None:
    assert sum(path.stat().st_size for path in FORMAT_1.rglob("*") if path.is_file()) < 200_000
