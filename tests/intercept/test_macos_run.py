"""`lastgood run` as it is on macOS, as far as Linux can play it: no /proc, a name that changes, files beside files."""

from __future__ import annotations

import ctypes
import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_run import posix, start

from lastgood.intercept.runtime import journal, system, unfinished

pytestmark = posix


@pytest.fixture
def no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    real = io.open

    def open_file(path: Any, *arguments: Any, **named: Any) -> Any:
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(path)
        return real(path, *arguments, **named)

    monkeypatch.setattr(system, "open_file", open_file)


def test_a_process_is_told_from_a_later_one_without_proc(no_proc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    time.sleep(1.1)  # A start is told in seconds.
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as later:
        mine, its = system.birth(os.getpid()), system.birth(later.pid)
        monkeypatch.setenv("TZ", "Asia/Shanghai")
        monkeypatch.setenv("LC_ALL", "C.UTF-8")
        assert (system.birth(os.getpid()), system.birth(later.pid)) == (mine, its), "wherever it is asked"
        assert mine and its and mine != its
        assert unfinished.lives({"pid": later.pid, "birth": its})
        assert not unfinished.lives({"pid": later.pid, "birth": mine}), "another one had this pid"
        assert unfinished.lives({"pid": later.pid, "birth": ""}), "a system that did not say it"
        later.communicate(b"\n")
    assert not unfinished.lives({"pid": later.pid, "birth": its})


def test_a_process_that_has_ended_and_was_not_asked_for_its_code_is_dead_without_proc(no_proc: None) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        os.kill(child, 0)  # There it is still.
        assert not system.is_alive(child) and system.is_alive(os.getpid())
    finally:
        os.waitpid(child, 0)


def test_where_ps_does_not_answer_a_process_counts_as_alive(no_proc: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert system.birth(os.getpid()) == ""
    assert unfinished.lives({"pid": os.getpid(), "birth": "Mon Nov 23 18:00:00 2026"})


def test_a_mac_that_changes_its_name_is_the_same_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Darwin:
        platform = "darwin"

        def __getattr__(self, name: str) -> Any:
            return getattr(sys, name)

    class Library:
        def __init__(self, _: None) -> None: ...

        def gethostuuid(self, number: Any, wait: Any) -> int:
            assert list(wait) == [1, 0]
            number[:] = bytes(range(16))
            return 0

    monkeypatch.setattr(system, "sys", Darwin())
    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(system, "is_alive", lambda pid: False)
    system._hardware.cache_clear()
    try:
        monkeypatch.setattr(socket, "gethostname", lambda: "book.local")
        left = Path(system.temporary(str(tmp_path / "last.pth")))
        left.write_bytes(b"half")
        left.rename(left.with_name(left.name.replace(f"-{os.getpid()}-", "-99999-")))
        monkeypatch.setattr(socket, "gethostname", lambda: "book-2.lan")
        assert system.host() == bytes(range(16)).hex()
        system.clear_leftovers(str(tmp_path))
        assert not list((tmp_path / ".lastgood").iterdir())
        system._hardware.cache_clear()
        monkeypatch.setattr(Library, "gethostuuid", lambda *_: -1)
        assert system.host() == "book-2.lan", "a system that does not say it"
    finally:
        system._hardware.cache_clear()


def test_files_of_macos_beside_checkpoints_are_none(tmp_path: Path) -> None:
    """Finder's view of a directory, and what an exFAT or network drive keeps beside each file."""
    save = """
        import os, torch
        os.makedirs("checkpoint-1", exist_ok=True)
        for value in (1, 2):
            torch.save([value], "checkpoint-1/model.pth")
    """
    assert start(tmp_path, save, "--complete", "checkpoint-*")[0] == 0
    here = tmp_path / "checkpoint-1"
    (here / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    for path in [here / "model.pth", *(here / ".lastgood").iterdir(), here / ".lastgood"]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    assert [finding.path for finding in journal.verify(str(tmp_path)) if "._" in finding.path] == []
    assert unfinished.files_of(str(tmp_path), ["checkpoint-1"]) == ["checkpoint-1/model.pth"]
    model = here / "model.pth"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 255
    model.write_bytes(data)
    load = "import torch; print(torch.load('checkpoint-1/model.pth'))"
    code, output = start(tmp_path, load, "--complete", "checkpoint-*", "--fallback")
    assert code == 0 and "[1]" in output, "it stands alone, so that its earlier version fits"
    delete = "import os, shutil; shutil.rmtree('checkpoint-1'); print(os.listdir())"
    code, output = start(tmp_path, delete, "--complete", "checkpoint-*")
    assert code == 0 and "checkpoint-1" not in output.splitlines()[0] and not here.exists(), output


def test_a_new_file_gets_the_group_of_the_one_that_it_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file on macOS is its directory's group's, whatever the group of the program."""
    given: list[tuple[int, int]] = []
    (tmp_path / "old").write_bytes(b"")
    (tmp_path / "new").write_bytes(b"")
    real = os.stat

    def stat(path: Any) -> os.stat_result:
        found = list(real(path))
        found[5] = os.getegid() if str(path).endswith("old") else os.getegid() + 1  # st_gid
        return os.stat_result(found)

    monkeypatch.setattr(system, "stat", stat)
    monkeypatch.setattr(os, "chown", lambda path, user, group: given.append((user, group)))
    system.copy_owner(str(tmp_path / "old"), str(tmp_path / "new"))
    assert given == [(os.getuid(), os.getegid())]
