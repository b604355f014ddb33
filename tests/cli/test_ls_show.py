"""`ls` and `show`: what is there, on which branch, and whether it is whole."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from click.testing import Result
from conftest import flip_byte, job

from lastgood import catalog, generation
from lastgood.manifest import NAME

Call = Callable[..., Result]


def listed(call: Call, run: Path) -> dict[str, dict[str, object]]:
    result = call("ls", run, "--json")
    assert result.exit_code == 0, result.output
    return {row["name"]: row for row in json.loads(result.stdout)}


def test_a_roll_back_makes_history_of_what_came_after(call: Call, branched: Path) -> None:
    rows = listed(call, branched)
    assert list(rows) == ["step-00000250.g3", "step-00000300", "step-00000200", "step-00000100"]
    assert [row["branch"] for row in rows.values()] == ["present", "history", "present", "present"]
    assert rows["step-00000250.g3"]["metrics"] == {"loss": 1 / 250}
    assert rows["step-00000250.g3"]["parent"] == "step-00000200"


def test_the_table_shows_every_column(call: Call, branched: Path) -> None:
    lines = call("ls", branched).stdout.splitlines()
    assert lines[0].split() == ["step", "generation", "branch", "time", "size", "ranks", "metrics", "state", "name"]
    assert "present" in lines[1] and "loss=0.004" in lines[1] and lines[1].endswith("ok     step-00000250.g3")
    assert "history" in lines[2]


def test_a_short_shard_is_listed_as_damaged_and_a_left_over_as_not_committed(call: Call, run: Path) -> None:
    shard = run / "step-00000200" / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    (run / "step-00000260.g3").mkdir()
    rows = listed(call, run)
    assert rows["step-00000200"]["state"] == "damaged" and "bytes instead of" in str(rows["step-00000200"]["damage"])
    assert rows["step-00000260.g3"]["state"] == "uncommitted"
    assert rows["step-00000300"]["state"] == "ok"
    assert "DAMAGED" in call("ls", run).stdout


def test_a_mirror_is_listed_like_a_run(call: Call, tmp_path: Path) -> None:
    job(tmp_path / "run", [1, 2], mirror=tmp_path / "mirror")
    assert [row["branch"] for row in listed(call, tmp_path / "mirror").values()] == ["present", "present"]


def test_a_directory_that_is_no_run_is_refused_in_one_sentence(call: Call, tmp_path: Path) -> None:
    result = call("ls", tmp_path)
    assert result.exit_code == 1
    assert "is not a run" in result.stderr and "Traceback" not in result.output


def test_ten_thousand_checkpoints_are_listed_in_seconds(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job(run, [1])
    body = (run / "step-00000001" / NAME).read_bytes()
    for step in range(2, 10_001):
        directory = run / catalog.directory_name(step, 1)
        directory.mkdir()
        (directory / NAME).write_bytes(body)
    began = time.monotonic()
    result = call("ls", run)
    assert time.monotonic() - began < 10
    assert result.exit_code == 0 and "9900 older ones" in result.stderr
    assert len(result.stdout.splitlines()) == 101


def test_branches_are_known_after_many_restarts(call: Call, run: Path) -> None:
    for _ in range(20):
        job(run, [])
    assert generation.base(run, 3) == "step-00000200"
    assert listed(call, run)["step-00000300"]["branch"] == "history"


def test_show_names_objects_tensors_command_and_parent(call: Call, branched: Path) -> None:
    output = call("show", branched).stdout
    for text in ("step-00000250.g3", "step-00000200", "loss=0.004", "model.0.weight", "16×8", "512 B", "scalar"):
        assert text in output
    data = json.loads(call("show", branched / "step-00000300", "--json").stdout)
    assert data["tensors"]["model.0.weight"] == {
        "dtype": "F32",
        "shape": [16, 8],
        "bytes": 512,
        "object": "model",
        "shards": ["00000.safetensors"],
    }
    assert data["objects"]["optimizer"]["kind"] == "optimizer"
    assert data["tensors"]["optimizer.state.model.0.weight.exp_avg"]["object"] == "optimizer"


def test_show_tells_which_ranks_have_their_own_version(call: Call, two_ranks: Path) -> None:
    data = json.loads(call("show", two_ranks, "--json").stdout)
    assert data["world_size"] == 2
    assert data["ranks"]["1"] == {"random": True, "objects": ["note"], "tensors": ["own"]}
    assert data["tensors"]["rank1/own"]["object"] == "own"


def test_show_works_when_the_data_are_damaged_and_says_so(call: Call, run: Path) -> None:
    (run / "step-00000250.g3" / "00000.safetensors").unlink()
    result = call("show", run)
    assert result.exit_code == 0
    assert "model.0.weight" in result.stdout and "cannot be read" in result.stderr


def test_show_refuses_an_altered_manifest(call: Call, run: Path) -> None:
    flip_byte(run / "step-00000250.g3" / NAME, 200)
    result = call("show", run)
    assert result.exit_code == 1 and "was altered" in result.stderr
