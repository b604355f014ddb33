"""Several training processes on this machine, through torch.distributed.run."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

STOPPED = 75
"""Exit code of a training that was asked to stop and saved: "try again later" (sysexits)."""


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Runs ``python -m lastgood_sovits`` with `arguments` in `nproc` processes, and gives the exit code.

    A request to stop (SIGTERM, Ctrl-C) is passed on to all of them, and the code is 75 when they saved and stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    if sys.platform == "win32":
        os.environ.setdefault("USE_LIBUV", "0")
    command = ["--standalone", "--nproc-per-node", str(nproc), "-m", "lastgood_sovits", *arguments]
    parsed = parse_args(command)  # type: ignore[no-untyped-call]
    try:
        run(parsed)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        return STOPPED if set(codes) == {STOPPED} else next((code for code in codes if code > 0), 1)
    except SignalException as error:
        return STOPPED if error.sigval in (signal.SIGTERM, signal.SIGINT) else 1
    return 0
