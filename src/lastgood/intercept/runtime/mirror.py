"""Copies of what was saved, in another place, made while the program goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading

from . import system
from .report import Report
from .settings import Settings


def place(path: str, settings: Settings) -> str:
    """Where the copy of `path` goes: relative to the start directory, or with its full path below ``_``."""
    relative = os.path.relpath(path, settings.start or ".") if _below(path, settings.start) else ""
    if not relative:
        relative = os.path.join("_", os.path.splitdrive(path)[1].lstrip("/\\"))
    return os.path.join(settings.mirror, relative)


def _below(path: str, directory: str) -> bool:
    return bool(directory) and os.path.normcase(path).startswith(os.path.join(os.path.normcase(directory), ""))


def copy(path: str, settings: Settings, report: Report) -> None:
    """Start to copy a file that was just put in place. A link holds this version until it is copied."""
    link = system.temporary(path)
    try:
        os.link(path, link)
    except OSError:
        link = path  # No hard links here: the copy is of whatever has the name when it is read.
    # Not a daemon: the interpreter waits for it at the end.
    threading.Thread(target=_copy, args=(link, path, settings, report), name="lastgood mirror").start()


def _copy(link: str, path: str, settings: Settings, report: Report) -> None:
    target = place(path, settings)
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with system.locked(target):
            temporary = system.temporary(target)
            with system.open_file(link, "rb") as source, system.open_file(temporary, "xb") as file:
                shutil.copyfileobj(source, file, 1 << 22)
                file.flush()
                system.sync_file(file.fileno())
            system.patiently(lambda: system.replace(temporary, target), settings.patience, lambda: None)
    except OSError as error:
        report.say(f"the copy of {path} in {settings.mirror} failed: {error}. The file itself is saved.")
    finally:
        if link != path:
            with contextlib.suppress(OSError):
                system.remove(link)
