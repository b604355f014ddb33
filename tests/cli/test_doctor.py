"""`doctor`: what a file system cannot do is said, and what it is known not to do."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
from click.testing import Result

from lastgood import disk
from lastgood.cli import filesystem, probes
from lastgood.cli.filesystem import Mount, parse_mountinfo, parse_mounts, risk_of

Call = Callable[..., Result]
MOUNTS = """\
22 28 0:21 / /proc rw,nosuid shared:5 - proc proc rw
28 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw
40 28 0:35 / /data rw shared:9 - nfs4 server:/export rw
41 40 0:36 / /data/my\\040runs rw shared:10 - xfs /dev/sdb1 rw
"""


@pytest.fixture(autouse=True)
def observer() -> Iterator[None]:
    yield
    disk.observer = None


@pytest.fixture(autouse=True)
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the tests' directory lies, it counts as ext4."""
    monkeypatch.setattr(probes, "mount_of", lambda path: Mount("ext4", "/", "/dev/sda1"))


def levels(result: Result) -> dict[str, str]:
    return {finding["name"]: finding["level"] for finding in json.loads(result.stdout)["findings"]}


def refuse(name: str, code: int) -> None:
    def watch(operation: disk.Operation, moment: Literal["before", "after"]) -> None:
        if operation.name == name and moment == "before":
            raise OSError(code, "refused by the test", str(operation.path))

    disk.observer = watch


def test_a_good_directory_passes_and_is_left_as_it_was(call: Call, tmp_path: Path) -> None:
    result = call("doctor", tmp_path, "--megabytes", 1, "--json")
    assert result.exit_code == 0, result.output
    assert set(levels(result).values()) <= {"ok", "note", "risk"}
    assert len(levels(result)) >= 11
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_one_sentence(call: Call, tmp_path: Path) -> None:
    refuse("mkdir", errno.EROFS)
    result = call("doctor", tmp_path)
    assert result.exit_code == 1 and "cannot be written" in result.stderr


def test_a_missing_promise_makes_exit_code_1(call: Call, tmp_path: Path) -> None:
    refuse("sync", errno.EIO)
    result = call("doctor", tmp_path, "--megabytes", 1, "--json")
    assert result.exit_code == 1
    assert levels(result)["sync"] == "broken" and levels(result)["atomic replace"] == "broken"


def test_no_hard_links_is_a_note(call: Call, tmp_path: Path) -> None:
    refuse("link", errno.EPERM)
    result = call("doctor", tmp_path, "--megabytes", 1, "--json")
    assert result.exit_code == 0 and levels(result)["hard links"] == "note"


@pytest.mark.parametrize("answer", ["free", "held"])
def test_locks_that_exclude_nobody_or_are_never_dropped_are_found(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(probes, "_other_process", lambda path: answer)
    result = call("doctor", tmp_path, "--megabytes", 1, "--json")
    assert result.exit_code == 1 and levels(result)["locks"] == "broken"


def test_memory_is_no_place_for_runs(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "mount_of", lambda path: Mount("tmpfs", "/dev/shm", "tmpfs"))
    result = call("doctor", tmp_path, "--megabytes", 1)
    assert result.exit_code == 1 and "is memory" in result.stdout


@pytest.mark.parametrize(
    ("path", "kind"), [("/home/me", "ext4"), ("/data/x", "nfs4"), ("/data/my runs/a", "xfs"), ("/database", "ext4")]
)
def test_the_innermost_mount_counts(path: str, kind: str) -> None:
    mount = parse_mountinfo(MOUNTS, Path(path))
    assert mount is not None and mount.type == kind


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "vfat", "exfat", "9p", "overlay", "fuse.sshfs", "fuse.rclone"])
def test_each_weak_file_system_is_named_with_its_risk(kind: str) -> None:
    risk = risk_of(Mount(kind, "/x", "y"))
    assert risk is not None and risk[0] == "risk" and kind in risk[1]


MOUNTS_OF_MACOS = """\
/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)
devfs on /dev (devfs, local, nobrowse)
/dev/disk3s5 on /System/Volumes/Data (apfs, local, journaled, nobrowse, protect, root data)
map auto_home on /System/Volumes/Data/home (autofs, automounted, nobrowse)
//me@nas._smb._tcp.local/runs on /Volumes/my runs (smbfs, nodev, nosuid, mounted by me)
/dev/disk5s1 on /Volumes/STICK (1) (exfat, local, nodev, nosuid, noowners, fskit)
store@macfuse0 on /Volumes/cloud (macfuse, nodev, nosuid, synchronous, mounted by me)
"""


@pytest.mark.parametrize(
    ("path", "kind", "level"),
    [
        ("/Users/me/runs", "apfs", None),
        ("/Volumes/my runs/voice", "smbfs", "risk"),
        ("/Volumes/my", "apfs", None),
        ("/Volumes/STICK (1)/voice", "exfat", "risk"),
        ("/Volumes/cloud", "macfuse", "risk"),
    ],
)
def test_what_mount_prints_on_macos_is_understood(path: str, kind: str, level: str | None) -> None:
    mount = parse_mounts(MOUNTS_OF_MACOS, Path(path))
    assert mount is not None and mount.type == kind
    risk = risk_of(mount)
    assert (risk and risk[0]) == level


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX: Windows is asked in another way")
def test_without_proc_the_command_mount_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mount").write_text("#!/bin/sh\necho '/dev/disk3s1s1 on / (apfs, sealed, local)'\n")
    (tmp_path / "mount").chmod(0o755)
    monkeypatch.setattr(filesystem, "_MOUNTS", tmp_path / "no proc")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert filesystem.mount_of(tmp_path) == Mount("apfs", "/", "/dev/disk3s1s1")
    monkeypatch.setenv("PATH", "/nowhere")
    assert filesystem.mount_of(tmp_path) is None


def test_folders_that_a_cloud_program_copies_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "OneDrive - Company" / "runs"
    folder.mkdir(parents=True)
    assert filesystem.synchronised_folder(folder) == str(folder.parent)
    assert filesystem.synchronised_folder(tmp_path) is None
    monkeypatch.setenv("OneDrive", str(tmp_path))
    assert filesystem.synchronised_folder(tmp_path / "runs") == str(tmp_path)
