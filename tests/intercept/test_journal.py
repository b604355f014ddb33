"""`lastgood verify` on what `lastgood run` saved: each damaged file has exit code 1 and its name."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from test_run import start

from lastgood.cli import main
from lastgood.intercept.runtime.journal import Version, checksum
from lastgood.intercept.runtime.journal import read as read_versions
from lastgood.intercept.runtime.journal import write as write_versions

PROGRAM = """
    import json, os
    import numpy, torch
    from safetensors.torch import save_file

    os.makedirs("logs/训练", exist_ok=True)
    for step in (1, 2):
        torch.save({"step": step, "w": torch.randn(1000)}, "last.pth")
    save_file({"w": torch.randn(1000)}, "model.safetensors")
    torch.save({"w": torch.randn(1000)}, "logs/训练/G_1.pth")
    torch.save({"w": torch.randn(1000)}, "old.pth", _use_new_zipfile_serialization=False)
    numpy.savez("state.npz", a=numpy.random.rand(1000))
    numpy.save("state.npy", numpy.random.rand(1000))
    with open("state.json", "w") as file:
        json.dump({"text": "x" * 1000}, file)
    with open("open.pth", "wb") as file:
        torch.save({"w": torch.randn(1000)}, file)
"""
FILES = [
    *("last.pth", "open.pth", "old.pth", "logs/训练/G_1.pth", "model.safetensors"),
    *("state.npy", "state.npz", "state.json"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    code, output = start(directory, PROGRAM)
    assert code == 0, output
    return directory


@pytest.fixture
def saved(made: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage. Hard links become files of their own, as on a file system without them."""
    return Path(shutil.copytree(made, tmp_path / "saved"))


def verify(directory: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["verify", str(directory), *options], env={"LASTGOOD_LANG": "en"})


def test_what_was_saved_is_found_good(saved: Path) -> None:
    result = verify(saved, "--json")
    assert result.exit_code == 0, result.output
    found = {Path(entry["path"]).relative_to(saved).as_posix() for entry in json.loads(result.stdout)}
    assert {name for name in found if not name.startswith(".lastgood/history/last.pth.")} == set(FILES)
    assert len(found) == len(FILES) + 1


def test_the_journal_tells_size_checksum_time_rank_and_program(tmp_path: Path) -> None:
    before = time.time()
    code, output = start(tmp_path, "import json, torch; torch.save([1], 'last.pth')", RANK="0", WORLD_SIZE="2")
    assert code == 0, output
    (version,) = read_versions(str(tmp_path / "last.pth"))
    assert version.size == (tmp_path / "last.pth").stat().st_size
    assert version.crc32 == checksum(str(tmp_path / "last.pth"), version.begins)[1]
    assert before <= version.time <= time.time()
    assert (version.rank, version.program) == (0, "script.py")


@pytest.mark.parametrize("damage", ["a changed byte", "cut off", "emptied"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(saved: Path, name: str, damage: str) -> None:
    path = saved / name
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 0x10
    path.write_bytes({"a changed byte": data, "cut off": data[: len(data) // 2], "emptied": b""}[damage])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # A disk that fails leaves no date.
    result = verify(saved)
    assert result.exit_code == 1
    (line,) = [line for line in result.stdout.splitlines() if "DAMAGED" in line]
    assert str(path) in line
    assert f"{len(FILES) + 1} checked, 1 damaged" in result.stdout


def test_a_damaged_earlier_version_is_named(saved: Path) -> None:
    (kept,) = (saved / ".lastgood" / "history").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    result = verify(saved)
    assert result.exit_code == 1 and f"DAMAGED  {kept}" in result.stdout


def test_a_file_that_was_deleted_is_no_damage(saved: Path) -> None:
    (saved / "last.pth").unlink()
    assert verify(saved).exit_code == 0


def test_a_directory_without_a_journal_is_a_usage_error(tmp_path: Path) -> None:
    result = verify(tmp_path)
    assert result.exit_code == 2 and "saved nothing there" in result.stderr


def test_a_directory_above_those_with_journals_is_checked(saved: Path, tmp_path: Path) -> None:
    result = verify(tmp_path, "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)) == len(FILES) + 1
    path = saved / "logs" / "训练" / "G_1.pth"
    path.write_bytes(path.read_bytes()[:-1])
    result = verify(saved / "logs")
    assert result.exit_code == 1 and str(path) in result.stdout


@pytest.mark.parametrize("many", [1, 5, 200])
def test_the_last_whole_line_of_a_journal_counts(tmp_path: Path, many: int) -> None:
    """However long it is, and whatever a crash left behind it."""
    target = str(tmp_path / "last.pth")
    (tmp_path / ".lastgood").mkdir()
    for first in (0, 1000):
        expected = [Version(first + number, number, 1.0, kept=f"{number}.pth") for number in range(many)]
        write_versions(target, expected)
        assert read_versions(target) == expected
    journal = tmp_path / ".lastgood" / "last.pth.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole.splitlines()[-1][: 9000 if many == 200 else 20])
    assert read_versions(target) == expected
    journal.write_bytes(b"")
    assert read_versions(target) == []
