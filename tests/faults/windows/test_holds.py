"""Another program has a file open that a save touches: for a moment, for good, and every new file.

On Windows it is another process that holds the file, in each way that the system tells apart.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

import lastgood
from lastgood import catalog, commit, disk, retain
from lastgood.errors import LastGoodError
from lastgood.files import replace_file
from lastgood.program import read_events

sys.path.insert(0, str(Path(__file__).parent))
from holder import DELETABLE, MODES, Holder

pytestmark = pytest.mark.skipif(os.name != "nt", reason="needs Windows")
MOMENT = 0.3
"""Seconds."""
OLD, NEW = b"old" * 5000, b"new" * 7000
ROUNDS = int(os.environ.get("LASTGOOD_ROUNDS", "100"))


@pytest.fixture(scope="module")
def other() -> Iterator[Holder]:
    holder = Holder()
    yield holder
    holder.close()


@pytest.fixture(autouse=True)
def nothing_held(other: Holder) -> Iterator[None]:
    yield
    disk.observer = None
    other.drop()


def put(path: Path, data: bytes, patience: float | None = None) -> None:
    replace_file(path, lambda file: file.write(data) and None, patience=patience)


# One file.


@pytest.mark.parametrize("mode", MODES)
def test_a_target_that_is_held_for_a_moment_is_replaced(tmp_path: Path, other: Holder, mode: str) -> None:
    path = tmp_path / "模型.pth"
    put(path, OLD)
    other.hold(path, mode, MOMENT)
    with pytest.raises(PermissionError):
        os.replace(_copy(path), path)
    put(path, NEW)
    assert path.read_bytes() == NEW
    assert [name for name in os.listdir(tmp_path) if name != "copy"] == ["模型.pth"]


def _copy(path: Path) -> Path:
    copy = path.with_name("copy")
    copy.write_bytes(b"x")
    return copy


@pytest.mark.parametrize("mode", MODES)
def test_a_target_that_stays_held_leaves_the_data_under_the_name_in_the_error(
    tmp_path: Path, other: Holder, mode: str
) -> None:
    path = tmp_path / "last.pth"
    put(path, OLD)
    other.hold(path, mode)
    with pytest.raises(LastGoodError, match="complete new data are in") as caught:
        put(path, NEW, patience=0.2)
    (kept,) = (name for name in tmp_path.iterdir() if name != path)
    assert str(kept) in str(caught.value)
    assert kept.read_bytes() == NEW
    other.drop()
    assert path.read_bytes() == OLD
    put(path, NEW)
    assert path.read_bytes() == NEW


@pytest.mark.parametrize("mode", MODES)
def test_a_temporary_file_that_is_held_for_a_moment_is_put_in_place(tmp_path: Path, other: Holder, mode: str) -> None:
    path = tmp_path / "last.pth"
    hold_source_of(path, other, mode, MOMENT)
    began = time.monotonic()
    put(path, NEW)
    assert mode in DELETABLE or time.monotonic() - began > MOMENT / 2
    assert disk.read_bytes(path, limit=1 << 20) == NEW  # It may still be held: such a file can be renamed.


@pytest.mark.parametrize("mode", MODES)
def test_a_temporary_file_that_stays_held_is_the_name_in_the_error(tmp_path: Path, other: Holder, mode: str) -> None:
    path = tmp_path / "模型.pth"
    put(path, OLD)
    hold_source_of(path, other, mode, None)
    if mode in DELETABLE:
        put(path, NEW, patience=0.2)  # Such a program lets the file be renamed.
        other.drop()
        assert path.read_bytes() == NEW
    else:
        with pytest.raises(LastGoodError, match="complete new data are in") as caught:
            put(path, NEW, patience=0.2)
        (kept,) = (name for name in tmp_path.iterdir() if name != path)
        assert str(kept) in str(caught.value)
        assert path.read_bytes() == OLD
        other.drop()
        assert kept.read_bytes() == NEW
    other.drop()
    put(path, NEW + NEW)
    assert path.read_bytes() == NEW + NEW


def test_the_deadline_is_ten_seconds(tmp_path: Path, other: Holder) -> None:
    path = tmp_path / "last.pth"
    put(path, OLD)
    other.hold(path, "reading")
    began = time.monotonic()
    with pytest.raises(LastGoodError, match="complete new data are in"):
        lastgood.save({"w": torch.ones(3)}, path)
    assert 9 < time.monotonic() - began < 30


def hold_source_of(target: Path, other: Holder, mode: str, seconds: float | None) -> None:
    """Hold the temporary file in the moment in which it is to be put in the place of `target`, once."""
    done = False

    def hold(operation: disk.Operation, moment: Literal["before", "after"]) -> None:
        nonlocal done
        named = operation.path == target or operation.path.name == target.name
        if operation.name == "replace" and moment == "before" and named and not done:
            done = True
            assert operation.source is not None
            other.hold(operation.source, mode, seconds)

    disk.observer = hold


def test_a_read_only_target_is_refused_at_once_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    put(path, OLD)
    os.chmod(path, 0o400)

    def refuse(operation: disk.Operation, moment: Literal["before", "after"]) -> None:
        if operation.name == "replace" and moment == "before":
            raise OSError(0, "Access is denied", str(path), 5)  # Windows does; Wine replaces such a file.

    disk.observer = refuse
    began = time.monotonic()
    with pytest.raises(LastGoodError, match=r"marked read-only.*complete new data are in"):
        put(path, NEW)
    assert time.monotonic() - began < 2
    os.chmod(path, 0o600)


def test_a_directory_in_the_place_of_a_target_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "last.pth").mkdir()
    began = time.monotonic()
    with pytest.raises(LastGoodError, match="there is a directory of this name"):
        put(tmp_path / "last.pth", NEW)
    assert time.monotonic() - began < 2


def test_our_own_readers_are_in_nobodys_way(tmp_path: Path) -> None:
    put(tmp_path / "a", OLD)
    with disk.open_read(tmp_path / "a") as file:
        os.rename(tmp_path / "a", tmp_path / "b")
        os.remove(tmp_path / "b")
        assert file.read() == OLD


# A run.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience that ends while the file is still held."""
    monkeypatch.setattr(disk, "PATIENCE", 0.2)
    monkeypatch.setattr(disk, "OPEN_PATIENCE", 0.2)
    monkeypatch.setattr(retain, "_PATIENCE", 0.1)
    monkeypatch.setattr(commit, "_CLEAR_PATIENCE", 0.1)


TOUCHED = (
    *("manifest in the making", "shard in the making", "last manifest", "last shard"),
    *("doomed manifest", "doomed shard", "events", "beat"),
)


def hold_written_shard(other: Holder, mode: str, seconds: float | None) -> None:
    """Hold the next shard as soon as it is written, before the commit, once."""
    done = False

    def hold(operation: disk.Operation, moment: Literal["before", "after"]) -> None:
        nonlocal done
        if operation.name == "create" and operation.path.name == "manifest.json.tmp" and not done:
            done = True
            other.hold(operation.path.with_name("00000.safetensors"), mode, seconds)

    disk.observer = hold


class Training:
    """A run with three checkpoints, of which two are kept, and files to hold."""

    def __init__(self, run: Path, other: Holder) -> None:
        self.run, self.other, self.step = run, other, 0
        self.x = torch.zeros(1000)
        self.ckpt = lastgood.Checkpointer(run, keep=lastgood.Keep(last=2), x=self.x)
        for _ in range(3):
            self.save().result(60)
        self.settle()

    def save(self) -> lastgood.SaveHandle:
        self.step += 1
        self.x += 1
        return self.ckpt.save(self.step)

    def settle(self) -> None:
        self.ckpt._finish_save()  # Retention comes after the handle's word.

    def hold(self, what: str, mode: str, seconds: float | None) -> None:
        known = catalog.committed(self.run)
        places = {
            "last manifest": known[-1].path / "manifest.json",
            "last shard": known[-1].path / "00000.safetensors",
            "doomed manifest": known[0].path / "manifest.json",
            "doomed shard": known[0].path / "00000.safetensors",
            "events": self.run / "events.jsonl",
            "beat": self.run / "generations" / f"{self.ckpt.generation:08d}.beat",
        }
        if what in places:
            self.other.hold(places[what], mode, seconds)
        elif what == "shard in the making":
            hold_written_shard(self.other, mode, seconds)
        else:
            hold_source_of(Path("manifest.json"), self.other, mode, seconds)

    def end(self, last_save: bool = True, late: int = 0) -> None:
        """What must be true in the end, whatever happened in between."""
        disk.observer = None
        if last_save:
            self.save().result(60)
            self.settle()
        self.ckpt.close()
        known = catalog.committed(self.run)
        # What became a checkpoint only in close() has nothing deleted for it before the next save.
        assert [entry.step for entry in known][late:] == [self.step - 1, self.step]
        assert sorted(entry.name for entry in catalog.entries(self.run)) == sorted(entry.name for entry in known)
        for entry in known:
            assert sorted(os.listdir(entry.path)) == ["00000.safetensors", "manifest.json"]
            catalog.check_full(entry)
        saved = [event["step"] for event in read_events(self.run) if event["event"] == "save"]
        failed = [event["step"] for event in read_events(self.run) if event["event"] == "save-failed"]
        assert sorted(saved + failed) == list(range(1, self.step + 1))
        x = torch.zeros(1000)
        with lastgood.Checkpointer(self.run, x=x) as again:
            assert again.restore() == self.step
        assert torch.equal(x, torch.full((1000,), float(self.step)))


@pytest.mark.parametrize("what", TOUCHED)
def test_a_file_of_a_run_that_is_held_for_a_moment_costs_no_save(tmp_path: Path, other: Holder, what: str) -> None:
    training = Training(tmp_path / "训练 1", other)
    for mode in MODES:
        training.hold(what, mode, MOMENT)
        training.save().result(60)
        training.settle()
        disk.observer = None
    training.end()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("what", TOUCHED)
def test_a_file_of_a_run_that_stays_held_is_overcome_when_it_is_let_go(
    tmp_path: Path, other: Holder, what: str
) -> None:
    training = Training(tmp_path / "run", other)
    failed = 0
    for mode in MODES:
        training.hold(what, mode, None)
        handle = training.save()
        assert handle.wait(60)
        training.settle()
        failed += handle.state == "failed"
        assert handle.state == "committed" or what == "manifest in the making"
        disk.observer = None
        other.drop()
        training.save().result(60)
        training.settle()
    # A reader that shares deletion does not keep the manifest from its place.
    assert failed == (len(MODES) - len(DELETABLE) if what == "manifest in the making" else 0)
    training.end()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("what", TOUCHED)
def test_a_file_of_a_run_that_is_let_go_after_the_last_save_is_put_right_by_close(
    tmp_path: Path, other: Holder, what: str
) -> None:
    training = Training(tmp_path / "run", other)
    training.hold(what, "reading", None)
    handle = training.save()
    assert handle.wait(60)
    training.settle()
    if what == "manifest in the making":
        with pytest.raises(LastGoodError, match="complete data are in") as caught:
            handle.result()
        (directory,) = (entry.path for entry in catalog.entries(training.run) if not entry.is_committed())
        assert str(directory) in str(caught.value)
        assert sorted(os.listdir(directory)) == ["00000.safetensors", "manifest.json.tmp"]
    other.drop()
    training.end(last_save=False, late=what == "manifest in the making")


@pytest.mark.parametrize("what", ["last manifest", "last shard"])
def test_a_checkpoint_that_is_held_for_a_moment_is_restored_not_passed_over(
    tmp_path: Path, other: Holder, what: str
) -> None:
    training = Training(tmp_path / "run", other)
    training.ckpt.close()
    for _ in range(2):
        training.hold(what, "share nothing", 1.0)
        with lastgood.Checkpointer(training.run, x=torch.zeros(1000)) as ckpt:
            assert ckpt.restore() == 3


@pytest.mark.timeout(300 + 6 * ROUNDS)
def test_with_a_scanner_that_opens_every_new_file_no_save_is_lost(tmp_path: Path, other: Holder) -> None:
    run = tmp_path / "run"
    x = torch.zeros(1000)
    with lastgood.Checkpointer(run, keep=lastgood.Keep(last=2), x=x) as ckpt:
        other.scan(run, 0.2)
        try:
            for step in range(1, ROUNDS + 1):
                x += 1
                ckpt.save(step).result(60)
        finally:
            opened = other.scanned()
        ckpt._finish_save()
    assert opened > ROUNDS
    saved = [event["step"] for event in read_events(run) if event["event"] == "save"]
    assert saved == list(range(1, ROUNDS + 1))
    assert [entry.step for entry in catalog.committed(run)] == [ROUNDS - 1, ROUNDS]
    for entry in catalog.committed(run):
        catalog.check_full(entry)
