"""Run a program again and again, killed at each of its file operations in turn, and see what it resumes from.

    python crash.py PROGRAM WORK [--ranks N] [--mode before|torn] [--stride N] [--first N] [--cwd DIR]

The program is run by a fork of this process, which has imported torch (and whatever else takes long) once. It is told
where to note what it saved (ACK: one line after each save) and what it resumed from (RESUMED). The last line of the
output is a JSON list with one entry for each point.
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
        if path.startswith(self.roots) and not path.endswith(("ACK", "RESUMED")):
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


def try_point(options: argparse.Namespace, point: int) -> dict[str, Any]:
    work = tempfile.mkdtemp(prefix="point-", dir=options.work)
    cwd = tempfile.mkdtemp(prefix="cwd-", dir=options.cwd) if options.cwd else work
    variables = {"ACK": f"{work}/ACK", "RESUMED": f"{work}/RESUMED", "OUT": work}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables["MASTER_PORT"] = str(free.getsockname()[1])
    if options.by_step:
        variables["BY_STEP"] = "1"
    victim = point % options.ranks
    pids = []
    for rank in range(options.ranks):
        killer = Killer(point // options.ranks, options.mode, [work, cwd]) if rank == victim else None
        pids.append(child(options.program, cwd, rank, options.ranks, killer, variables))
    statuses = wait(pids, together=True)
    result: dict[str, Any] = {
        "point": point,
        "killed": os.WIFSIGNALED(statuses[victim]),
        "codes": statuses,
        "at": last_line(Path(work, "KILLED")),
        "saved": last_line(Path(work, "ACK")),
    }
    if result["killed"]:
        variables["RESUME_ONLY"] = "1"
        pids = [child(options.program, cwd, rank, options.ranks, None, variables) for rank in range(options.ranks)]
        result["resume_codes"] = wait(pids, together=False)
        result["resumed"] = last_line(Path(work, "RESUMED"))
    shutil.rmtree(work)
    if options.cwd:
        shutil.rmtree(cwd)
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
    parser.add_argument("--by-step", action="store_true")
    parser.add_argument("--preload", default="torch")
    options = parser.parse_args()
    options.program = os.path.abspath(options.program)
    for name in options.preload.split(","):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    results = []
    point = options.first
    while True:
        result = try_point(options, point)
        results.append(result)
        if not result["killed"]:
            break
        point += options.stride
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
