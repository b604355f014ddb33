"""Several training processes on this machine, through torch.distributed.run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

STOPPED = 75
"""Exit code of a training that was asked to stop and saved: "try again later" (sysexits)."""
GRACE_SECONDS = 600
"""For which a process that was asked to stop may finish its step and save. torch would kill it after 30."""
_CODES = "LASTGOOD_SOVITS_EXIT_CODES"


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Runs ``python -m lastgood_sovits`` with `arguments` in `nproc` processes, and gives the exit code.

    A request to stop (SIGTERM, Ctrl-C) is passed on to all of them, and the code is 75 when all saved and stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    # Read by the versions of torch in which this time can be chosen.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE_SECONDS))
    if sys.platform == "win32":
        os.environ.setdefault("USE_LIBUV", "0")
    command = ["--standalone", "--nproc-per-node", str(nproc), "-m", "lastgood_sovits", *arguments]
    parsed = parse_args(command)  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory(prefix="lastgood-sovits-") as folder:
        os.environ[_CODES] = folder
        try:
            run(parsed)  # type: ignore[no-untyped-call]
        except (ChildFailedError, SignalException) as error:
            if isinstance(error, SignalException):
                _end_forgotten()
            # What torch tells of a stop is that a signal came, not how the processes ended: they say it themselves.
            return _together([int(path.read_text() or 1) for path in Path(folder).iterdir()], nproc)
    return 0


def _end_forgotten() -> None:
    """Ends processes that torch started and lost sight of: a signal in that moment leaves them without a launcher.

    They would wait for it until the process group times out. Linux only; elsewhere they do.
    """
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGTERM)


def note_exit_code(code: int) -> None:
    """Tells `launch`, where this process was started by it, with which code it ends."""
    folder, rank = os.environ.get(_CODES), os.environ.get("RANK")
    if folder is not None and rank is not None and Path(folder).is_dir():
        Path(folder, rank).write_text(str(code))


def _together(codes: Sequence[int], nproc: int) -> int:
    """The code of a job whose processes ended with `codes`; one that was killed has none."""
    if len(codes) == nproc and len(set(codes)) == 1:
        return codes[0]
    return next((code for code in codes if code not in (0, STOPPED)), 1)
