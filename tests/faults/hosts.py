"""Hosts of their own on one machine: network namespaces, joined by a wire that can be cut, slow, or lossy.

The wire is a process that carries every frame between two TAP devices, so no traffic-control module is needed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import select
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

from tests.faults.processes import fork

_NEW_NET, _NEW_MOUNTS = 0x40000000, 0x00020000
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_STATE = struct.Struct("<dddd")
FOREVER = 1e9


class NotAllowedError(Exception):
    """This machine or user may not make namespaces."""


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        code = ctypes.get_errno()
        raise NotAllowedError(f"namespaces are not allowed here: {name}: {os.strerror(code)}")


class Wire:
    """What lies between the hosts. Every process may change it, at once for all."""

    def __init__(self) -> None:
        self._shared = mmap(-1, _STATE.size)
        self.mend()

    def mend(self) -> None:
        self._set(0.0, 0.0, 0.0, 0.0)

    def cut(self, seconds: float = FOREVER) -> None:
        """Carry nothing from now on, for so long."""
        now = time.monotonic()
        self._set(now, now + seconds, 0.0, 0.0)

    def worsen(self, *, delay: float = 0.0, loss: float = 0.0) -> None:
        """Carry each frame so many seconds later, and lose this share of them."""
        self._set(0.0, 0.0, delay, loss)

    def _set(self, *state: float) -> None:
        self._shared[:] = _STATE.pack(*state)

    def carry(self, ends: tuple[int, int]) -> int:
        """The process that is the wire."""
        draw, waiting = random.Random(1), list[tuple[float, int, bytes]]()
        while True:
            pause = max(0.0, min(waiting)[0] - time.monotonic()) if waiting else 1.0
            for end in select.select(ends, [], [], pause)[0]:
                frame = os.read(end, 65536)
                begin, until, delay, loss = _STATE.unpack(self._shared[:])
                if begin <= time.monotonic() < until or draw.random() < loss:
                    continue
                waiting.append((time.monotonic() + delay, ends[1] if end == ends[0] else ends[0], frame))
            due = [item for item in waiting if item[0] <= time.monotonic()]
            for item in due:
                waiting.remove(item)
                os.write(item[1], item[2])


@dataclass
class Hosts:
    """Two hosts and the wire."""

    wire: Wire
    addresses: tuple[str, str]
    namespaces: tuple[int, int]
    """Descriptors."""

    def enter(self, number: int) -> None:
        """Move this process to a host."""
        _call("setns", self.namespaces[number], _NEW_NET)
        os.environ["MASTER_ADDR"] = self.addresses[0]
        os.environ["GLOO_SOCKET_IFNAME"] = "tap0"


def hide(directory: Path) -> None:
    """Let this process see an empty directory of its own there, as on a host that does not mount the storage."""
    _call("unshare", _NEW_MOUNTS)
    for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "lastgood-private", str(directory)]):
        subprocess.run(command, check=True)


def _make_host(address: str) -> tuple[int, int]:
    """Descriptors of a new network namespace and of the TAP device in it. This process moves there."""
    _call("unshare", _NEW_NET)
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"tap0", _IFF_TAP | _IFF_NO_PI))
    for command in (f"addr add {address}/24 dev tap0", "link set tap0 up", "link set lo up"):
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)
    return os.open("/proc/self/ns/net", os.O_RDONLY), device


@contextmanager
def two_hosts(log: Path) -> Iterator[Hosts]:
    """Two hosts with a wire between them. Raises NotAllowedError."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    addresses = ("10.77.0.1", "10.77.0.2")
    made: list[tuple[int, int]] = []
    try:
        try:
            for address in addresses:
                made.append(_make_host(address))
        except (OSError, subprocess.CalledProcessError) as error:
            raise NotAllowedError(f"namespaces are not allowed here: {error}") from error
        finally:
            if made or _moved(home):
                _call("setns", home, _NEW_NET)
        wire = Wire()
        carrier = fork(lambda: wire.carry((made[0][1], made[1][1])), log)
        try:
            yield Hosts(wire, addresses, (made[0][0], made[1][0]))
        finally:
            os.kill(carrier, signal.SIGKILL)
            os.waitpid(carrier, 0)
    finally:
        for descriptor in [home, *(descriptor for pair in made for descriptor in pair)]:
            os.close(descriptor)


def _moved(home: int) -> bool:
    try:
        return os.fstat(home).st_ino != os.stat("/proc/self/ns/net").st_ino
    except OSError as error:
        return error.errno != errno.ENOENT
