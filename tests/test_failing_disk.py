"""A disk that is full, read-only or broken: the training lives, the last good checkpoint stays, nothing is silent."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lastgood
from lastgood import Keep, LastGoodError, SaveError, catalog, disk, program


@pytest.fixture(autouse=True)
def observer() -> Iterator[None]:
    yield
    disk.observer = None


def refuse(name: str, number: int, *, suffix: str = "", after_bytes: int = 0) -> None:
    """From now on every operation of that name, on files that end in `suffix`, fails in the middle."""

    def watch(operation: disk.Operation, moment: str) -> None:
        path = str(operation.path)
        if (operation.name, moment) != (name, "before") or "step-" not in path or not path.endswith(suffix):
            return
        if after_bytes and operation.file is not None and operation.data is not None:
            operation.file.write(operation.data[:after_bytes])
        raise OSError(number, os.strerror(number), path)

    disk.observer = watch


def committed(run: Path) -> list[int]:
    return [entry.step for entry in catalog.committed(run)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("create", ".safetensors"),
        ("write", ".safetensors"),
        ("sync", ".safetensors"),
        ("write", "manifest.json.tmp"),
        ("replace", "manifest.json"),
    ],
)
def test_a_failed_save_leaves_the_last_good_one_and_gives_its_space_back(
    tmp_path: Path, name: str, suffix: str, number: int
) -> None:
    state = {"w": torch.arange(100.0)}
    with lastgood.Checkpointer(tmp_path, **state) as ckpt:
        ckpt.save(1).result()
        refuse(name, number, suffix=suffix, after_bytes=10)
        with pytest.raises(SaveError, match=r"step 2 was not saved: .*untouched") as caught:
            ckpt.save(2).result()
        assert os.strerror(number) in str(caught.value) and isinstance(caught.value.__cause__, OSError)
        assert [entry.step for entry in catalog.entries(tmp_path)] == [1]
        disk.observer = None
        ckpt.save(2).result()  # The same step again, under a name that was never used.
        ckpt.save(3)
    assert committed(tmp_path) == [1, 2, 3]
    failed = [event for event in program.read_events(tmp_path) if event["event"] == "save-failed"]
    assert len(failed) == 1 and os.strerror(number) in failed[0]["why"]


def test_three_failures_in_a_row_raise_and_the_caller_may_go_on(tmp_path: Path) -> None:
    with lastgood.Checkpointer(tmp_path, w=torch.zeros(3)) as ckpt:
        refuse("write", errno.ENOSPC)
        for step in (1, 2, 3):
            ckpt.save(step).wait()
        with pytest.raises(SaveError, match=r"last 3 saves failed.*No space left.*without a net"):
            ckpt.save(4)
        disk.observer = None
        ckpt.save(4).result()
    assert committed(tmp_path) == [4]


def test_after_three_failures_a_restore_begins_anew(tmp_path: Path) -> None:
    with lastgood.Checkpointer(tmp_path, w=torch.zeros(3)) as ckpt:
        ckpt.save(1).result()
        refuse("write", errno.ENOSPC)
        for step in (2, 3, 4):
            ckpt.save(step).wait()
        disk.observer = None
        assert ckpt.restore() == 1
        ckpt.save(2).result()
    assert committed(tmp_path) == [1, 2]


def test_close_raises_for_a_failed_last_save_unless_somebody_knows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ckpt = lastgood.Checkpointer(tmp_path, w=torch.zeros(3))
    refuse("write", errno.ENOSPC)
    ckpt.save(1)
    with pytest.raises(SaveError, match="step 1 was not saved"):
        ckpt.close()
    ckpt.close()
    assert "step 1 was not saved" in caplog.text
    disk.observer = None
    with lastgood.Checkpointer(tmp_path, w=torch.zeros(3)) as ckpt:
        refuse("write", errno.ENOSPC)
        with pytest.raises(SaveError):
            ckpt.save(1, blocking=True).result()


def test_too_little_space_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lastgood.Checkpointer(tmp_path, w=torch.zeros(1000)) as ckpt:
        ckpt.save(1).result()
        monkeypatch.setattr(disk, "free_bytes", lambda path: 3 << 20)
        with pytest.raises(SaveError, match=r"has 3\.0 MiB left, and the save needs 4\.0 MiB.*last good.*stays"):
            ckpt.save(2).result()
        assert [entry.step for entry in catalog.entries(tmp_path)] == [1]
        monkeypatch.undo()
        ckpt.save(2)
    assert committed(tmp_path) == [1, 2]


def test_space_is_made_from_old_checkpoints_but_two_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = Keep(last=4)
    with lastgood.Checkpointer(tmp_path, keep=keep, w=torch.zeros(1000)) as ckpt:
        for step in range(1, 7):
            ckpt.save(step)
        ckpt.save(7).result()
        ckpt._finish_save()
        assert committed(tmp_path) == [4, 5, 6, 7]
        # A disk on which only what this run gives back is free: enough after one deletion, then never enough.
        monkeypatch.setattr(disk, "free_bytes", lambda path: (6 - len(catalog.committed(tmp_path))) * (2 << 20) - 1)
        ckpt.save(8).result()
        ckpt._finish_save()
        assert committed(tmp_path) == [5, 6, 7, 8]
        monkeypatch.setattr(disk, "free_bytes", lambda path: (3 - len(catalog.committed(tmp_path))) * (2 << 20) - 1)
        with pytest.raises(SaveError, match="the save needs"):
            ckpt.save(9).result()
    # 8 was not read back yet: what was, and the one before that, stay with it.
    assert committed(tmp_path) == [6, 7, 8]
    whys = [e["why"] for e in program.read_events(tmp_path) if e["event"] == "delete"]
    assert "the disk has too little space for the next save" in whys


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def watch(operation: disk.Operation, moment: str) -> None:
        if operation.name == "append":
            raise OSError(errno.ENOSPC, "No space left on device")

    caplog.set_level(logging.WARNING, "lastgood")
    disk.observer = watch
    with lastgood.Checkpointer(tmp_path, w=torch.zeros(3)) as ckpt:
        ckpt.save(1).result()
    assert committed(tmp_path) == [1] and "events.jsonl could not be written" in caplog.text


def test_a_text_that_is_no_unicode_reaches_the_log(tmp_path: Path) -> None:
    """Names of files need not be: a log that refused them would leave a save undecided."""
    with lastgood.Checkpointer(tmp_path, w=torch.zeros(3)) as ckpt:

        def watch(operation: disk.Operation, moment: str) -> None:
            if operation.name == "write":
                raise OSError(errno.EIO, "Input/output error", "disk-\udcff")

        disk.observer = watch
        with pytest.raises(SaveError, match="step 1 was not saved"):
            ckpt.save(1).result(timeout=20)
        disk.observer = None
        ckpt.save(1).result()
    whys = [event["why"] for event in program.read_events(tmp_path) if event["event"] == "save-failed"]
    assert len(whys) == 1 and "disk-" in whys[0]


def test_a_save_that_is_skipped_says_so(tmp_path: Path) -> None:
    go = threading.Event()

    def hold(operation: disk.Operation, moment: str) -> None:
        if operation.name == "write" and "step-" in str(operation.path):
            go.wait(20)

    with lastgood.Checkpointer(tmp_path, w=torch.zeros(3), busy="skip") as ckpt:
        disk.observer = hold
        first = ckpt.save(1)
        second = ckpt.save(2)
        assert second.state == "skipped" and second.done()
        with pytest.raises(SaveError, match=r"step 2 was not saved: the save before it was still under way"):
            second.result()
        with pytest.raises(SaveError, match=r"step 1 is still under way after 0\.01 s"):
            first.result(timeout=0.01)
        go.set()
        first.result()
        ckpt.save(3)
    assert committed(tmp_path) == [1, 3]


def test_a_run_that_vanishes_is_an_error_of_the_save(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ckpt = lastgood.Checkpointer(run, w=torch.zeros(3))
    ckpt.save(1).result()
    ckpt._finish_save()
    run.rename(tmp_path / "moved")
    with pytest.raises(LastGoodError, match="run directory was moved or deleted"):
        ckpt.save(2).result()
    ckpt.close()
    assert committed(tmp_path / "moved") == [1]


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes and devices with names: not on Windows")
@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_what_is_no_file_is_neither_waited_for_nor_read_without_end(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    for use in (
        lambda: disk.read_bytes(path, limit=100),
        lambda: disk.append_line(path, "x", patience=0),
        lambda: disk.overwrite(path, b"x", patience=0),
        lambda: disk.FileLock.try_acquire(path),
    ):
        with pytest.raises(OSError):
            use()


@pytest.mark.parametrize("broken", ["add_scalar", "close"])
def test_scalars_that_cannot_be_written_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    """TensorBoard writes in a thread of its own, and raises what happened there at some later call."""
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, broken, full)
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    with lastgood.Checkpointer(tmp_path / "run", w=torch.zeros(3), tensorboard=tmp_path / "b", mirror=mirror) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, blocking=True).result()
            ckpt._finish_save()
        end = time.monotonic() + 20
        while committed(mirror) != [1, 2, 3] and time.monotonic() < end:
            time.sleep(0.01)
        assert committed(mirror) == [1, 2, 3], "what follows a save follows all the same"
    assert (tmp_path / "run/generations/00000001.end").exists()
    told = [record for record in caplog.records if "no more scalars" in record.getMessage()]
    assert len(told) == 1 and "No space left" in told[0].getMessage()


def test_whatever_fails_at_the_end_the_run_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt = lastgood.Checkpointer(tmp_path, w=torch.zeros(3))

    def fail(*_: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(ckpt._saver, "close", fail)
    with pytest.raises(RuntimeError, match="unforeseen"):
        ckpt.close()
    assert (tmp_path / "generations/00000001.end").exists()
    lastgood.Checkpointer(tmp_path, w=torch.zeros(3)).close()
