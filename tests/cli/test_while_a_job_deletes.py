"""Checkpoints that a job's retention deletes while a command reads them: they are gone, not damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from conftest import flip_byte

from lastgood import disk
from lastgood.manifest import NAME

Call = Callable[..., Result]
Arm = Callable[..., None]


@pytest.fixture
def vanish() -> Iterator[Arm]:
    """Delete a checkpoint when the command opens its manifest, or a data file."""

    def arm(directory: Path, ending: str = ".safetensors") -> None:
        def observe(operation: disk.Operation, when: str) -> None:
            path = operation.path
            if operation.name == "read" and path.parent == directory and path.name.endswith(ending):
                shutil.rmtree(directory, ignore_errors=True)

        disk.observer = observe

    yield arm
    disk.observer = None


@pytest.mark.parametrize("ending", [NAME, ".safetensors"])
def test_verify_does_not_call_it_damaged(call: Call, run: Path, vanish: Arm, ending: str) -> None:
    vanish(run / "step-00000200", ending)
    result = call("verify", run, "--full")
    assert result.exit_code == 0 and "DAMAGED" not in result.stdout
    assert "deleted  " in result.stdout and "3 checked, 0 damaged" in result.stdout


def test_verify_says_so_in_json_too(call: Call, run: Path, vanish: Arm) -> None:
    vanish(run / "step-00000200")
    found = {Path(r["path"]).name: r for r in json.loads(call("verify", run, "--full", "--json").stdout)}
    assert found["step-00000200"]["kind"] == "gone" and found["step-00000200"]["ok"]


def test_verify_of_a_damaged_one_beside_it_still_fails(call: Call, run: Path, vanish: Arm) -> None:
    flip_byte(run / "step-00000300" / "00000.safetensors", 5000)
    vanish(run / "step-00000200")
    result = call("verify", run, "--full")
    assert result.exit_code == 1 and "3 checked, 1 damaged" in result.stdout


def test_ls_leaves_it_out(call: Call, run: Path, vanish: Arm) -> None:
    vanish(run / "step-00000200", NAME)
    rows = json.loads(call("ls", run, "--json").stdout)
    assert {row["name"]: row["state"] for row in rows} == dict.fromkeys(
        ["step-00000100", "step-00000300", "step-00000250.g3"], "ok"
    )


def test_show_of_a_run_chooses_again(call: Call, run: Path, vanish: Arm) -> None:
    vanish(run / "step-00000250.g3", NAME)
    result = call("show", run, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["step"] == 300


@pytest.mark.parametrize("ending", [NAME, ".safetensors"])
def test_export_of_a_run_chooses_again(call: Call, run: Path, tmp_path: Path, vanish: Arm, ending: str) -> None:
    vanish(run / "step-00000250.g3", ending)
    result = call("export", run, tmp_path / "out.safetensors")
    assert result.exit_code == 0 and "of step 300" in result.stdout


@pytest.mark.parametrize("ending", [NAME, ".safetensors"])
@pytest.mark.parametrize("swap", [False, True])
def test_diff_of_a_run_chooses_again(
    call: Call, run: Path, branched: Path, vanish: Arm, ending: str, swap: bool
) -> None:
    vanish(run / "step-00000250.g3", ending)
    sides = [run, branched / "step-00000200"]
    result = call("diff", *(sides[::-1] if swap else sides))
    assert result.exit_code == 1, result.output
    vanish(run / "step-00000300", ending)
    assert call("diff", run, branched / "step-00000200").exit_code == 0


@pytest.mark.parametrize("command", ["show", "export", "diff"])
def test_one_that_was_named_itself_is_said_to_be_gone(
    call: Call, run: Path, branched: Path, tmp_path: Path, vanish: Arm, command: str
) -> None:
    named = run / "step-00000200"
    vanish(named, NAME)
    others = {"show": [], "export": [tmp_path / "out.pth"], "diff": [branched / "step-00000300"]}
    result = call(command, named, *others[command])
    assert result.exit_code == (2 if command == "diff" else 1)
    assert "was deleted while it was read" in result.output and "damaged" not in result.output
