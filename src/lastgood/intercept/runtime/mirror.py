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


class Mirror:
    """The copies that are still to be made: by one thread, in the order of the saves, the newest of each file only."""

    def __init__(self, settings: Settings, report: Report) -> None:
        self._settings = settings
        self._report = report
        self.reset()

    def reset(self) -> None:
        """In a forked child: what is to be copied is its parent's affair."""
        self._lock = threading.RLock()  # A signal handler or a finalizer may save, too.
        self._links: dict[str, str | None] = {}
        """What is to be copied, by its path; None where the copy is to go."""
        self._running = False

    def copy(self, path: str) -> None:
        """Copy a file that was just put in place. A link holds this version until it is copied."""
        link = system.temporary(path)
        try:
            system.link(path, link)
        except OSError:
            link = path  # No hard links here: the copy is of whatever has the name when it is read.
        self._do(path, link)

    def moved(self, path: str) -> None:
        """A file that was saved under a temporary name has another now: the copy under the first one goes."""
        self._do(path, None)

    def _do(self, path: str, link: str | None) -> None:
        with self._lock:
            before = self._links.pop(path, None)
            self._links[path] = link
            start = not self._running
            self._running = True
        _drop(before, path)
        if start:
            # Not a daemon: the interpreter waits for it at the end.
            thread = threading.Thread(target=self._work, name="lastgood mirror")
            try:
                thread.start()
            except RuntimeError:
                self._work()  # The interpreter is ending, and starts no more threads.

    def _work(self) -> None:
        try:
            self._copy_all()
        except BaseException:
            with self._lock:
                self._running = False  # The next save begins anew.
            raise

    def _copy_all(self) -> None:
        while True:
            with self._lock:
                if not self._links:
                    self._running = False
                    return
                path = next(iter(self._links))
                link = self._links.pop(path)
            target = place(path, self._settings)
            try:
                if link is not None:
                    self._copy(link, path, target)
                elif system.exists(target):
                    system.remove(target)
            except OSError as error:
                mirror = self._settings.mirror
                self._report.say(f"the copy of {path} in {mirror} failed: {error}. The file itself is saved.")
            finally:
                _drop(link, path)

    def _copy(self, link: str, path: str, target: str) -> None:
        system.make_dirs(os.path.dirname(target))
        with system.locked(target):
            if link != path and not _is_same(link, path):
                return  # Replaced by another process, which makes the copy, or moved or deleted.
            temporary = system.temporary(target)
            with system.open_file(link, "rb") as source, system.open_file(temporary, "xb") as file:
                shutil.copyfileobj(source, file, 1 << 22)
                file.flush()
                system.sync_file(file.fileno())
            system.patiently(lambda: system.replace(temporary, target), self._settings.patience, lambda: None)


def _is_same(link: str, path: str) -> bool:
    try:
        return os.path.samestat(system.stat(link), system.stat(path))
    except FileNotFoundError:
        return False


def _drop(link: str | None, path: str) -> None:
    if link is not None and link != path:
        with contextlib.suppress(OSError):
            system.remove(link)
