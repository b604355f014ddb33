"""What Windows refuses, as the door to the disk reports it on every system: also what Wine does not refuse."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

import lastgood
from lastgood import catalog, commit, disk, disk_windows, generation, retain, stop
from lastgood.errors import LastGoodError, SaveError
from lastgood.files import replace_file
from lastgood.program import read_events

Moment = Literal["before", "after"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(disk, "PATIENCE", 0.2)
    monkeypatch.setattr(disk, "OPEN_PATIENCE", 0.2)
    monkeypatch.setattr(retain, "_PATIENCE", 0.1)
    monkeypatch.setattr(commit, "_CLEAR_PATIENCE", 0.1)
    yield
    disk.observer = None


def refusal(code: int, path: Path) -> OSError:
    """The error that Python raises on Windows for a code of GetLastError."""
    number = {145: errno.ENOTEMPTY}.get(code, errno.EACCES)
    error = OSError(number, "refused by the system", str(path))
    if os.name != "nt":
        error.winerror = code  # type: ignore[attr-defined, unused-ignore]
        return error
    return OSError(number, "refused by the system", str(path), code)


class Refusing:
    """An observer that is a program which holds files: the operations on them are refused while it does."""

    def __init__(self, code: int, holds: Callable[[disk.Operation], bool]) -> None:
        self.code, self._holds = code, holds
        self.until = float("inf")
        self.count = 0

    def __call__(self, operation: disk.Operation, moment: Moment) -> None:
        if moment == "before" and time.monotonic() < self.until and self._holds(operation):
            self.count += 1
            raise refusal(self.code, operation.path)


def train(run: Path, saves: int, hold: Callable[[int], None] = lambda step: None) -> list[str]:
    """States of the saves of a run of which two checkpoints are kept."""
    x = torch.zeros(100)
    states = []
    with lastgood.Checkpointer(run, keep=lastgood.Keep(last=2), x=x) as ckpt:
        for step in range(1, saves + 1):
            hold(step)
            x += 1
            handle = ckpt.save(step)
            handle.wait(30)
            ckpt._finish_save()
            handle.seen = True
            states.append(handle.state)
    return states


HELD: dict[str, tuple[Callable[[disk.Operation], bool], str]] = {
    "the manifest in the making": (lambda o: o.name == "replace" and o.path.name == "manifest.json", "failed"),
    "an old manifest": (lambda o: o.name == "remove" and o.path.name == "manifest.json", "committed"),
    "an old shard": (lambda o: o.name == "remove" and o.path.suffix == ".safetensors", "committed"),
    "the event log": (lambda o: o.name == "append", "committed"),
    "the beat": (lambda o: o.name == "overwrite", "committed"),
    "a reader of every shard": (lambda o: o.name == "read" and o.path.suffix == ".safetensors", "committed"),
}


@pytest.mark.parametrize("code", [5, 32, 33])
@pytest.mark.parametrize("what", HELD)
def test_what_is_held_for_good_stops_no_training_and_is_put_right_afterwards(
    tmp_path: Path, what: str, code: int
) -> None:
    holds, outcome = HELD[what]
    refusing = Refusing(code, holds)

    def hold(step: int) -> None:
        disk.observer = refusing if step == 5 else None

    assert train(tmp_path, 6, hold) == ["committed"] * 4 + [outcome, "committed"]
    disk.observer = None
    assert refusing.count or what == "the beat"
    # Also the one that failed: when the file was let go, the next save made a checkpoint of it.
    assert [entry.step for entry in catalog.entries(tmp_path)] == [5, 6]
    for entry in catalog.committed(tmp_path):
        catalog.check_full(entry)
    logged = [event["step"] for event in read_events(tmp_path) if event["event"] in ("save", "save-failed")]
    assert logged == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("code", [5, 32, 33])
def test_a_manifest_that_is_held_for_good_leaves_the_complete_data_under_the_name_in_the_error(
    tmp_path: Path, code: int
) -> None:
    x = torch.zeros(100)
    ckpt = lastgood.Checkpointer(tmp_path, x=x)
    ckpt.save(1).result()
    disk.observer = Refusing(code, lambda o: o.name == "replace" and o.path.name == "manifest.json")
    x += 1
    with pytest.raises(SaveError, match="complete data are in") as caught:
        ckpt.save(2).result()
    (directory,) = (entry.path for entry in catalog.entries(tmp_path) if not entry.is_committed())
    assert str(directory) in str(caught.value)
    assert sorted(disk.names(directory)) == ["00000.safetensors", "manifest.json.tmp"]
    assert catalog.newest(tmp_path) == catalog.entry_of(tmp_path, "step-00000001")
    disk.observer = None
    ckpt.close()
    assert [entry.step for entry in catalog.committed(tmp_path)] == [1, 2]
    y = torch.zeros(100)
    with lastgood.Checkpointer(tmp_path, x=y) as again:
        assert again.restore() == 2
    assert torch.equal(x, y)


def test_a_left_over_that_is_held_to_the_end_is_cleared_by_the_next_job(tmp_path: Path) -> None:
    refusing = Refusing(32, lambda o: o.name in ("replace", "remove") and "manifest.json" in o.path.name)

    with pytest.raises(SaveError):
        run_that_ends_held(tmp_path, refusing)
    disk.observer = None
    assert len(catalog.entries(tmp_path)) == 3 and len(catalog.committed(tmp_path)) == 2
    with lastgood.Checkpointer(tmp_path, x=torch.zeros(100)) as ckpt:
        assert ckpt.restore() == 2
    assert len(catalog.entries(tmp_path)) == 2


def run_that_ends_held(run: Path, refusing: Refusing) -> None:
    with lastgood.Checkpointer(run, x=torch.zeros(100)) as ckpt:
        ckpt.save(1).result()
        ckpt.save(2).result()
        disk.observer = refusing
        ckpt.save(3)


def test_a_scanner_at_every_name_change_loses_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation on every file is refused for 30 ms after the first try."""
    monkeypatch.setattr(disk, "PATIENCE", 10.0)
    monkeypatch.setattr(retain, "_PATIENCE", 1.0)
    since: dict[tuple[str, Path], float] = {}
    lock = threading.Lock()

    def scan(operation: disk.Operation, moment: Moment) -> None:
        if moment == "before" and operation.name in ("replace", "remove", "rmdir", "append"):
            with lock:
                first = since.setdefault((operation.name, operation.source or operation.path), time.monotonic())
            if time.monotonic() < first + 0.03:
                raise refusal(145 if operation.name == "rmdir" else 32, operation.path)

    disk.observer = scan
    assert train(tmp_path, 20) == ["committed"] * 20
    assert [entry.step for entry in catalog.entries(tmp_path)] == [19, 20]


def test_a_directory_whose_files_are_still_being_deleted_is_waited_for(tmp_path: Path) -> None:
    refusing = Refusing(145, lambda o: o.name == "rmdir")
    refusing.until = time.monotonic() + 0.1
    disk.observer = refusing
    (tmp_path / "d").mkdir()
    disk.remove_dir(tmp_path / "d")
    assert refusing.count > 1 and not (tmp_path / "d").exists()


def test_a_read_only_target_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PATIENCE", 10.0)
    monkeypatch.setattr(disk_windows, "refusal", lambda path: "the file is marked read-only")
    disk.observer = Refusing(5, lambda o: o.name == "replace")
    began = time.monotonic()
    with pytest.raises(LastGoodError, match=r"marked read-only.*complete new data are in"):
        replace_file(tmp_path / "last.pth", lambda file: None)
    assert time.monotonic() - began < 5


def test_a_manifest_that_is_held_at_the_start_of_a_job_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, 2)
    monkeypatch.setattr(disk, "PATIENCE", 10.0)
    refusing = Refusing(32, lambda o: o.name == "read" and o.path.name == "manifest.json")
    refusing.until = time.monotonic() + 0.5
    disk.observer = refusing
    with lastgood.Checkpointer(tmp_path, x=torch.zeros(100)) as ckpt:
        assert ckpt.restore() == 2
    assert refusing.count


def test_records_of_old_lives_that_are_held_do_not_keep_a_job_from_its_run(tmp_path: Path) -> None:
    for _ in range(generation._KEEP_RECORDS + 2):
        lastgood.Checkpointer(tmp_path, x=1).close()
    disk.observer = Refusing(32, lambda o: o.name == "remove" and o.path.parent.name == "generations")
    lastgood.Checkpointer(tmp_path, x=1).close()


def test_a_stop_file_that_is_held_is_said_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stop.ask(tmp_path)
    disk.observer = Refusing(32, lambda o: o.name == "remove" and o.path.name == "stop")
    assert stop.withdraw(tmp_path)
    assert "could not be removed" in caplog.text


def test_a_look_at_the_lock_does_not_keep_a_job_out(tmp_path: Path) -> None:
    lastgood.Checkpointer(tmp_path, x=1).close()
    if os.name != "nt":
        pytest.skip("needs Windows")  # Record locks of one process do not exclude each other elsewhere.
    lock = disk.FileLock.try_acquire(tmp_path / "lock")
    assert lock is not None
    threading.Timer(0.1, lock.release).start()
    lastgood.Checkpointer(tmp_path, x=1).close()


def test_what_could_not_be_deleted_goes_with_the_next_save(tmp_path: Path) -> None:
    with lastgood.Checkpointer(tmp_path, keep=lastgood.Keep(last=1), x=torch.zeros(100)) as ckpt:
        ckpt.save(1).result()
        ckpt._finish_save()
        disk.observer = Refusing(32, lambda o: o.name == "remove" and o.path.suffix == ".safetensors")
        ckpt.save(2).result()
        ckpt._finish_save()
        assert [entry.step for entry in catalog.entries(tmp_path)] == [1, 2]
        assert [entry.step for entry in catalog.committed(tmp_path)] == [2]
        disk.observer = None
        ckpt.save(3).result()
        ckpt._finish_save()
        assert [entry.step for entry in catalog.entries(tmp_path)] == [3]


@pytest.mark.parametrize("rolled_back", [False, True])
def test_a_checkpoint_that_could_not_be_deleted_goes_with_close_unless_it_is_wanted_again(
    tmp_path: Path, rolled_back: bool
) -> None:
    ckpt = lastgood.Checkpointer(tmp_path, keep=lastgood.Keep(last=2), x=torch.zeros(100))
    for step in (1, 2):
        ckpt.save(step).result()
    disk.observer = Refusing(32, lambda o: o.name == "remove" and o.path.name == "manifest.json")
    ckpt.save(3).result()
    ckpt._finish_save()
    disk.observer = None
    if rolled_back:
        assert ckpt.restore(step=1) == 1
    ckpt.close()
    assert [entry.step for entry in catalog.entries(tmp_path)] == ([1, 2, 3] if rolled_back else [2, 3])
    deleted = [event["step"] for event in read_events(tmp_path) if event["event"] == "delete"]
    assert deleted == ([] if rolled_back else [1])


def test_a_held_file_of_a_deleted_checkpoint_keeps_only_its_own_space(tmp_path: Path) -> None:
    entry = catalog.entry_of(tmp_path, "step-00000001")
    assert entry is not None
    entry.path.mkdir()
    for name in ("00000.safetensors", "00001.safetensors", "00002.safetensors", "manifest.json"):
        (entry.path / name).write_bytes(b"x")
    disk.observer = Refusing(32, lambda o: o.name == "remove" and o.path.name == "00001.safetensors")
    with pytest.raises(PermissionError):
        catalog.delete(entry)
    assert os.listdir(entry.path) == ["00001.safetensors"]
    disk.observer = None
    catalog.delete(entry)
    assert not entry.path.exists()


def test_a_checkpoint_that_nobody_may_read_is_reported_and_the_one_before_it_restored(tmp_path: Path) -> None:
    train(tmp_path, 2)
    disk.observer = Refusing(32, lambda o: o.name == "read" and o.path.parent.name == "step-00000002")
    with lastgood.Checkpointer(tmp_path, x=torch.zeros(100)) as ckpt:
        assert ckpt.restore() == 1
    disk.observer = None
    (skipped,) = [event for event in read_events(tmp_path) if event["event"] == "skip"]
    assert skipped["step"] == 2 and "refused by the system" in skipped["why"]
    assert [entry.step for entry in catalog.committed(tmp_path)] == [1, 2]


def test_no_directory_is_ever_renamed_nor_one_with_a_file_in_use_deleted(tmp_path: Path) -> None:
    """Windows refuses both, with error 5 and with error 145; Wine does the first. The protocol needs neither."""
    renamed: list[Path] = []

    def refuse(operation: disk.Operation, moment: Moment) -> None:
        source = operation.source or operation.path
        if moment == "before" and operation.name == "replace" and source.is_dir():
            renamed.append(source)
            raise refusal(5, source)
        if moment == "before" and operation.name == "rmdir" and os.listdir(operation.path):
            raise refusal(145, operation.path)

    disk.observer = refuse
    assert train(tmp_path / "run", 6) == ["committed"] * 6
    with lastgood.Checkpointer(tmp_path / "run", x=torch.zeros(100), mirror=tmp_path / "mirror") as ckpt:
        assert ckpt.restore(step=5) == 5
        ckpt.save(6).result()
    with lastgood.Checkpointer(tmp_path / "run", x=torch.zeros(100)) as ckpt:
        assert ckpt.restore() == 6
    assert not renamed


@pytest.mark.parametrize("code", [5, 32, 33])
def test_a_single_file_is_waited_for_with_every_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(disk, "PATIENCE", 10.0)
    refusing = Refusing(code, lambda o: o.name == "replace")
    refusing.until = time.monotonic() + 0.2
    disk.observer = refusing
    lastgood.save({"w": torch.ones(3)}, tmp_path / "last.pth")
    assert refusing.count > 1
    assert torch.equal(lastgood.load(tmp_path / "last.pth")["w"], torch.ones(3))
