"""What differs on macOS, as far as Linux can play it: ways to sync and read that are missing, files that appear, names.

Nothing here has run on a Mac. What the system answers is made up by the test, from its sources and documentation.
"""

from __future__ import annotations

import ctypes
import errno
import os
import selectors
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lastgood
from lastgood import Keep, Mirror, catalog, coordinate, direct_io, disk, random_state, reading, world
from lastgood.intercept.runtime import system
from lastgood.state import memory_key

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX: macOS is one")
F_FULLFSYNC = 51
SYNCS: dict[str, Callable[[int], None]] = {"lastgood": disk._sync_descriptor, "lastgood run": system.sync_file}


class Darwin:
    """The module sys of a Mac, for modules that ask it."""

    platform = "darwin"

    def __getattr__(self, name: str) -> Any:
        return getattr(sys, name)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Plays macOS, with a file system that answers F_FULLFSYNC with an error. Returns what was asked of it."""
    import fcntl

    found: list[tuple[str, int]] = []
    real, plain = fcntl.fcntl, os.fsync

    def call(descriptor: int, what: int, argument: int = 0) -> int:
        if what != F_FULLFSYNC:
            return real(descriptor, what, argument)
        found.append(("full", answer()))
        if answer():
            raise OSError(answer(), os.strerror(answer()))
        return 0

    def answer() -> int:
        return int(os.environ.get("TEST_FULLFSYNC", "0"))

    def fsync(descriptor: int) -> None:
        found.append(("plain", 0))
        plain(descriptor)

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", F_FULLFSYNC, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", call)
    monkeypatch.setattr(os, "fsync", fsync)
    for module in (disk, system):
        monkeypatch.setattr(module, "sys", Darwin())
    return found


@pytest.mark.parametrize("name", SYNCS)
def test_a_sync_empties_the_cache_of_the_drive(tmp_path: Path, asked: list[Any], name: str) -> None:
    with open(tmp_path / "f", "wb") as file:
        SYNCS[name](file.fileno())
    assert asked == [("full", 0)]


@pytest.mark.parametrize("name", SYNCS)
@pytest.mark.parametrize("answer", [errno.ENOTSUP, errno.EINVAL, errno.ENOTTY])
def test_a_drive_that_does_not_know_the_full_sync_gets_the_plain_one(
    tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch, name: str, answer: int
) -> None:
    """SMB shares, WebDAV, FUSE and others answer in these three ways."""
    monkeypatch.setenv("TEST_FULLFSYNC", str(answer))
    with open(tmp_path / "f", "wb") as file:
        SYNCS[name](file.fileno())
    assert asked == [("full", answer), ("plain", 0)]


@pytest.mark.parametrize("name", SYNCS)
def test_an_error_of_the_disk_is_not_taken_for_one(
    tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """After a failed sync, the next one may say that all is well, and it is not."""
    monkeypatch.setenv("TEST_FULLFSYNC", str(errno.EIO))
    with open(tmp_path / "f", "wb") as file, pytest.raises(OSError) as caught:
        SYNCS[name](file.fileno())
    assert caught.value.errno == errno.EIO and ("plain", 0) not in asked


def test_names_are_synced_as_fully_as_files(tmp_path: Path, asked: list[Any]) -> None:
    system.sync_dir(str(tmp_path))
    assert disk.sync_dir(tmp_path)
    assert asked == [("full", 0)] * 2


def test_names_above_are_synced_up_to_a_read_only_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root of macOS is sealed, and /tmp is a link in it: no mount point lies in between."""
    seen = []

    def sync_dir(path: Path) -> bool:
        seen.append(path)
        if path == tmp_path:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return True

    monkeypatch.setattr(disk, "sync_dir", sync_dir)
    disk.sync_names(tmp_path / "a" / "b")
    assert seen == [tmp_path / "a", tmp_path]


def without_linux(patch: pytest.MonkeyPatch) -> None:
    """Take away what Linux has for reading and writing, and macOS before 11 has not."""
    for name in ("preadv", "posix_fadvise", "POSIX_FADV_DONTNEED", "sched_getaffinity"):
        patch.delattr(os, name, raising=False)
    patch.setattr(direct_io, "O_DIRECT", 0)


def objects(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300))
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters())}


def step(held: dict[str, Any]) -> None:
    held["model"](torch.randn(4, 300)).square().sum().backward()
    held["optimizer"].step()


def test_saves_verify_and_restore_without_what_only_linux_has(
    tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_linux(monkeypatch)
    monkeypatch.setenv("TEST_FULLFSYNC", str(errno.ENOTSUP))
    held = objects(0)
    with lastgood.Checkpointer(tmp_path / "run", **held, keep=Keep(last=2)) as ckpt:
        for number in range(1, 5):
            step(held)
            ckpt.save(number, blocking=True).result()
    assert [entry.step for entry in catalog.committed(tmp_path / "run")] == [3, 4], "each was read back"
    other = objects(1)
    with lastgood.Checkpointer(tmp_path / "run", **other) as ckpt:
        assert ckpt.restore() == 4
    for name, value in held["model"].state_dict().items():
        assert torch.equal(value, other["model"].state_dict()[name])
    shard = tmp_path / "run" / "step-00000004" / "00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with lastgood.Checkpointer(tmp_path / "run", **other) as ckpt:
        assert ckpt.restore() == 3


def test_what_is_cached_is_dropped_by_a_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that macOS gets; Linux takes the same ones, and keeps its cache."""
    without_linux(monkeypatch)
    calls = []
    library = direct_io._library

    class Watched:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(library, name)

    monkeypatch.setattr(direct_io, "_library", Watched())
    (tmp_path / "f").write_bytes(b"x" * 10_000)
    (tmp_path / "empty").write_bytes(b"")
    for name in ("empty", "f"):
        with disk.open_read(tmp_path / name) as file:
            direct_io.drop_cache(file.fileno())
            assert file.read() == (tmp_path / name).read_bytes()
    assert sorted(calls) == ["mmap", "msync", "munmap"]
    assert not [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("/f")]


def test_a_checkpoint_of_many_shards_is_read_with_few_files_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may have 256 of them on macOS."""
    held = objects(0)
    frozen = nn.Linear(300, 300)  # It has a file of its own.
    with lastgood.Checkpointer(tmp_path / "run", frozen=frozen, **held) as ckpt:
        ckpt.save(1, blocking=True).result()
    monkeypatch.setattr(reading, "_THREADS", 1)
    now = most = 0
    real = disk.open_read

    class Counted:
        def __init__(self, path: Path) -> None:
            nonlocal now, most
            self._file = real(path)
            now += 1
            most = max(most, now)

        def __enter__(self) -> Any:
            return self._file

        def __exit__(self, *_: object) -> None:
            nonlocal now
            now -= 1
            self._file.close()

    monkeypatch.setattr(disk, "open_read", Counted)
    entry = catalog.newest(tmp_path / "run")
    assert entry is not None
    manifest = catalog.read_manifest(entry)
    wants = [
        reading.Want(name, torch.empty(record.shape, dtype=torch.float32), (0,) * len(record.shape))
        for name, record in manifest.tensors.items()
        if record.dtype == "F32"
    ]
    reading.read_wanted(entry, manifest, wants)
    assert len(manifest.shards) == 2 and most == 1
    found = {want.name: want.target for want in wants}
    assert torch.equal(found["model.0.weight"], held["model"][0].weight)
    assert torch.equal(found["frozen.weight"], frozen.weight)


def litter(directory: Path) -> None:
    """What Finder and a drive without extended attributes put beside everything."""
    for path in [directory, *directory.rglob("*")]:
        if path.name.startswith("._") or path.name == ".DS_Store":
            continue
        if path.is_dir():
            (path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")


def test_files_of_macos_in_a_run_are_no_checkpoints_and_keep_none(tmp_path: Path) -> None:
    run, mirror = tmp_path / "runs" / "voice", tmp_path / "mirrors" / "voice"
    held = objects(0)
    for life in range(2):
        with lastgood.Checkpointer(run, **held, keep=Keep(last=2), mirror=Mirror(path=mirror)) as ckpt:
            assert ckpt.restore() == 3 * life
            for number in range(3 * life + 1, 3 * life + 4):
                step(held)
                ckpt.save(number, blocking=True).result()
        litter(tmp_path)
    for place in (run, mirror):
        assert [entry.step for entry in catalog.entries(place)] == [5, 6], place
        assert [path.name for path in place.glob("step-*")] and not list(place.glob("step-*1*")), "deleted as a whole"
        for entry in catalog.committed(place):
            assert catalog.damage(entry, catalog.check_full(entry), full=True) == []
    cut_off = run / "step-00000009"  # And looked at.
    cut_off.mkdir()
    litter(cut_off)
    with lastgood.Checkpointer(run, **held) as ckpt:
        assert ckpt.restore() == 6
    assert not cut_off.exists()


def test_the_name_of_a_mac_may_change_and_it_is_the_same_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def sysctl(name: bytes, value: Any, size: Any, *_: object) -> int:
        assert name == b"kern.bootsessionuuid" and size._obj.value == len(value)
        value.value = b"5B8F3F5E-0000-4A5B-9C6D-000000000001"
        return 0

    class Library:
        sysctlbyname = staticmethod(sysctl)

    def no_proc(path: Path, *, limit: int) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(world, "sys", Darwin())
    monkeypatch.setattr(disk, "read_bytes", no_proc)
    found = []
    for name in ("book.local", "book-2.lan"):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
        found.append(world.machine_id())
    assert found == ["5B8F3F5E-0000-4A5B-9C6D-000000000001"] * 2
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert world.machine_id().startswith("book-2.lan-"), "a system that does not say it"


def test_a_machine_that_lost_its_power_is_noticed_as_soon_as_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    number = socket.TCP_KEEPIDLE
    monkeypatch.delattr(socket, "TCP_KEEPIDLE")
    monkeypatch.setattr(socket, "TCP_KEEPALIVE", number, raising=False)
    with socket.socket() as sock:
        coordinate._keep_alive(sock)
        assert sock.getsockopt(socket.IPPROTO_TCP, number) == 30


class Apart(selectors.DefaultSelector):
    """Tells of reading and writing apart, as kqueue does, of which macOS has one."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        both = (selectors.EVENT_WRITE, selectors.EVENT_READ)
        return [(key, events & one) for key, events in super().select(timeout) for one in both if events & one]


def test_a_rank_that_went_away_while_it_was_written_to_is_let_go_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selectors, "DefaultSelector", Apart)
    channel = coordinate.Channel(world.World(0, 2, True))
    here, there = socket.socketpair()
    here.setblocking(False)
    connection = coordinate._Connection(here)
    connection.rank = 1
    channel._peers[1] = connection
    channel._selector.register(here, selectors.EVENT_READ, connection)
    connection.queue({"key": "a", "value": 1})
    there.close()
    channel._turn(1.0)
    assert channel.connected == set() and channel.why_gone(1)
    channel.abandon()


def test_the_random_state_of_mps_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [torch.arange(44, dtype=torch.uint8)]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: held[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: held.insert(0, state))
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 1 << 20)
    assert "mps" not in str(random_state.capture())
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    saved = random_state.capture()
    held.insert(0, torch.zeros(44, dtype=torch.uint8))
    assert random_state.apply(saved) == []
    assert torch.equal(held[0], torch.arange(44, dtype=torch.uint8))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert random_state.apply(saved) == ["there is no MPS device here to take the saved random state"]


class OnMps(nn.Parameter):
    """Stands in for a tensor of MPS: it is neither CPU's nor CUDA's, and is copied only to multiples of 4 bytes."""

    is_cpu = False

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is torch.Tensor.copy_ and isinstance(arguments[1], cls):
            assert arguments[0].data_ptr() % 4 == 0, "Unaligned blit request"
        with torch._C.DisableTorchFunctionSubclass():
            found = function(*arguments, **(named or {}))
            if function is torch.Tensor.cpu:
                return found.clone()
            return found.as_subclass(cls) if function is torch.Tensor.detach else found


def test_tensors_of_mps_are_not_tied_by_a_number_that_looks_like_an_address() -> None:
    class Alike(OnMps):
        is_mps = True

        def data_ptr(self) -> int:
            return 4096

    one, other = (Alike(torch.zeros(3), requires_grad=False) for _ in range(2))
    assert memory_key(one) != memory_key(other)
    assert memory_key(one) == memory_key(one.detach())


def test_tensors_of_mps_are_copied_wherever_they_lie_in_the_file(tmp_path: Path) -> None:
    """Tensors follow each other without gaps: an odd number of bytes, and the next ones are at odd places."""
    module = nn.Module()
    for number in range(3):
        value = torch.arange(number, number + 3, dtype=torch.uint8)
        module.register_parameter(f"p{number}", OnMps(value, requires_grad=False))
    with lastgood.Checkpointer(tmp_path / "run", model=module) as ckpt:
        ckpt.save(1, blocking=True).result()
    state = lastgood.load(tmp_path / "run")["model"]
    assert not module.state_dict()["p0"].is_cpu and type(module.p0.cpu()) is torch.Tensor, "it plays its part"
    assert [state[f"p{number}"].tolist() for number in range(3)] == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
