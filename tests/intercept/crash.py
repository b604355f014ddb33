"""Run a program again and again, killed at each of its file operations in turn, and see what it resumes from.

    python crash.py PROGRAM WORK [--ranks N] [--mode before|torn] [--stride N] [--first N] [--cwd DIR]

The program is run by a fork of this process, which has imported torch (and whatever else takes long) once. It is told
where to note what it saved (ACK: one line after each save), what it resumed from (RESUMED) and what it ended with
(ENDED), where that is to be the same as after an undisturbed save of the same step. The last line of the output is a
JSON list with one entry for each point.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killer:
    """An audit hook that ends the process at a file operation below some directories."""

    def __init__(self, point: int, mode: str, roots: list[str]) -> None:
        self.left = point
        self.mode = mode
        self.roots = tuple(os.path.realpath(root) + os.sep for root in roots)
        self.at = ""

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            name, _, flags = arguments
            if not isinstance(name, (str, bytes)) or not (flags or 0) & WRITING:
                return
        elif event in ("os.rename", "os.link"):
            name = arguments[1]
        elif event in ("os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            name = arguments[0]
        else:
            return
        if self.mode == "torn" and event != "open":
            return
        text = os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else ""
        path = os.path.join(os.path.realpath(os.path.dirname(text) or "."), os.path.basename(text))
        if path.startswith(self.roots) and not path.endswith(("ACK", "RESUMED", "ENDED")):
            self.hit(f"{event} {path}")

    def hit(self, what: str) -> None:
        self.left -= 1
        if self.left >= 0:
            return
        self.left = 1 << 30
        with open(self.roots[0] + "KILLED", "w") as file:
            file.write(what.replace(" ", ":"))
        if self.mode == "torn":
            # From here on, no file grows past 400 bytes: the process dies inside of the write that tries.
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
            return
        os.kill(os.getpid(), signal.SIGKILL)

    def arm(self) -> None:
        if self.mode == "before":
            real = os.fsync

            def fsync(descriptor: int) -> None:
                self.hit("fsync")
                real(descriptor)

            os.fsync = fsync
        sys.addaudithook(self)


def child(program: str, cwd: str, rank: int, ranks: int, killer: Killer | None, variables: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.chdir(cwd)
        os.environ.update(variables)
        if ranks > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
        sys.argv = [program]
        if killer is not None:
            killer.arm()
        runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pids: list[int], together: bool) -> list[int]:
    """The wait statuses. When one dies by a signal the job is over: the others are killed."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = status
                    if together and os.WIFSIGNALED(status):
                        time.sleep(0.02)
                        for other in set(pids) - set(statuses):
                            os.kill(other, signal.SIGKILL)
        time.sleep(0.002)
    return [statuses[pid] for pid in pids]


def last_line(path: Path) -> str:
    lines = path.read_text().split() if path.exists() else []
    return lines[-1] if lines else ""


class Work:
    """The directories of one program, which is run in them and resumed in them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.path = tempfile.mkdtemp(prefix="point-", dir=options.work)
        self.cwd = tempfile.mkdtemp(prefix="cwd-", dir=options.cwd) if options.cwd else self.path
        self._variables = {"OUT": self.path, **{name: f"{self.path}/{name}" for name in ("ACK", "RESUMED", "ENDED")}}
        self._variables.update(pair.split("=", 1) for pair in options.variable)

    def run(
        self, *, ranks: int | None = None, victim: int = -1, killer: Killer | None = None, **variables: str
    ) -> list[int]:
        """The wait statuses of all ranks."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            variables.update(self._variables, MASTER_PORT=str(free.getsockname()[1]))
        ranks = ranks or self.options.ranks
        program = self.options.program
        pids = [
            child(program, self.cwd, rank, ranks, killer if rank == victim else None, variables)
            for rank in range(ranks)
        ]
        return wait(pids, together="RESUME_ONLY" not in variables)

    def last(self, name: str) -> str:
        return last_line(Path(self.path, name))

    def remove(self) -> None:
        shutil.rmtree(self.path)
        if self.options.cwd:
            shutil.rmtree(self.cwd)


def undisturbed_end(options: argparse.Namespace, step: str, known: dict[str, str]) -> str:
    """What the program ends with when it resumes from a step after which it was killed, but not while it saved."""
    if step not in known:
        work = Work(options)
        # Where ranks do not wait for each other, another may be ahead of the one that ends after this step.
        ranks = 1 if options.until > 1 else options.ranks
        if int(step):
            work.run(ranks=ranks, END_AFTER=step)
        work.run(ranks=ranks, RESUME_ONLY="1")
        assert work.last("RESUMED") == step, (step, work.last("RESUMED"))
        known[step] = work.last("ENDED")
        work.remove()
    return known[step]


def try_point(options: argparse.Namespace, point: int, known: dict[str, str]) -> dict[str, Any]:
    work = Work(options)
    victim = point % options.ranks
    killer = Killer(point // options.ranks, options.mode, [work.path, work.cwd])
    statuses = work.run(victim=victim, killer=killer)
    result: dict[str, Any] = {
        "point": point,
        "killed": os.WIFSIGNALED(statuses[victim]),
        "codes": statuses,
        "at": work.last("KILLED"),
        "saved": work.last("ACK"),
    }
    if result["killed"]:
        if os.path.exists(f"{work.path}/ENDED"):
            os.remove(f"{work.path}/ENDED")
        result["resume_codes"] = work.run(RESUME_ONLY="1")
        result["resumed"] = work.last("RESUMED")
        result["ended"] = work.last("ENDED")
        result["expected"] = undisturbed_end(options, result["resumed"], known) if result["ended"] else ""
    work.remove()
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("work")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--mode", choices=["before", "torn"], default="before")
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cwd")
    parser.add_argument("--variable", action="append", default=[], metavar="NAME=VALUE", help="for the program")
    parser.add_argument("--preload", default="torch")
    parser.add_argument("--until", type=int, default=1, help="ends when each rank came through unharmed so often")
    options = parser.parse_args()
    options.program = os.path.abspath(options.program)
    for name in options.preload.split(","):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, os.path.dirname(options.program))
    results = []
    ends: dict[str, str] = {}
    point = options.first
    unharmed: dict[int, int] = {}
    while not unharmed or min(unharmed.values()) < options.until:
        result = try_point(options, point, ends)
        results.append(result)
        victim = point % options.ranks
        unharmed[victim] = 0 if result["killed"] else unharmed.get(victim, 0) + 1
        point += options.stride
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
