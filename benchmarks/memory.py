"""The memory that a process has used at most."""

from __future__ import annotations

import re
from pathlib import Path


def peak_of_this_process() -> int:
    """Bytes; Linux only. Not `ru_maxrss`, which a program takes over from the process that started it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    if found is None:
        raise OSError("/proc/self/status does not say VmHWM.")
    return int(found[1]) * 1024
