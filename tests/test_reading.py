"""Reading in parts, by several threads: every size, way, order and target; damage and a failing disk are found."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import MonkeyPatch as Patch

import lastgood
from lastgood import DamagedError, MismatchError, direct_io, disk, reading, shard
from lastgood.catalog import Entry
from lastgood.direct_io import PAGE
from lastgood.dtypes import DTYPE_NAMES
from lastgood.manifest import Chunk, Manifest, RankRecord, ShardRecord, TensorRecord, check, checksum
from lastgood.reading import Want, bytes_of

linux = pytest.mark.skipif(
    sys.platform != "linux", reason="not on Windows, nor macOS: only Linux is asked what is cached"
)


def bits(name: str, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    found = torch.empty(shape, dtype=dtype)
    bytes_of(found)[:] = random.Random(name).randbytes(found.nbytes)
    return found


def forget(path: Path) -> Path:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        direct_io.drop_cache(file.fileno())
    return path


def save(path: Path, *shards: dict[str, torch.Tensor]) -> tuple[Entry, Manifest]:
    """Make a checkpoint that is not cached. Where a tensor is in several shards, each holds some of its rows."""
    path.mkdir()
    records, saved = [], {}
    for number, tensors in enumerate(shards):
        data = bytearray(PAGE)  # The header, of which only the checksum counts here.
        for name, part in tensors.items():
            before = saved[name] if name in saved else TensorRecord("", (0,), ())
            offsets = (*before.shape[:1], *[0] * part.dim())[: part.dim()]
            box = (len(data), len(data) + part.nbytes, checksum(bytes_of(part)), offsets, tuple(part.shape))
            shape = tuple(map(sum, zip(offsets, part.shape, strict=True)))
            saved[name] = TensorRecord(DTYPE_NAMES[part.dtype], shape, (*before.chunks, Chunk(number, *box)))
            data += bytes_of(part)
        (path / f"{number}.safetensors").write_bytes(data)
        forget(path / f"{number}.safetensors")
        records.append(ShardRecord(f"{number}.safetensors", len(data), PAGE, checksum(data[:PAGE])))
    manifest = Manifest(1, 1, "a", None, 0.0, 1, {}, {}, {}, {}, {}, saved, {0: RankRecord(None)}, tuple(records))
    check(manifest, "what the test made")
    return Entry(1, 1, 0, path.name, path.parent), manifest


def read(checkpoint: tuple[Entry, Manifest], *wants: Want, alone: bool = True) -> None:
    """Read, and see that all files are closed and all threads gone, however it ended."""
    opened, real = [], disk.open_read
    with Patch.context() as patch:
        patch.setattr(disk, "open_read", lambda path: opened.append(real(path)) or opened[-1])
        try:
            reading.read_wanted(*checkpoint, wants, alone=alone)
        finally:
            assert opened and all(file.closed for file in opened)
            assert not [thread for thread in threading.enumerate() if thread.name.startswith("lastgood-read")]


def whole(name: str, like: torch.Tensor) -> Want:
    return Want(name, torch.zeros_like(like), (0,) * like.dim())


@pytest.fixture(params=["past the cache", "where O_DIRECT is refused", "through the cache"])
def alone(request: pytest.FixtureRequest, monkeypatch: Patch) -> bool:
    """The three ways that bytes come from a disk, as the argument of `read_wanted` for each."""
    real = direct_io.read_at  # A disk may give less than it is asked for.
    monkeypatch.setattr(direct_io, "read_at", lambda descriptor, into, at: real(descriptor, into[:PAGE], at))
    monkeypatch.setattr(direct_io, "O_DIRECT", 0 if "refused" in request.param else direct_io.O_DIRECT)
    return bool(request.param != "through the cache")


@pytest.fixture(params=[(1, 2), (2, 512), (8, 1)], ids=lambda found: f"{found[0]} threads, {found[1]} pages")
def threads(request: pytest.FixtureRequest, monkeypatch: Patch) -> int:
    monkeypatch.setattr(reading, "_THREADS", request.param[0])
    monkeypatch.setattr(reading, "_BLOCK", request.param[1] * PAGE)
    return int(request.param[0])


@pytest.mark.parametrize("gap", [0, 256 << 10])
def test_every_bit_comes_back(tmp_path: Path, monkeypatch: Patch, alone: bool, threads: int, gap: int) -> None:
    first = {"no bytes at the front": bits("", 0, 3), "large": bits("large", 37 * PAGE + 13)}
    first |= {"scalar": bits("scalar", dtype=torch.float64), "page": bits("page", PAGE), "no bytes": bits("", 2, 0)}
    first |= {f"small {size}": bits(f"small {size}", size, dtype=torch.bfloat16) for size in range(1, 90, 2)}
    first |= {"split": bits("split", 61, 333, dtype=torch.float32), "flags": bits("flags", 2 * PAGE + 1) > 99}
    second = {"odd": bits("odd", 5, dtype=torch.float8_e5m2), "split": bits("2", 40, 333, dtype=torch.float32)}
    second |= {"complex": bits("complex", 77, 13, 3, dtype=torch.complex64), "no bytes at the end": bits("", 0)}
    checkpoint = save(tmp_path / "c", first, second)
    monkeypatch.setattr(reading, "_GAP", gap)
    saved = {**first, **second, "split": torch.cat([first["split"], second["split"]])}
    for names in (saved, sorted(saved)[::3], [*saved, "large", "split"], ["no bytes"], []):
        wants = [whole(name, saved[name]) for name in names]
        read(checkpoint, *wants, alone=alone)
        assert [want.name for want in wants if bytes_of(want.target) != bytes_of(saved[want.name])] == []


@pytest.mark.parametrize(("at", "bit"), [(0, 0), (0, 1), (3 * PAGE + 5, 16), (7 * PAGE + 12, 128)])
@pytest.mark.parametrize("order", [2, 48, 0], ids=["random", "another", "reverse"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16], ids=["in place", "converted"])
@pytest.mark.parametrize("threads", [(8, 1)], indirect=True)
def test_parts_that_come_in_any_order_are_checked_in_theirs(
    tmp_path: Path, monkeypatch: Patch, threads: int, alone: bool, order: int, at: int, bit: int, dtype: torch.dtype
) -> None:
    state = {name: bits(name, size) for name, size in (("a", 7), ("b", 7 * PAGE + 13), ("c", 9))}
    checkpoint, real = save(tmp_path / "c", state), reading._Job.read
    chunk, there = checkpoint[1].tensors["b"].chunks[0], {}

    def late(job: reading._Job, reader: direct_io.Reader, begin: int, end: int, ahead: int) -> None:
        if job.chunk == chunk and order:
            time.sleep(random.Random(order << 40 | begin // PAGE).random() / 200)
        elif job.chunk == chunk and end < chunk.end:
            assert there.setdefault(end, threading.Event()).wait(20)
        real(job, reader, begin, end, ahead)
        there.setdefault(begin, threading.Event()).set()

    class Slow(dict[int, int]):
        def pop(self, *wanted: Any) -> Any:
            if (found := super().pop(*wanted)) is None and chunk.begin < wanted[0] < chunk.end:
                time.sleep(0.004)  # Just now the next part may come.
            return found

    monkeypatch.setattr(reading._Job, "read", late)
    slow = property(lambda job: job.slow, lambda job, parts: setattr(job, "slow", Slow(parts)))
    monkeypatch.setattr(reading._Job, "_there", slow, raising=False)
    wants = {name: whole(name, saved.to(dtype)) for name, saved in state.items()}
    with open(tmp_path / "c" / "0.safetensors", "r+b") as file:
        file.seek(chunk.begin + at)
        file.write(bytes([state["b"][at] ^ bit]))
    forget(tmp_path / "c" / "0.safetensors")
    found = pytest.raises(DamagedError, match=r"tensor 'b' .* does not match its checksum")
    with found if bit else contextlib.nullcontext():
        read(checkpoint, *wants.values(), alone=alone)
    assert bit or all(torch.equal(wants[name].target, saved.to(dtype)) for name, saved in state.items())
    assert not bit or dtype == torch.uint8 or not wants["b"].target.any(), "it is not copied to where it goes"


TARGETS: dict[str, tuple[Any, tuple[int, int]]] = {
    "column by column": (lambda: torch.full((30, 40), 7.0).t(), (0, 0)),
    "another type": (lambda: torch.full((40, 30), 7.0, dtype=torch.float64), (0, 0)),
    "conjugated": (lambda: torch.full((40, 30), 7.0, dtype=torch.complex64).conj(), (0, 0)),
    "negated": (lambda: torch._neg_view(torch.full((40, 30), 7.0)), (0, 0)),
    "trained": (lambda: torch.nn.Parameter(torch.full((30, 40), 7.0).t()), (0, 0)),
    "amid other memory": (lambda: torch.full((42, 30), 7.0)[1:41], (0, 0)),
    "a box of a chunk": (lambda: torch.full((9, 30), 7.0)[2:7, 3:10], (3, 4)),
    "a box of two chunks": (lambda: torch.full((20, 7), 7.0), (10, 23)),
}


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_gets_its_values_and_nothing_around_it_changes(tmp_path: Path, threads: int, target: str) -> None:
    real = torch.arange(1200).view(40, 30) - 0.5
    pair = torch.complex(real, real + 1)
    checkpoint = save(tmp_path / "c", {"real": real[:17], "pair": pair[:11]}, {"pair": pair[11:], "real": real[17:]})
    into, (row, column) = TARGETS[target][0](), TARGETS[target][1]
    read(checkpoint, Want("pair" if into.is_complex() else "real", into, (row, column)))
    saved = (pair if into.is_complex() else real)[row:, column:][: into.shape[0], : into.shape[1]]
    assert torch.equal(into, saved.to(into.dtype))
    assert into._base is None or int((into._base.abs() == 7).sum()) == into._base.numel() - into.numel()


@pytest.mark.parametrize("shape", [(1, 600), (40, 1), (1, 1)])
def test_an_expanded_target_takes_equal_rows_only(tmp_path: Path, threads: int, shape: tuple[int, int]) -> None:
    into, saved = torch.zeros(shape).expand(40, 600), torch.full(shape, torch.nan).expand(40, 600).clone()
    read(save(tmp_path / "same", {"w": saved}), Want("w", into, (0, 0)))
    assert bytes_of(into.contiguous()) == bytes_of(saved)
    saved[-1, -1], into = 0.5, torch.zeros(shape).expand(40, 600)
    with pytest.raises(MismatchError, match="w is expanded here"):
        read(save(tmp_path / "other", {"w": saved}), Want("w", into, (0, 0)))
    assert not into.any()
    halves = [torch.full((20, 600), number) for number in (1.0, 2.0)]
    with pytest.raises(MismatchError, match="w is expanded here") if shape[0] == 1 else contextlib.nullcontext():
        read(save(tmp_path / "halves", *[{"w": half} for half in halves]), Want("w", into, (0, 0)))
    assert torch.equal(into, torch.cat(halves)) if shape[0] > 1 else not into.any()


@pytest.mark.parametrize("left", [0, 9 * PAGE + 5, 20 * PAGE + 13, 20 * PAGE + 82])
def test_a_file_cut_off_is_damaged(tmp_path: Path, monkeypatch: Patch, alone: bool, threads: int, left: int) -> None:
    state = {"large": bits("large", 20 * PAGE + 13), **{f"small {number}": bits("", 7) for number in range(10)}}
    checkpoint = save(tmp_path / "c", state)
    os.truncate(tmp_path / "c" / "0.safetensors", PAGE + left)
    monkeypatch.setattr(shard, "check_size", lambda path, record: None)  # It is cut off only after that.
    with pytest.raises(DamagedError, match=r"0\.safetensors ends in the middle of tensor '(large|small \d)'"):
        read(checkpoint, *[whole(name, saved) for name, saved in state.items()], alone=alone)


@pytest.mark.parametrize(("threads", "number"), [((2, 2), 1), ((8, 1), 0), ((8, 1), 6)], indirect=["threads"])
def test_after_an_error_no_thread_goes_on(tmp_path: Path, monkeypatch: Patch, threads: int, number: int) -> None:
    checkpoint = save(tmp_path / "c", {"large": (saved := bits("large", 400 * PAGE))})
    real, parts = direct_io.Reader.read_into, itertools.count()

    def broken(*arguments: Any) -> int:
        if next(parts) == number:
            raise OSError(errno.EIO, "bad sector")
        time.sleep(0.005)
        return real(*arguments)

    monkeypatch.setattr(direct_io.Reader, "read_into", broken)
    with pytest.raises(DamagedError, match=r"\Wc cannot be read: .*bad sector"):
        read(checkpoint, whole("large", saved))
    assert next(parts) <= number + 1 + 2 * (threads - 1), "each of the others ends its part, and perhaps its next"


def cached(path: Path) -> float:
    """The share of a file that is in the cache. To ask by a read may bring it there before the answer."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as held:
        pages = (ctypes.c_ubyte * -(-len(held) // mmap.PAGESIZE))()
        begin = ctypes.addressof(ctypes.c_char.from_buffer(held))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(begin), ctypes.c_size_t(len(held)), pages) == 0
        return sum(page & 1 for page in pages) / len(pages)


@linux
def test_whether_a_file_is_cached_is_known(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(8 << 20))
    with disk.open_read(tmp_path / "f") as file:
        if cached(forget(tmp_path / "f")):
            pytest.skip("needs a disk: this file system is memory")
        assert not direct_io.is_cached(file.fileno()) and not direct_io.is_cached(file.fileno())
        assert not cached(tmp_path / "f"), "to ask brings nothing there"
        assert (tmp_path / "f").read_bytes() and direct_io.is_cached(file.fileno())


@linux
def test_one_process_reads_past_the_cache_and_several_through_it(tmp_path: Path, monkeypatch: Patch) -> None:
    with lastgood.Checkpointer(tmp_path / "run", model=torch.nn.Linear(1024, 2048)) as ckpt:
        ckpt.save(1, blocking=True).result()
        path = max((tmp_path / "run").rglob("*.safetensors"), key=lambda path: path.stat().st_size)
        if cached(forget(path)):
            pytest.skip("needs a disk: this file system is memory")
        for _ in range(3):
            ckpt.restore()
            assert cached(path) < 0.2, "others may need the memory"
    checkpoint = save(tmp_path / "c", {"large": (saved := bits("large", 8 << 20))})
    read(checkpoint, whole("large", saved), alone=False)
    assert cached(tmp_path / "c" / "0.safetensors") > 0.9, "the next finds it there"
    monkeypatch.delattr(direct_io, "_set_direct")
    read(checkpoint, whole("large", saved))  # Not past the cache: all is there.
