"""Ranks, and messages between them with deadlines.

Rank 0 listens; every other rank holds one connection to it. There is no message between two other ranks, no
collective, and no wait without a deadline. A closed connection is noticed at once, so a rank that died costs no
waiting. Nothing here touches the training's process group, so it works with gloo, with NCCL, and without any.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from lastgood.errors import PeerError
from lastgood.values import Json
from lastgood.world import World, job_id

_log = logging.getLogger("lastgood")
_HELLO_BYTES = 1 << 16
_MESSAGE_BYTES = 1 << 30
_HELLO_SECONDS = 10.0
_STUMBLE_SECONDS = 1.0
_TALK = (OSError, ValueError, KeyError, TypeError, RecursionError)
"""What a connection raises whose other side is gone, or speaks another language; JSON may be nested too deeply."""

_ELSEWHERE = ("192.0.2.1", "2001:db8::1")
"""Addresses on no machine in the world (RFC 5737, RFC 3849): the way there is the way to every other network."""


class _Connection:
    """One socket, with what is left to send and what has not yet arrived whole."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.outgoing = bytearray()
        self.incoming = bytearray()
        self.rank: int | None = None
        self.nonce = os.urandom(16).hex()
        self.opened = time.monotonic()

    def queue(self, message: Json) -> None:
        data = json.dumps(message, separators=(",", ":")).encode()
        self.outgoing += len(data).to_bytes(8, "little") + data

    def send(self) -> None:
        while self.outgoing:
            try:
                sent = self.socket.send(memoryview(self.outgoing)[: 1 << 20])
            except BlockingIOError:
                return
            del self.outgoing[:sent]

    def receive(self) -> list[Json] | None:
        """The messages that are complete by now; None when the other side has closed."""
        limit = _HELLO_BYTES if self.rank is None else _MESSAGE_BYTES
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        if not data:
            return None
        self.incoming += data
        messages = []
        while len(self.incoming) >= 8:
            length = int.from_bytes(self.incoming[:8], "little")
            if length > limit:
                raise OSError(f"a message of {length} bytes is refused")
            if len(self.incoming) < 8 + length:
                break
            messages.append(json.loads(bytes(self.incoming[8 : 8 + length])))
            del self.incoming[: 8 + length]
        return messages


@dataclass(slots=True)
class _Task:
    """What the background thread does every so many seconds."""

    seconds: float
    call: Callable[[], None]
    due: float
    """When it is to be done next, by the monotonic clock."""


class Channel:
    """The messages of one rank. A message has a key; what a key means is the caller's business.

    A message of rank 0 reaches all ranks, also those that connect later, until :meth:`admit_no_more`; one of another
    rank reaches rank 0.
    A background thread moves the bytes and calls what :meth:`every` registered.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.token = ""
        self.port = 0
        self._job = job_id()
        self._admits = True
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._peers: dict[int, _Connection] = {}
        self._gone: dict[int, str] = {}
        self._inbox: dict[tuple[str, int], Json] = {}
        self._posted: dict[str, Json] = {}
        self._news = threading.Condition()
        self._tasks: list[_Task] = []
        self._listeners: list[tuple[str, Callable[[str, Json], None]]] = []
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_out.setblocking(False)
        self._wake_in.setblocking(False)
        self._selector.register(self._wake_out, selectors.EVENT_READ)

    # -- setting up ---------------------------------------------------------------------------------------------

    def listen(self) -> list[str]:
        """Rank 0: open the port. Returns the addresses at which other ranks can try to reach it."""
        self.token = os.urandom(16).hex()
        if self.world.one_host:
            # Loopback only: nobody else can connect, and no firewall asks the user.
            try:
                self._listener = socket.create_server(("127.0.0.1", 0))
                addresses = ["127.0.0.1"]
            except OSError:
                self._listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
                addresses = ["::1"]
        else:
            try:
                self._listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
            except (OSError, ValueError):  # no IPv6 here, or no sockets for both
                self._listener = socket.create_server(("", 0))
            addresses = _own_addresses()
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._selector.register(self._listener, selectors.EVENT_READ)
        return addresses

    def join(self, find: Callable[[], Sequence[Json]], deadline: float) -> Json:
        """Another rank: connect to rank 0.

        Args:
            find: gives the invitations that can be seen now; each has "addresses", "port" and "token".
            deadline: on the monotonic clock.

        Returns:
            The invitation that was accepted.

        Raises:
            PeerError: nobody accepted this rank in time.
        """
        reason = "rank 0 has not opened the run"
        while True:
            for invitation in find():
                for address in invitation["addresses"]:
                    try:
                        self._hello(address, invitation)
                        return invitation
                    except _TALK as error:
                        reason = f"rank 0 could not be reached at {address}:{invitation.get('port')}: {error}"
            if time.monotonic() > deadline:
                raise PeerError(
                    f"rank {self.world.rank} of {self.world.size} waited in vain for rank 0: {reason}. Every rank must "
                    "make its Checkpointer on the same run directory, at the same point of the program; the ranks must "
                    "see one disk, or share an initialised process group so that they can tell each other."
                )
            time.sleep(0.02)

    def _hello(self, address: str, invitation: Json) -> None:
        sock = socket.create_connection((address, int(invitation["port"])), timeout=2.0)
        try:
            connection = _Connection(sock)
            challenge = self._read_one(connection)
            mac = _sign(str(invitation["token"]), str(challenge["nonce"]))
            connection.queue({"rank": self.world.rank, "size": self.world.size, "job": self._job, "mac": mac})
            connection.send()
            answer = self._read_one(connection)
            if "refused" in answer:
                raise OSError(answer["refused"])
        except BaseException:
            sock.close()
            raise
        sock.setblocking(False)
        _keep_alive(sock)
        connection.rank = 0
        self._peers[0] = connection
        self._selector.register(sock, selectors.EVENT_READ, connection)

    @staticmethod
    def _read_one(connection: _Connection) -> Json:
        # Byte by byte as far as needed: what follows the message belongs to the background thread.
        head = _exactly(connection.socket, 8)
        length = int.from_bytes(head, "little")
        if length > _HELLO_BYTES:
            raise OSError("the other side is no lastgood")
        return json.loads(_exactly(connection.socket, length))

    def every(self, seconds: float, task: Callable[[], None]) -> None:
        """Call `task` in the background every so many seconds. Its errors are logged, and it is called again."""
        # In one step: the background thread may be looking at them.
        self._tasks.append(_Task(seconds, task, time.monotonic() + seconds))
        self._wake()

    def on(self, prefix: str, listener: Callable[[str, Json], None]) -> None:
        """Call `listener` in the background with every message whose key begins with `prefix`, when it arrives.

        For those that are here already it is called at once.
        """
        with self._news:
            self._listeners.append((prefix, listener))
            early = [(key, value) for (key, _), value in self._inbox.items() if key.startswith(prefix)]
        for key, value in early:
            listener(key, value)

    def admit_no_more(self) -> None:
        """Rank 0: the job is complete. A rank of another job must not take the place of one that died."""
        with self._news:
            self._admits = False
            self._posted.clear()

    def start(self) -> None:
        """Start the background thread."""
        self._thread = threading.Thread(target=self._serve, name="lastgood-messages", daemon=True)
        self._thread.start()

    # -- messages -----------------------------------------------------------------------------------------------

    @property
    def connected(self) -> set[int]:
        """The other ranks to which there is a connection now."""
        with self._news:
            return set(self._peers)

    def post(self, key: str, value: Json) -> None:
        """Send: from rank 0 to all, from another rank to rank 0. Never blocks."""
        with self._news:
            if self.world.rank == 0 and self._admits:
                self._posted[key] = value
            for connection in self._peers.values():
                connection.queue({"key": key, "value": value})
                # At once, as far as the system takes it: what was posted has left even if this process dies now.
                with contextlib.suppress(OSError):
                    connection.send()
            self._inbox[(key, self.world.rank)] = value
            self._news.notify_all()
        self._wake()

    def collect(
        self, key: str, ranks: Collection[int], deadline: float, hopeless: Callable[[int], bool] = lambda rank: False
    ) -> dict[int, Json]:
        """Rank 0: the messages with `key` from `ranks`. Returns without those that did not come by the deadline.

        A rank whose connection is closed, or that is `hopeless`, is not waited for.
        """
        with self._news:
            while True:
                here = {rank: self._inbox[(key, rank)] for rank in ranks if (key, rank) in self._inbox}
                waiting = [r for r in ranks if r not in here and r not in self._gone and not hopeless(r)]
                left = deadline - time.monotonic()
                if not waiting or left <= 0:
                    return here
                self._news.wait(left)

    def nudge(self) -> None:
        """Make :meth:`collect` ask again whether a rank is hopeless."""
        with self._news:
            self._news.notify_all()

    def receive(self, key: str, deadline: float) -> Json:
        """Another rank: the message with `key` from rank 0.

        Raises:
            PeerError: rank 0 is gone, or did not send it by the deadline.
        """
        return self.receive_any([key], deadline)[1]

    def receive_any(self, keys: Sequence[str], deadline: float) -> tuple[str, Json]:
        """Another rank: the first of several messages from rank 0 that is here, with its key. Raises PeerError."""
        with self._news:
            while True:
                for key in keys:
                    if (key, 0) in self._inbox:
                        return key, self._inbox[(key, 0)]
                left = deadline - time.monotonic()
                if 0 in self._gone:
                    raise PeerError(f"rank 0 is gone ({self._gone[0]})")
                if left <= 0:
                    raise PeerError(f"rank 0 did not answer in time ({keys[0]})")
                self._news.wait(left)

    def peek(self, key: str, rank: int) -> Json:
        """The message with `key` from `rank` if it is here, else None."""
        with self._news:
            return self._inbox.get((key, rank))

    def arrived(self, prefix: str) -> dict[tuple[str, int], Json]:
        """All messages here whose key begins with `prefix`."""
        with self._news:
            return {which: value for which, value in self._inbox.items() if which[0].startswith(prefix)}

    def forget(self, prefix: str) -> None:
        """Drop all messages whose key begins with `prefix`."""
        with self._news:
            for which in [which for which in self._inbox if which[0].startswith(prefix)]:
                del self._inbox[which]
            for key in [key for key in self._posted if key.startswith(prefix)]:
                del self._posted[key]

    def why_gone(self, rank: int) -> str | None:
        """Why the connection to a rank was closed; None where it is open, or was never made."""
        with self._news:
            return self._gone.get(rank)

    # -- the background thread ----------------------------------------------------------------------------------

    def _wake(self) -> None:
        try:
            self._wake_in.send(b"x")
        except OSError:
            # Full: it is awake already. Closed: there is nobody to wake.
            return

    def _serve(self) -> None:
        while not self._stopping:
            due = min((task.due for task in self._tasks), default=None)
            timeout = None if due is None else max(0.0, due - time.monotonic())
            try:
                self._turn(timeout)
            except Exception:
                # The heart beats in this thread: without it another job would take the run from a living one.
                if not self._stopping:
                    _log.exception("lastgood: the messages between the ranks stumbled; they go on")
                    time.sleep(_STUMBLE_SECONDS)
            for task in self._tasks:
                if time.monotonic() >= task.due:
                    task.due = time.monotonic() + task.seconds
                    try:
                        task.call()
                    except Exception:
                        _log.exception("lastgood: a background task failed; it will be tried again")

    def _turn(self, timeout: float | None) -> None:
        with self._news:
            for connection in list(self._peers.values()):
                self._interest(connection)
        for ready, events in self._selector.select(timeout):
            if ready.fileobj is self._wake_out:
                self._wake_out.recv(4096)
            elif ready.fileobj is self._listener:
                self._accept()
            else:
                self._move(ready.data, events)
        for ready in list(self._selector.get_map().values()):
            stranger = isinstance(ready.data, _Connection) and ready.data.rank is None
            if stranger and time.monotonic() > ready.data.opened + _HELLO_SECONDS:
                self._close(ready.data, "it did not say who it is")

    def _interest(self, connection: _Connection) -> None:
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.outgoing else 0)
        self._selector.modify(connection.socket, wanted, connection)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # It was closed again before we looked.
        try:
            sock.setblocking(False)
            _keep_alive(sock)
            connection = _Connection(sock)
            connection.queue({"nonce": connection.nonce})
            connection.send()
            self._selector.register(sock, selectors.EVENT_READ, connection)
        except OSError:
            sock.close()  # It was reset meanwhile.

    def _move(self, connection: _Connection, events: int) -> None:
        if connection.socket.fileno() < 0:
            return None  # macOS tells of reading and writing apart, and what came first has closed it.
        try:
            with self._news:
                if events & selectors.EVENT_WRITE:
                    connection.send()
            messages = connection.receive() if events & selectors.EVENT_READ else []
            if messages is None:
                return self._close(connection, "its connection was closed")
            for message in messages:
                self._take(connection, message)
        except _TALK as error:
            self._close(connection, str(error))

    def _take(self, connection: _Connection, message: Json) -> None:
        if connection.rank is None:
            self._welcome(connection, message)
        else:
            key, value = str(message["key"]), message["value"]
            with self._news:
                self._inbox[(key, connection.rank)] = value
                self._news.notify_all()
                listeners = [listener for prefix, listener in self._listeners if key.startswith(prefix)]
            for listener in listeners:
                listener(key, value)

    def _welcome(self, connection: _Connection, message: Json) -> None:
        rank = message["rank"]
        if not hmac.compare_digest(str(message["mac"]), _sign(self.token, connection.nonce)):
            raise ValueError("wrong token")
        with self._news:
            if not self._admits or message["size"] != self.world.size or message["job"] != self._job:
                connection.queue({"refused": "the run is held by another job"})
            elif rank in self._peers or not 0 < rank < self.world.size:
                connection.queue({"refused": f"rank {rank} is already there: the run is held by another job"})
            else:
                connection.queue({"welcome": rank})
                connection.rank = rank
                self._peers[rank] = connection
                self._gone.pop(rank, None)
                for key, value in self._posted.items():
                    connection.queue({"key": key, "value": value})
            connection.send()
            self._news.notify_all()

    def _close(self, connection: _Connection, reason: str) -> None:
        with self._news:
            if connection.rank is not None and self._peers.get(connection.rank) is connection:
                del self._peers[connection.rank]
                self._gone[connection.rank] = reason
                self._news.notify_all()
        self._selector.unregister(connection.socket)
        connection.socket.close()

    def close(self, seconds: float = 5.0) -> None:
        """Send what is queued, for at most `seconds`, and close all connections."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with self._news:
                if not any(connection.outgoing for connection in self._peers.values()):
                    break
            self._wake()
            time.sleep(0.005)
        self._stopping = True
        self._wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(seconds)
        with self._news:
            self._gone.update(dict.fromkeys(self._peers, "this rank has closed its connections"))
            self.abandon()
            self._peers.clear()
            self._news.notify_all()

    def abandon(self) -> None:
        """Close the sockets and nothing else: in a forked child, which must not keep its parent's connections open.

        It takes no lock: the thread that held it does not exist in the child.
        """
        self._stopping = True
        for sock in [c.socket for c in self._peers.values()] + [self._listener, self._wake_in, self._wake_out]:
            if sock is not None:
                sock.close()


def _sign(token: str, nonce: str) -> str:
    return hmac.new(token.encode(), nonce.encode(), "sha256").hexdigest()


def _keep_alive(sock: socket.socket) -> None:
    """Between saves nothing is said for long: firewalls forget such connections, and a machine may lose its power."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # TCP_KEEPALIVE is what macOS calls TCP_KEEPIDLE.
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPALIVE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise OSError("the connection was closed")
        data += part
    return data


def _own_addresses() -> list[str]:
    """Addresses and names of this machine, the likeliest first."""
    name, master = socket.gethostname(), os.environ.get("MASTER_ADDR")
    found = []
    for target in (master, *_ELSEWHERE):
        # The address that this machine uses towards another; connecting a datagram socket sends nothing.
        for family in (socket.AF_INET, socket.AF_INET6) if target else ():
            with contextlib.suppress(OSError, UnicodeError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))
                found.append(str(probe.getsockname()[0]))
    names = [master or name, name]
    with contextlib.suppress(OSError, UnicodeError):
        for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM, flags=socket.AI_CANONNAME):
            found.append(str(info[4][0]))
            names.append(info[3] or name)
    # Names too: of its own one a machine may know no more than a loopback address, where the others know the right one.
    loopback = [address for address in found if _is_loopback(address)]
    others = [address for address in found if address not in loopback]
    return list(dict.fromkeys([*others, *names, *loopback, "127.0.0.1", "::1"]))


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
