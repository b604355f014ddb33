"""Checkpoints of several files: which of them a crash cut off, and how they are put out of the way.

While a directory ``checkpoint-500`` or a pair ``G_500.pth``, ``D_500.pth`` is being written, a small file
``.lastgood/open-*.json`` beside it says so. One that is found with its writer dead belongs to a checkpoint that was not
finished.
"""

from __future__ import annotations

import atexit
import contextlib
import fnmatch
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from . import journal, system
from .report import Report
from .settings import PRIVATE, Settings

IDLE = 60.0
"""Seconds without a save after which a directory counts as finished, where no framework says when it is."""


@dataclass
class Unit:
    """One checkpoint of several files."""

    directory: str
    """The directory that holds it."""
    names: list[str]
    """Of a directory: its name. Of a group: the names of all its files."""
    group: bool


class Units:
    """The checkpoints that this process is writing, and those that it finds."""

    def __init__(self, settings: Settings, report: Report) -> None:
        self.patterns = list(settings.complete)
        self._settings = settings
        self._report = report
        self._open: dict[str, dict[str, Any]] = {}
        self._outdated: dict[str, list[str]] = {}
        """By mark, those of dead writers of the same checkpoint, which could not be set aside and is written anew."""
        self._told_by_framework: set[str] = set()
        self._timer: threading.Timer | None = None
        atexit.register(self._at_exit)

    # Writing.

    def unit_of(self, target: str) -> Unit | None:
        """The checkpoint that a file belongs to, or None."""
        directory, name = os.path.split(target)
        for pattern in self.patterns:
            parts = pattern.split(",")
            if len(parts) > 1:
                for part in parts:
                    match = re.fullmatch(re.escape(part).replace(r"\*", "(.*)", 1).replace(r"\*", ".*"), name)
                    if match:
                        return Unit(directory, [p.replace("*", match.group(1)) for p in parts], True)
                continue
            here = directory
            for _ in range(3):
                above, last = os.path.split(here)
                if last and fnmatch.fnmatchcase(last, pattern):
                    return Unit(above, [last], False)
                here = above
        return None

    def begin(self, target: str) -> None:
        """A file of a checkpoint is about to be put in place."""
        unit = self.unit_of(target)
        if unit is None:
            return
        marker = self._marker(unit)
        if marker not in self._open:
            if not unit.group:
                self._end_directories(unit.directory)
            self._open[marker] = {
                "run": self._settings.run,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "birth": system.birth(os.getpid()),
                "directory": unit.directory,
                "names": unit.names,
                "group": unit.group,
                "began": time.time(),
                "saved": [],
            }
            self._write(marker)
            self._outdated[marker] = [] if unit.group else self._of_dead_writers(marker)
        name = os.path.basename(target)
        if unit.group and name not in self._open[marker]["saved"]:
            self._open[marker]["saved"].append(name)
            self._write(marker)

    def _write(self, marker: str) -> None:
        temporary = system.temporary(os.path.dirname(marker))
        with system.open_file(temporary, "w", encoding="utf-8") as file:
            json.dump(self._open[marker], file)
            file.flush()
            system.sync_file(file.fileno())
        system.replace(temporary, marker)

    def saved(self, target: str) -> None:
        """A file of a checkpoint is in place."""
        unit = self.unit_of(target)
        if unit is None:
            return
        if unit.group and set(self._open[self._marker(unit)]["saved"]) == set(unit.names):
            self._end(self._marker(unit))
        elif not unit.group and unit.directory not in self._told_by_framework:
            self._end_when_idle()

    def framework_tells(self, directory: str) -> None:
        """A framework says itself when a checkpoint in `directory` is finished: see :meth:`finished`."""
        self._told_by_framework.add(os.path.realpath(directory))

    def finished(self) -> None:
        """All directories that this process was writing are complete."""
        for marker in [marker for marker, content in self._open.items() if not content["group"]]:
            self._end(marker)

    def after_fork(self) -> None:
        """A child writes checkpoints of its own, if any."""
        self._open = {}
        self._timer = None

    def _marker(self, unit: Unit) -> str:
        digest = hashlib.md5("/".join(unit.names).encode("utf-8", "surrogateescape")).hexdigest()[:12]
        return os.path.join(unit.directory, PRIVATE, f"open-{digest}-{os.getpid()}.json")

    def _end(self, marker: str) -> None:
        self._open.pop(marker, None)
        for mark in (marker, *self._outdated.pop(marker, [])):
            with contextlib.suppress(OSError):
                system.remove(mark)

    def _of_dead_writers(self, marker: str) -> list[str]:
        private, own = os.path.split(marker)
        same = own.rsplit("-", 1)[0] + "-"
        found = [name for name in system.listdir(private) if name.startswith(same) and name != own]
        pids = {name: name[len(same) :].removesuffix(".json") for name in found}
        return [
            os.path.join(private, name)
            for name in found
            if pids[name].isdigit() and not system.is_alive(int(pids[name]))
        ]

    def _end_directories(self, directory: str) -> None:
        """The program has gone on to the next checkpoint, so the one before is finished."""
        for marker, content in list(self._open.items()):
            if not content["group"] and content["directory"] == directory:
                self._end(marker)

    def _end_when_idle(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(IDLE, self.finished)
        self._timer.daemon = True
        self._timer.start()

    def _at_exit(self) -> None:
        if getattr(sys, "last_exc", None) is None and getattr(sys, "last_type", None) is None:
            self.finished()

    # Finding.

    def settle(self, directory: str) -> set[str]:
        """Set aside what in `directory` was not finished and never will be; returns names that are to be hidden."""
        hidden: set[str] = set()
        private = os.path.join(directory, PRIVATE)
        try:
            markers = [name for name in system.listdir(private) if name.startswith("open-")]
        except OSError:
            return hidden
        for name in markers:
            marker = os.path.join(private, name)
            if marker in self._open:
                continue
            try:
                with system.open_file(marker, encoding="utf-8") as file:
                    content = json.load(file)
                if content["host"] != socket.gethostname():
                    # Whether its writer lives cannot be seen from here: out of sight, but not touched.
                    if content["run"] != self._settings.run and not content["group"]:
                        hidden.update(content["names"])
                elif system.is_alive(content["pid"]) and content["birth"] == system.birth(content["pid"]):
                    if not content["group"] and content["run"] != self._settings.run:
                        hidden.update(content["names"])
                else:
                    # Until it is out of the way: on Windows, a program that has a file in it open can prevent that.
                    out_of_sight = [] if content["group"] else content["names"]
                    hidden.update(out_of_sight)
                    self._set_aside(directory, marker, content)
                    hidden.difference_update(out_of_sight)
            except FileNotFoundError:
                continue  # Another rank was faster.
            except (OSError, ValueError, KeyError) as error:
                self._report.say_once(os.path.basename(marker), f"{marker} cannot be dealt with: {error!r}")
        return hidden

    def _set_aside(self, directory: str, marker: str, content: dict[str, Any]) -> None:
        with system.locked(os.path.dirname(marker)):
            if not system.exists(marker):
                return
            if content["group"]:
                self._roll_back(directory, content)
            else:
                for name in content["names"]:
                    self._hide_away(directory, name)
            system.remove(marker)

    def _hide_away(self, directory: str, name: str) -> None:
        source = os.path.join(directory, name)
        if not system.exists(source):
            return
        aside = os.path.join(directory, PRIVATE, "incomplete")
        os.makedirs(aside, exist_ok=True)
        target = os.path.join(aside, f"{name}.{int(time.time() * 1000)}")
        system.rename(source, target)
        self._report.add(set_aside=1)
        self._report.say(f"{source} was not completely written when its program ended; it is now {target}")

    def _roll_back(self, directory: str, content: dict[str, Any]) -> None:
        """Give the files of a pair that were replaced before the crash their earlier versions, as the others have."""
        placed = [name for name in content["names"] if self._is_placed(directory, name, content["began"])]
        others = [name for name in content["names"] if name not in placed]
        if not any(self._has_family(directory, name) for name in others):
            return  # All are there; or the program never writes the others, and there is no pair here.
        for name in placed:
            target = os.path.join(directory, name)
            versions = journal.read(target)
            kept = [version for version in versions[:-1] if version.kept]
            if not kept:
                self._hide_away(directory, name)
                journal.forget(target)
                continue
            version = kept[-1]
            temporary = system.temporary(target)
            system.copyfile(journal.history_path(target, version.kept), temporary)
            system.sync_path(temporary)
            system.replace(temporary, target)
            system.sync_dir(directory)
            version.inode = os.stat(target).st_ino
            journal.write(target, versions[:-1])
            self._report.add(set_aside=1)
            self._report.say(
                f"{target} was saved and {', '.join(others)} was not when the program ended: the version of "
                f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(version.time))} is back, which fits"
            )

    def _is_placed(self, directory: str, name: str, began: float) -> bool:
        """Whether a file was put in place after `began`. Its journal entry alone does not show it: it comes before."""
        target = os.path.join(directory, name)
        newest = journal.read(target)[-1:]
        try:
            return bool(newest) and newest[0].time >= began and newest[0].inode == os.stat(target).st_ino
        except FileNotFoundError:
            return False

    def _has_family(self, directory: str, name: str) -> bool:
        wanted = journal.family(name)
        return any(journal.family(there) == wanted for there in system.listdir(directory))
