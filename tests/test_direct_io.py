"""Files written past the page cache: every size, memory that is not aligned, disks that take less or refuse."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from lastgood import disk
from lastgood.disk import PAGE

SIZES = [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, (16 << 20) - 1, 16 << 20, (16 << 20) + PAGE + 7]
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX: Windows has no O_DIRECT")


@pytest.fixture(params=["disk", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """On a disk, and on a tmpfs, which kernels before 6.6 refuse to write directly."""
    if request.param == "disk":
        yield tmp_path
        return
    place = Path("/dev/shm") / f"lastgood-test-{os.getpid()}"
    if not place.parent.is_dir():
        place = tmp_path / "memory"
    place.mkdir()
    try:
        yield place
    finally:
        for file in place.iterdir():
            file.unlink()
        place.rmdir()


def memory(size: int, shift: int = 0) -> memoryview:
    """Random bytes that begin `shift` bytes after a page."""
    held = mmap.mmap(-1, size + shift + 1)
    held[shift : shift + size] = random.Random(size).randbytes(size)
    return memoryview(held)[shift : shift + size]


def write(path: Path, *parts: memoryview) -> None:
    with disk.NewFile(path, direct=True) as file:
        for part in parts:
            assert file.write(part) == len(part)
        file.sync()
        assert file.size == sum(len(part) for part in parts)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_written_as_it_is(directory: Path, size: int) -> None:
    data = memory(size)
    write(directory / "f", data)
    assert (directory / "f").read_bytes() == data


@pytest.mark.parametrize("shift", [1, 8, 512, PAGE - 8])
def test_memory_that_is_not_aligned_goes_the_ordinary_way(directory: Path, shift: int) -> None:
    data = memory(3 * PAGE, shift)
    write(directory / "f", data)
    assert (directory / "f").read_bytes() == data


@pytest.mark.parametrize("sizes", [(PAGE, 2 * PAGE, 5), (5, PAGE, 2 * PAGE), (PAGE, 5, PAGE), (0, PAGE, 0, 1)])
def test_parts_that_do_not_end_at_a_page(directory: Path, sizes: tuple[int, ...]) -> None:
    parts = [memory(size) for size in sizes]
    write(directory / "f", *parts)
    assert (directory / "f").read_bytes() == b"".join(parts)


@posix
@pytest.mark.parametrize("most", [1, 511, 512, PAGE, PAGE + 512, 3 * PAGE])
def test_a_disk_that_takes_less_than_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    real, calls = os.write, []

    def short(descriptor: int, data: memoryview) -> int:
        calls.append(len(data))
        # A large file in one-byte writes would take for ever: the first ones are short.
        return real(descriptor, data[:most] if len(calls) < 20 else data)

    data = memory(40 * PAGE + 3)
    monkeypatch.setattr(os, "write", short)
    write(tmp_path / "f", data)
    monkeypatch.undo()
    assert len(calls) > 1
    assert (tmp_path / "f").read_bytes() == data


@posix
def test_a_disk_that_refuses_a_direct_write_gets_an_ordinary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    real, refused = os.write, []

    def stubborn(descriptor: int, data: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & disk._O_DIRECT:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "not aligned for this disk")
        return real(descriptor, data)

    data = memory(3 * PAGE)
    monkeypatch.setattr(os, "write", stubborn)
    write(tmp_path / "f", data, data)
    monkeypatch.undo()
    assert (tmp_path / "f").read_bytes() == bytes(data) * 2
    assert len(refused) <= 1, "it is asked once"


@posix
def test_a_disk_that_takes_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", lambda descriptor, data: 0)
    with pytest.raises(OSError, match="took no bytes"):
        write(tmp_path / "f", memory(PAGE))
