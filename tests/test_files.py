"""`lastgood.save` and `load`: whole or not at all, one writer, and a plain torch file."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from lastgood import disk, files, one_writer
from lastgood.errors import DamagedError, LastGoodError, RefusedError, SaveError

Moment = Literal["before", "after"]
OLD = {"w": torch.zeros(3000), "step": 1}
NEW = {"w": torch.ones(5000), "step": 2}
posix = pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL")


@pytest.fixture(autouse=True)
def observer() -> Iterator[None]:
    yield
    disk.observer = None


def file_of(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def operations(path: Path, save: Callable[[], None]) -> list[str]:
    seen: list[str] = []
    disk.observer = lambda operation, moment: seen.append(operation.name) if moment == "before" else None
    save()
    disk.observer = None
    return seen


def in_child(action: Callable[[], None]) -> int:
    """The wait status of a forked child that runs `action`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


@posix
@pytest.mark.parametrize("there_was_one", [True, False])
@pytest.mark.parametrize("moment", ["before", "after", "torn"])
def test_killed_at_any_operation_the_file_is_whole_old_or_whole_new(
    tmp_path: Path, moment: str, there_was_one: bool
) -> None:
    path = tmp_path / "last.pth"
    count = len(operations(path, lambda: files.save(NEW, path)))
    assert count >= 4
    new = path.read_bytes()
    for point in range(count):
        for name in tmp_path.iterdir():
            name.unlink()
        if there_was_one:
            files.save(OLD, path)
        before = path.read_bytes() if there_was_one else None
        left = point

        def kill(operation: disk.Operation, now: Moment) -> None:
            nonlocal left
            if now == "before":
                left -= 1
            if left >= 0:
                return
            if moment == "torn" and operation.file is not None and operation.data is not None:
                operation.file.write(operation.data[: len(operation.data) // 2])
            if moment in (now, "torn"):
                os.kill(os.getpid(), signal.SIGKILL)

        def save() -> None:
            disk.observer = kill
            files.save(NEW, path)

        assert in_child(save) == signal.SIGKILL
        after = path.read_bytes() if path.exists() else None
        assert after in (before, new), f"operation {point} {moment}"
        files.save(NEW, path)
        assert path.read_bytes() == new


@pytest.mark.parametrize("error_number", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, error_number: int) -> None:
    path = tmp_path / "last.pth"
    files.save(OLD, path)
    before = path.read_bytes()
    names = operations(path, lambda: files.save(OLD, path))
    refused = 0
    for point, name in enumerate(names):
        if name in ("replace", "sync_dir"):
            continue
        left = point

        def fail(operation: disk.Operation, moment: Moment) -> None:
            nonlocal left
            if moment == "before":
                left -= 1
                if left == -1:
                    raise OSError(error_number, os.strerror(error_number))

        disk.observer = fail
        with pytest.raises(SaveError, match="was not saved"):
            files.save(NEW, path)
        disk.observer = None
        refused += 1
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
    assert refused >= 3


def held(seconds: float) -> Callable[[disk.Operation, Moment], None]:
    """An observer that is a program which holds the target open for so long, as Windows would report it."""
    until = time.monotonic() + seconds

    def observe(operation: disk.Operation, moment: Moment) -> None:
        if operation.name == "replace" and moment == "before" and time.monotonic() < until:
            error = PermissionError(errno.EACCES, "used by another process")
            error.winerror = 32  # type: ignore[attr-defined,unused-ignore]
            raise error

    return observe


def test_a_sharing_violation_that_passes_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    files.save(OLD, path)
    disk.observer = held(0.3)
    files.save(NEW, path)
    assert torch.load(path)["step"] == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_sharing_violation_that_stays_keeps_the_whole_data_under_a_stated_name(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    files.save(OLD, path)
    disk.observer = held(60)
    with pytest.raises(LastGoodError, match="complete new data are in") as caught:
        files.save(NEW, path, patience=0.2)
    (kept,) = (name for name in tmp_path.iterdir() if name != path)
    assert str(kept) in str(caught.value)
    assert torch.load(kept)["step"] == 2
    assert torch.load(path)["step"] == 1


def test_the_file_is_torchs_own_in_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "模型 ß.pth"
    files.save(NEW, path)
    assert path.read_bytes() == file_of(NEW)
    assert torch.equal(torch.load(path)["w"], NEW["w"])  # type: ignore[arg-type]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    link = tmp_path / "last.pth"
    try:
        link.symlink_to(tmp_path / "data" / "real.pth")
    except OSError:
        pytest.skip("this user may not make symbolic links")
    if not link.is_symlink():
        pytest.skip("Wine says that it made the link, and did not")
    files.save(NEW, link)
    assert link.is_symlink()
    assert torch.load(tmp_path / "data" / "real.pth")["step"] == 2


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="nowhere does not exist"):
        files.save(NEW, tmp_path / "nowhere" / "last.pth")


def test_safetensors_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    files.save({"w": torch.arange(6.0).view(2, 3).t()}, path)
    assert torch.equal(files.load(path)["w"], torch.arange(6.0).view(2, 3).t())
    with pytest.raises(SaveError, match="flat dict"):
        files.save(NEW, path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DamagedError, match="is damaged"):
        files.load(path)


def test_load_verifies_before_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pth"
    files.save(NEW, path)
    stand_in = types.ModuleType("lastgood.torchfile")
    stand_in.__dict__["verify"] = lambda path: ["its end is missing"]
    stand_in.__dict__["read"] = lambda path, *, map_location, **_: pytest.fail("read before it was checked")
    monkeypatch.setitem(sys.modules, "lastgood.torchfile", stand_in)
    monkeypatch.setattr("lastgood.torchfile", stand_in, raising=False)
    with pytest.raises(DamagedError, match="its end is missing"):
        files.load(path)
    stand_in.__dict__["verify"] = lambda path: []
    stand_in.__dict__["read"] = lambda path, *, map_location, **_: torch.load(path, map_location=map_location)
    assert files.load(path)["step"] == 2


@pytest.mark.parametrize("weights_only", [True, False, None])
def test_load_takes_what_torch_load_takes(tmp_path: Path, weights_only: bool | None) -> None:
    path = tmp_path / "last.pth"
    files.save(NEW, path)
    for options in ({}, {"mmap": True}, {"mmap": False, "map_location": "cpu"}, {"map_location": None}):
        assert torch.equal(files.load(path, weights_only=weights_only, **options)["w"], NEW["w"])  # type: ignore[arg-type]
    assert files.load(path, "meta")["w"].is_meta
    asked: list[str] = []
    assert files.load(path, {"cpu": "meta", "cuda:0": "cpu"})["w"].is_meta
    found = files.load(path, lambda storage, location: asked.append(location))  # None: where it was.
    assert torch.equal(found["w"], NEW["w"]) and set(asked) == {"cpu"}  # type: ignore[arg-type]
    assert torch.equal(files.load(path, lambda storage, location: storage)["w"], NEW["w"])  # type: ignore[arg-type]


def test_weights_only_false_runs_nothing(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "run"),)

    torch.save({"x": Payload()}, tmp_path / "bad.pth")
    with pytest.raises(RefusedError):
        files.load(tmp_path / "bad.pth", weights_only=False)
    assert not (tmp_path / "run").exists()


def test_safetensors_have_no_devices_to_map(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    files.save({"w": torch.ones(2)}, path)
    for where in (None, "cpu", {"cuda:0": "cpu"}):
        assert files.load(path, where, mmap=True)["w"].tolist() == [1, 1]
    with pytest.raises(LastGoodError, match="name the device instead"):
        files.load(path, lambda storage, location: storage)


def test_what_is_no_file_with_a_name_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"takes a path, not <_io\.BytesIO.*torch\.save\.$"):
        files.save(NEW, io.BytesIO())  # type: ignore[arg-type]
    with pytest.raises(LastGoodError, match=r"takes a path, not <_io\.BytesIO"):
        files.load(io.BytesIO())  # type: ignore[arg-type]
    with pytest.raises(LastGoodError, match=r"was not loaded: it is a directory\."):
        files.load(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        files.load(tmp_path / "none.pth")
    assert str(caught.value) == f"{tmp_path / 'none.pth'} was not loaded: there is no such file."
    assert caught.value.errno == errno.ENOENT


# Several ranks. Each process counts its own writes through the observer and reports them.


def rank_saves(rank: int, known: bool, path: str, rounds: int, barrier: Barrier, results: Any) -> None:
    if known:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(barrier.parties), MASTER_ADDR="localhost", MASTER_PORT="1")
    wrote = [0] * rounds
    current = 0

    def count(operation: disk.Operation, moment: Moment) -> None:
        if operation.name == "replace" and moment == "after":
            wrote[current] += 1

    disk.observer = count
    intact = []
    for current in range(rounds):
        barrier.wait(60)
        time.sleep((rank * 7 + current * 3) % 5 / 1000)
        files.save({"round": current, "rank": rank, "w": torch.full((2000,), float(current))}, path)
        saved = torch.load(path)
        intact.append(saved["round"] == current and bool((saved["w"] == current).all()))
        if known and saved["rank"] != 0:
            intact[-1] = False
        if rank == 1:
            files.save({"round": current}, f"{path}.rng_1")
            intact[-1] = intact[-1] and torch.load(f"{path}.rng_1")["round"] == current
            wrote[current] -= 1
        barrier.wait(60)
    results.put((rank, wrote, intact))


@posix
@pytest.mark.parametrize("known", [True, False], ids=["ranks known", "ranks unknown"])
@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_saves_one_path_and_one_writes(tmp_path: Path, world: int, known: bool) -> None:
    rounds = 50
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(world), context.Queue()
    path = tmp_path / "last.pth"
    ranks = [
        context.Process(target=rank_saves, args=(rank, known, str(path), rounds, barrier, results))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    reports = [results.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join(30)
    assert all(all(intact) for _, _, intact in reports)
    assert [sum(wrote[i] for _, wrote, _ in reports) for i in range(rounds)] == [1] * rounds
    assert sorted(name.name for name in tmp_path.iterdir()) == ["last.pth", "last.pth.rng_1"]


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, job: str = "7") -> None:
    for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": job}.items():
        monkeypatch.setenv(name, value)


def test_a_file_of_one_rank_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 1)
    begin = time.monotonic()
    files.save(NEW, tmp_path / "rng_1.pth")
    assert time.monotonic() - begin < 1
    assert torch.load(tmp_path / "rng_1.pth")["step"] == 2


def test_a_path_that_only_another_rank_saves_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank(monkeypatch, 1)
    monkeypatch.setattr(one_writer, "GRACE", 0.5)
    for name, limit in (("at-100.pth", 2.0), ("at-200.pth", 0.3)):
        begin = time.monotonic()
        files.save(NEW, tmp_path / name)
        assert time.monotonic() - begin < limit
        assert (tmp_path / name).exists()


def test_rank_zero_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_writer, "GRACE", 0.1)
    as_rank(monkeypatch, 1)
    files.save({"rank": 1}, tmp_path / "last.pth")
    as_rank(monkeypatch, 0)
    files.save({"rank": 0}, tmp_path / "last.pth")
    assert torch.load(tmp_path / "last.pth")["rank"] == 0


def test_a_later_job_with_the_same_name_does_not_trust_the_record_of_an_earlier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pth"
    as_rank(monkeypatch, 0)
    files.save({"job": "first"}, path)
    monkeypatch.setattr(one_writer, "_started", time.time())
    monkeypatch.setattr(one_writer, "_calls", {})
    monkeypatch.setattr(one_writer, "GRACE", 0.1)
    as_rank(monkeypatch, 1)
    files.save({"job": "second"}, path)
    assert torch.load(path)["job"] == "second"


@posix
def test_when_the_writer_dies_another_rank_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pth"
    child = os.fork()
    if child == 0:
        as_rank(monkeypatch, 0)

        def die_slowly(operation: disk.Operation, moment: Moment) -> None:
            if operation.name == "sync":
                time.sleep(1)
                os.kill(os.getpid(), signal.SIGKILL)

        disk.observer = die_slowly
        files.save({"rank": 0}, path)
    time.sleep(0.3)
    as_rank(monkeypatch, 1)
    monkeypatch.setattr(one_writer, "GRACE", 0.2)
    begin = time.monotonic()
    files.save({"rank": 1}, path)
    os.waitpid(child, 0)
    assert 0.5 < time.monotonic() - begin < 5
    assert torch.load(path)["rank"] == 1
