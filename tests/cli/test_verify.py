"""`verify`: every kind of damage is found and named, and the exit code says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from click.testing import Result
from conftest import flip_byte

from lastgood.manifest import NAME

Call = Callable[..., Result]


def test_a_good_run_has_exit_code_0(call: Call, branched: Path, two_ranks: Path) -> None:
    assert call("verify", branched, two_ranks, "--full").exit_code == 0


def test_a_changed_byte_is_found_by_the_full_check_only_and_its_tensor_named(call: Call, run: Path) -> None:
    shard = run / "step-00000300" / "00000.safetensors"
    flip_byte(shard, shard.stat().st_size - 1)
    quick = call("verify", run)
    assert quick.exit_code == 0 and "--full reads every byte" in quick.stdout
    full = call("verify", run, "--full")
    assert full.exit_code == 1
    assert "step-00000300" in full.stdout and "tensor 'optimizer." in full.stdout
    assert "4 checked, 1 damaged" in full.stdout


def test_all_damage_is_named_not_only_the_first(call: Call, run: Path) -> None:
    shard = run / "step-00000300" / "00000.safetensors"
    flip_byte(shard, 20)
    flip_byte(shard, 4200)
    flip_byte(shard, shard.stat().st_size - 1)
    (found,) = json.loads(call("verify", run / "step-00000300", "--full", "--json").stdout)
    assert len(found["damage"]) == 3 and "the header" in found["damage"][0]


def test_an_altered_manifest_and_a_missing_one_are_damage(call: Call, run: Path) -> None:
    flip_byte(run / "step-00000100" / NAME, 300)
    assert call("verify", run / "step-00000100").exit_code == 1
    (run / "step-00000200" / NAME).unlink()
    result = call("verify", run / "step-00000200")
    assert result.exit_code == 1 and "no manifest" in result.stdout


def test_what_a_dead_save_left_in_a_run_is_no_damage(call: Call, run: Path) -> None:
    (run / "step-00000260.g3").mkdir()
    result = call("verify", run)
    assert result.exit_code == 0 and "not committed" in result.stdout


def test_a_copied_checkpoint_is_checked_under_any_name(call: Call, branched: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(branched / "step-00000300", tmp_path / "best")
    assert call("verify", copy, "--full").exit_code == 0
    flip_byte(copy / "00000.safetensors", 5000)
    assert call("verify", copy, "--full").exit_code == 1


def test_single_files_are_checked(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.arange(1000.0)}, path)
    assert call("verify", path).exit_code == 0
    flip_byte(path, path.stat().st_size // 2)
    result = call("verify", path)
    assert result.exit_code == 1 and str(path) in result.stdout


def test_a_path_that_is_nothing_to_check_is_a_usage_error(call: Call, tmp_path: Path) -> None:
    assert call("verify", tmp_path).exit_code == 2
    assert call("verify", tmp_path / "missing").exit_code == 2
