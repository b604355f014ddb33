"""Files written and read past the page cache: every size, what is not aligned, disks that take less or refuse."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from lastgood import direct_io, disk
from lastgood.direct_io import PAGE

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
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct_io.O_DIRECT:
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


def read(path: Path, ranges: list[tuple[int, int]], block: int) -> list[bytes]:
    """The bytes of some ranges, each read as far as it goes."""
    found = []
    with disk.open_read(path) as file:
        reader = direct_io.Reader(file, block)
        for begin, end in ranges:
            got = b""
            while part := reader.read(begin + len(got), end, ranges[-1][1]):
                assert begin + len(got) < end
                got += part
                if begin + len(got) == end:
                    break
            found.append(got)
    return found


BLOCK = 2 * PAGE


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, BLOCK, BLOCK + 1, 5 * PAGE + 7])
@pytest.mark.parametrize("cut", [1, 511, PAGE, PAGE + 3, 3 * PAGE])
def test_every_part_of_a_file_is_read_as_it_is(directory: Path, size: int, cut: int) -> None:
    data = bytes(memory(size))
    (directory / "f").write_bytes(data)
    ranges = [(at, min(at + cut, size)) for at in range(0, size, cut)] or [(0, 0)]
    assert read(directory / "f", ranges, BLOCK) == [data[begin:end] for begin, end in ranges]


def test_large_blocks_lie_at_large_pages(directory: Path) -> None:
    data = bytes(memory((5 << 20) + 3))
    (directory / "f").write_bytes(data)
    assert read(directory / "f", [(7, len(data))], 4 << 20) == [data[7:]]


def test_what_is_not_wanted_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(64 * PAGE))
    with disk.open_read(tmp_path / "f") as file:
        reader = direct_io.Reader(file, 16 * PAGE)
        reader.read(5 * PAGE, 6 * PAGE, 6 * PAGE)
        assert reader._filled == PAGE


def test_a_file_that_is_shorter_than_it_should_be(directory: Path) -> None:
    (directory / "f").write_bytes(bytes(100))
    assert read(directory / "f", [(0, 100)], BLOCK) == [bytes(100)]
    with disk.open_read(directory / "f") as file:
        reader = direct_io.Reader(file, BLOCK)
        assert bytes(reader.read(90, 300, 300)) == bytes(10)
        assert not reader.read(100, 300, 300)
        assert not reader.read(PAGE + 100, 3 * PAGE, 3 * PAGE)


@posix
def test_a_disk_that_refuses_a_direct_read_is_read_the_ordinary_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    real, refused = os.preadv, []

    def stubborn(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct_io.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "not aligned for this disk")
        return real(descriptor, buffers, offset)

    data = bytes(memory(5 * PAGE + 5))
    (tmp_path / "f").write_bytes(data)
    monkeypatch.setattr(os, "preadv", stubborn)
    assert read(tmp_path / "f", [(3, len(data))], BLOCK) == [data[3:]]
    assert len(refused) == 1, "it is asked once"


@posix
def test_a_disk_that_gives_less_than_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.preadv, []

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        return real(descriptor, [buffers[0][:PAGE]], offset)

    data = bytes(memory(5 * PAGE + 5))
    (tmp_path / "f").write_bytes(data)
    monkeypatch.setattr(os, "preadv", short)
    assert read(tmp_path / "f", [(3, len(data))], BLOCK) == [data[3:]]
    assert len(calls) == 6


@posix
def test_a_disk_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "bad sector")

    (tmp_path / "f").write_bytes(bytes(PAGE))
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(OSError, match="bad sector"):
        read(tmp_path / "f", [(0, PAGE)], BLOCK)
