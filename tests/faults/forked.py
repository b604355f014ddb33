"""Programs that run in a process of their own each, forked from one that has imported torch once and has one thread.

The process of pytest cannot be that one: tests leave threads in it, and a fork has only the thread that made it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
_server: subprocess.Popen[str] | None = None


def run(code: str) -> tuple[int, str, str]:
    """What a program ends with, prints, and writes to standard error. It runs in the root of the repository."""
    global _server
    if _server is None:
        _server = _start()
        atexit.register(_end)
    assert _server.stdin is not None and _server.stdout is not None
    with tempfile.TemporaryDirectory(prefix="lastgood-forked-") as directory:
        texts = [Path(directory, name) for name in ("out", "err")]
        request = {"code": code, "files": [*map(str, texts)], "environment": _environment()}
        try:
            _server.stdin.write(json.dumps(request) + "\n")
            _server.stdin.flush()
            status = int(_server.stdout.readline())
        except BaseException:  # A test that took too long, or Ctrl-C: nothing is to run on.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(_server.pid, signal.SIGKILL)
            _end()
            raise
        out, err = (path.read_text(errors="replace") for path in texts)
        return status, out, err


def _start() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from tests.faults import forked; forked.serve()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=_environment(), start_new_session=True, **pipes)


def _end() -> None:
    global _server
    if _server is not None:
        _server.communicate()
        _server = None


def _environment() -> dict[str, str]:
    source = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


def serve() -> None:
    """Fork for every request, and answer with the exit code."""
    import tests.faults.__main__  # noqa: F401 - the campaigns, and torch.

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, name in enumerate([os.devnull, *request["files"]]):
                file = os.open(name, os.O_RDWR | os.O_CREAT)
                os.dup2(file, number)
                os.close(file)
            os.environ.clear()
            os.environ.update(request["environment"])
            exec(compile(request["code"], "<program>", "exec"), {"__name__": "__main__"})
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
