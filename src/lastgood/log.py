"""What people see of the saves."""

from __future__ import annotations

import logging

_log = logging.getLogger("lastgood")


def format_bytes(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def show_log(rank: int) -> None:
    """Show the log on standard error where the program has not set up logging itself: saves are to be seen."""
    if not _log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s lastgood: %(message)s", "%H:%M:%S"))
        handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)
        _log.propagate = False
