"""Ranks as forked processes: the parent has imported torch once, so that a rank starts in milliseconds.

A rank is a function of a :class:`Rank`. What it returns or raises, what lastgood logged, and how its process ended
come back as :class:`Ended`. A rank that has not ended after `limit` seconds is killed and the test fails with its
stack: the limit is for machines that hang, not a part of any promise.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import logging
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DDP imports it lazily, which takes every forked rank seconds: once here instead
import torch.distributed as dist

from lastgood import Checkpointer, disk

torch.set_num_threads(1)


@dataclasses.dataclass
class Rank:
    """What a rank's function gets."""

    rank: int
    size: int
    scratch: Path
    """A directory that all ranks share, for markers."""
    run: Path

    def checkpointer(self, **arguments: Any) -> Checkpointer:
        """On the common run; the place in the world is passed by hand unless there is a process group."""
        if not dist.is_initialized():
            arguments = {"rank": self.rank, "world_size": self.size, **arguments}
        return Checkpointer(arguments.pop("run", self.run), **{"deadline": 60.0, **arguments})

    def group(self) -> None:
        """Join a gloo process group of all ranks."""
        store = dist.FileStore(str(self.scratch / "store"), self.size)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size)

    def mark(self, name: str) -> None:
        """Show the others that a point was reached."""
        (self.scratch / f"mark-{name}").touch()

    def await_mark(self, name: str, limit: float = 60.0) -> None:
        wait_until(lambda: (self.scratch / f"mark-{name}").exists(), f"the mark {name}", limit)


@dataclasses.dataclass
class Ended:
    """How a rank ended."""

    rank: int
    value: Any
    error: BaseException | None
    code: int
    """Exit code; a negative signal number where it was killed."""
    log: list[str]
    """What lastgood logged, a line for each: level and text."""
    seconds: float

    def ok(self) -> Any:
        """The value; raises what the rank raised."""
        if self.error is not None:
            raise self.error
        assert self.code == 0, f"rank {self.rank} ended with {self.code}"
        return self.value

    def logged(self, text: str) -> list[str]:
        return [line for line in self.log if text in line]


def wait_until(condition: Callable[[], object], what: str, limit: float = 60.0) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.005)


class World:
    """Some ranks that run."""

    def __init__(
        self,
        size: int,
        main: Callable[[Rank], Any] | Sequence[Callable[[Rank], Any]],
        scratch: Path,
        *,
        run: Path | None = None,
        limit: float = 120.0,
    ) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self.size, self._scratch, self._limit = size, scratch, limit
        self._began = time.monotonic()
        self.pids: list[int] = []
        self._ended: dict[int, int] = {}
        self._at: dict[int, float] = {}
        for index in range(size):
            rank = Rank(index, size, scratch, run or scratch / "run")
            pid = os.fork()
            if pid == 0:
                _child(rank, main if callable(main) else main[index], scratch, limit)
            self.pids.append(pid)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        if rank not in self._ended:
            os.kill(self.pids[rank], number)

    def _poll(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self._ended:
                got, status = os.waitpid(pid, os.WNOHANG)
                if got:
                    self._ended[rank] = os.waitstatus_to_exitcode(status)
                    self._at[rank] = time.monotonic()

    def alive(self) -> list[int]:
        self._poll()
        return [rank for rank in range(self.size) if rank not in self._ended]

    def wait(self, ranks: Sequence[int] | None = None) -> list[Ended]:
        """Wait for `ranks` (by default all), kill the others, and say how all ended."""
        wanted = list(range(self.size)) if ranks is None else list(ranks)
        while set(wanted) & set(self.alive()) and time.monotonic() < self._began + self._limit:
            time.sleep(0.005)
        late = sorted(set(wanted) & set(self.alive()))
        for rank in self.alive():
            self.kill(rank)
        while self.alive():
            time.sleep(0.005)
        if late:
            stacks = "\n".join((self._scratch / f"stack-{rank}").read_text() for rank in late)
            logs = "\n".join(f"{rank}: {self._read(rank).log}" for rank in range(self.size))
            raise AssertionError(f"ranks {late} did not end in {self._limit} s\n{stacks}\n{logs}")
        return [self._read(rank) for rank in range(self.size)]

    def _read(self, rank: int) -> Ended:
        log = self._scratch / f"log-{rank}"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        result = self._scratch / f"result-{rank}"
        value, error = pickle.loads(result.read_bytes()) if result.exists() else (None, None)
        return Ended(rank, value, error, self._ended.get(rank, 0), lines, self._at.get(rank, 0.0) - self._began)


def run_ranks(
    size: int,
    main: Callable[[Rank], Any] | Sequence[Callable[[Rank], Any]],
    scratch: Path,
    *,
    wait_for: Sequence[int] | None = None,
    **options: Any,
) -> list[Ended]:
    """Run all ranks to their ends."""
    return World(size, main, scratch, **options).wait(wait_for)


class _Lines(logging.Handler):
    """The log of a rank, in a file that survives its end."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = open(path, "a", buffering=1)  # noqa: SIM115

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname} {record.getMessage()}"
        if record.exc_info:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info))
        self._file.write(json.dumps(text) + "\n")


def _child(rank: Rank, main: Callable[[Rank], Any], scratch: Path, limit: float) -> None:
    code = 70
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stack = open(scratch / f"stack-{rank.rank}", "w")  # noqa: SIM115
        faulthandler.dump_traceback_later(limit - 5, file=stack)
        log = logging.getLogger("lastgood")
        log.handlers[:] = [_Lines(scratch / f"log-{rank.rank}")]
        log.setLevel(logging.INFO)
        log.propagate = False
        torch.manual_seed(1000 + rank.rank)
        value, error = None, None
        code = 0
        try:
            value = main(rank)
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else 1
        except BaseException as caught:
            caught.add_note("".join(traceback.format_exception(caught))) if hasattr(caught, "add_note") else None
            error, code = caught, 1
        path = scratch / f"result-{rank.rank}"
        part = path.with_suffix(".part")  # Who waits for another rank only may kill this one at any moment.
        try:
            data = pickle.dumps((value, error))
        except Exception:
            data = pickle.dumps((None, RuntimeError(f"not picklable: {value!r} {error!r}")))
        part.write_bytes(data)
        part.replace(path)
    finally:
        os._exit(code)


# -- faults -----------------------------------------------------------------------------------------------------------


def at_operation(name: str, when: str, ending: str, act: Callable[[], None]) -> None:
    """In a rank: call `act` once at the first file-system operation `name` on a path that ends with `ending`."""
    done = []

    def observe(operation: disk.Operation, moment: str) -> None:
        if operation.name == name and moment == when and str(operation.path).endswith(ending) and not done:
            done.append(True)
            act()

    disk.observer = observe


def at_message(ckpt: Checkpointer, ending: str, when: str, act: Callable[[], None]) -> None:
    """In a rank: call `act` once before or after it posts the first message whose key ends with `ending`."""
    post, done = ckpt.channel.post, []

    def watched(key: str, value: Any) -> None:
        first = key.endswith(ending) and not done
        if first:
            done.append(True)
        if first and when == "before":
            act()
        post(key, value)
        if first and when == "after":
            flush(ckpt)
            act()

    ckpt.channel.post = watched  # type: ignore[method-assign]


def flush(ckpt: Checkpointer) -> None:
    """Wait until what was posted has left this process."""
    channel = ckpt.channel
    wait_until(lambda: not any(c.outgoing for c in list(channel._peers.values())), "the messages to leave")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.3)  # another thread may take the signal: this one must not run on until all stand still


def checkpoints(run: Path) -> list[str]:
    """Names of the committed checkpoints."""
    return sorted(path.parent.name for path in run.glob("step-*/manifest.json"))


def events(run: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    for line in (run / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if kind in (None, event["event"]):
            yield event
