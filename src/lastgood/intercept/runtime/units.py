"""Checkpoints of several files: which of them a crash cut off, and how they are put out of the way.

While a directory ``checkpoint-500`` or a pair ``G_500.pth``, ``D_500.pth`` is being written, a small file
``.lastgood/open-*.json`` beside it says so. One that is found with its writer dead belongs to a checkpoint that was not
finished: see :mod:`.unfinished`.
"""

from __future__ import annotations

import atexit
import contextlib
import fnmatch
import functools
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from . import groups, journal, system, unfinished
from .report import Report
from .settings import PRIVATE, SIDE_FILES, Settings

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

    @property
    def paths(self) -> set[str]:
        """Of a group: its files."""
        return {os.path.join(self.directory, name) for name in self.names}


@dataclass
class Mark:
    """What this process knows of a checkpoint that it is writing, beside what the file says."""

    content: dict[str, Any]
    before: list[str] = field(default_factory=list)
    """The marks of other ranks for the save before this one."""
    outdated: list[str] = field(default_factory=list)
    """The marks of dead writers of the same checkpoint, which could not be set aside and is written anew."""
    saved: list[str] = field(default_factory=list)
    """Its files that are in place, in the order of their saves."""
    failed: set[str] = field(default_factory=set)
    """Its files whose last save failed."""
    told: bool = False
    """A framework says when it is finished, and nothing else does."""


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """One thread at a time: savers, the timer, and whoever deletes."""

    @functools.wraps(method)
    def locked(self: Units, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


class Units:
    """The checkpoints that this process is writing, and those that it finds."""

    def __init__(self, settings: Settings, report: Report) -> None:
        self.patterns = list(settings.complete)
        self.exit_status: Any = None
        """What the program gave to sys.exit, if it has saved nothing since."""
        self._settings = settings
        self._report = report
        self._open: dict[str, Mark] = {}
        self._rounds: dict[str, int] = {}
        """By mark: how often this process has begun to write the checkpoint."""
        self._writing: dict[str, str] = {}
        """Temporary files that are being written: which files of directories they will be."""
        self._frameworks: list[set[str]] = []
        """For each save of a framework that is going on, the marks of what it has written so far."""
        self._timer: threading.Timer | None = None
        self._lock = threading.RLock()
        atexit.register(self.at_exit)

    # Writing.

    def unit_of(self, target: str) -> Unit | None:
        """The checkpoint that a file belongs to, or None."""
        directory, name = os.path.split(target)
        for pattern in self.patterns:
            parts = pattern.split(",")
            if len(parts) > 1:
                for part in parts:
                    match = re.fullmatch(re.escape(part).replace(r"\*", "(.*)", 1).replace(r"\*", ".*"), name)
                    if match and ("*" in part or "*" not in pattern):
                        text = match.group(1) if match.lastindex else ""
                        return Unit(directory, [p.replace("*", text) for p in parts], True)
                continue
            here = directory
            for _ in range(3):
                above, last = os.path.split(here)
                if last and fnmatch.fnmatchcase(last, pattern):
                    return Unit(above, [last], False)
                here = above
        return None

    def is_directory(self, path: str) -> bool:
        """Whether a directory as a whole is one checkpoint."""
        unit = self.unit_of(os.path.join(path, ""))
        return unit is not None and not unit.group and os.path.join(unit.directory, unit.names[0]) == path

    def fellows(self, target: str) -> tuple[list[str], list[str]]:
        """The files of the group that `target` is one of, in the order of the pattern; and what else is there of its
        group or directory. Both empty where it stands alone, as a file of a group of which there is no other."""
        unit = self.unit_of(target)
        if unit is None:
            return [], []
        there = [os.path.join(unit.directory, name) for name in unfinished.files_of(unit.directory, unit.names)]
        others = [path for path in there if path != target]
        return [os.path.join(unit.directory, name) for name in unit.names] if unit.group and others else [], others

    @_alone
    def writes(self, target: str, temporary: str) -> None:
        """A file is being written that will be `target`: if that is in a directory, this is not finished before."""
        unit = self.unit_of(target)
        if unit is None or unit.group:
            return
        self._writing[temporary] = target
        self._stop_timer()
        with contextlib.suppress(OSError):  # It is tried again when the file is put in place, which then fails.
            self.begin(target)

    @_alone
    def wrote(self, temporary: str, failed: str = "") -> None:
        """A file that was being written is in place; or it is not, and the save of `failed` has failed."""
        unit = self.unit_of(failed) if failed else None
        mark = self._open.get(self._marker(unit)) if unit is not None else None
        if mark is not None:
            mark.failed.add(failed)
        if self._writing.pop(temporary, None) is not None:
            self._end_when_idle()

    def locked(self, target: str, *others: str) -> contextlib.AbstractContextManager[None]:
        """Only one process at a time does something with a file, all files of its group, and others."""
        unit = self.unit_of(target)
        return system.locked(*(unit.paths if unit is not None and unit.group else [target]), *others)

    @_alone
    def begin(self, target: str, number: int = 0) -> int:
        """A file of a checkpoint is about to be written or put in place. Returns the number of a group's save.

        Args:
            number: of the save that rank 0 has begun, in which this rank is; 0: that is to be found out.
        """
        unit = self.unit_of(target)
        if unit is None:
            return 0
        self.exit_status = None
        marker = self._marker(unit)
        mark = self._open.get(marker)
        if mark is not None and self._begins_anew(unit, mark, target):
            if not unit.group:
                self._end(marker)
            mark = None
        if mark is None:
            if not unit.group:
                self._end_directories(unit.directory)
            mark = self._open[marker] = (
                self._new_of_group(unit, marker, number) if unit.group else self._new(unit, marker)
            )
            self._write(marker)
            for path in mark.before:
                with contextlib.suppress(OSError):  # That rank has removed it by now.
                    system.remove(path)
        if self._frameworks and not unit.group:
            mark.told = True
            self._frameworks[-1].add(marker)
        return int(mark.content.get("save", 0))

    def _content(self, unit: Unit, marker: str) -> dict[str, Any]:
        self._rounds[marker] = self._rounds.get(marker, 0) + 1
        return {
            "run": self._settings.run,
            "host": system.host(),
            "pid": os.getpid(),
            "birth": system.birth(os.getpid()),
            "directory": unit.directory,
            "names": unit.names,
            "group": unit.group,
            "round": self._rounds[marker],
            "began": time.time(),
            "there": unfinished.files_of(unit.directory, unit.names),
        }

    def _new(self, unit: Unit, marker: str) -> Mark:
        content = self._content(unit, marker)
        before, outdated = [], []
        for path, other in unfinished.marks(unit.directory, unfinished.prefix(marker)):
            if other["host"] != content["host"]:
                continue
            if other["run"] == content["run"] and other.get("round", 0) < content["round"]:
                # Another rank's, of the save before: this one would not have begun the next if it had not ended.
                before.append(path)
                continue
            # Another rank is writing it, or a dead process was: what these have put in place was never complete.
            content["began"] = min(content["began"], other["began"])
            content["there"] = [name for name in content["there"] if name in other.get("there", [])]
            if path != marker and not unfinished.lives(other):
                outdated.append(path)
        return Mark(content, before, outdated)

    def _new_of_group(self, unit: Unit, marker: str, number: int) -> Mark:
        content = self._content(unit, marker)
        groups.begin(marker, content, number, self._report)
        return Mark(content)

    def _begins_anew(self, unit: Unit, mark: Mark, target: str) -> bool:
        """Whether the program, which saves a file of a checkpoint for the second time, overwrites the whole checkpoint.

        Some write a JSON file of a directory twice in one save: it counts where they begin with it.
        """
        if unit.group:
            return target in mark.saved
        if mark.told or mark.failed or target not in mark.saved:
            return False
        return target == mark.saved[0] or not target.endswith(SIDE_FILES)

    def _write(self, marker: str) -> None:
        temporary = system.temporary(os.path.dirname(marker))
        with system.open_file(temporary, "w", encoding="utf-8") as file:
            json.dump(self._open[marker].content, file)
            file.flush()
            system.sync_file(file.fileno())
        system.replace(temporary, marker)

    @_alone
    def saved(self, target: str) -> None:
        """A file of a checkpoint is in place."""
        unit = self.unit_of(target)
        mark = self._open.get(self._marker(unit)) if unit is not None else None
        if unit is None or mark is None:
            return
        if target not in mark.saved:
            mark.saved.append(target)
        mark.failed.discard(target)
        if not unit.group:
            self._end_when_idle()
        elif set(mark.saved) == unit.paths:
            self._end(self._marker(unit))

    def left(self, target: str, number: int) -> None:
        """Rank 0 has put this file in place, for this rank too; of a group, in the save of this number."""
        unit = self.unit_of(target)
        if unit is not None and unit.group:
            self.begin(target, number)
            self.saved(target)

    @_alone
    def is_half_of_a_save(self, target: str, version: journal.Version) -> bool:
        """Whether a version of a file belongs to a checkpoint that is not finished, as far as this process knows.

        To go back to it would be to go back to what was never complete, so that it is no earlier version.
        """
        unit = self.unit_of(target)
        mark = self._open.get(self._marker(unit)) if unit is not None else None
        if unit is None or mark is None:
            return False
        if unit.group:
            return groups.is_half_of_a_save(unit.directory, unit.names, target, version.save, mark.content["save"])
        return bool(version.time >= mark.content["began"])

    @contextlib.contextmanager
    def of_framework(self) -> Iterator[None]:
        """A framework saves a checkpoint: it is finished when this block ends, and never if that is with an error."""
        self._frameworks.append(set())
        try:
            yield
        except BaseException:
            self._frameworks.pop()
            raise
        with self._lock:
            for marker in self._frameworks.pop():
                self._end(marker)

    @_alone
    def is_deleting(self, path: str) -> None:
        """Where a program deletes the last of the earlier directories, the newer one is finished, or it has nothing."""
        directory, name = os.path.split(path)
        here = [mark for mark in self._open.values() if mark.content["directory"] == directory]
        if not any(mark.saved and mark.content["names"] != [name] for mark in here):
            return
        # Some delete an old one in the middle of a save. As long as another is there, that can wait.
        others = set(system.listdir(directory)).difference([name], *(mark.content["names"] for mark in here))
        if not any(self.is_directory(os.path.join(directory, other)) for other in others):
            self._end_directories(directory)

    @_alone
    def deleted(self, path: str) -> None:
        """A directory is gone; if it is made again, that is another one."""
        unit = self.unit_of(os.path.join(path, ""))
        if unit is not None and self._marker(unit) in self._open:
            self._end(self._marker(unit))

    def after_fork(self) -> None:
        """A child writes checkpoints of its own, if any."""
        self._open = {}
        self._rounds = {}
        self._writing = {}
        self._frameworks = []
        self.exit_status = None
        self._timer = None
        self._lock = threading.RLock()

    def _marker(self, unit: Unit) -> str:
        digest = hashlib.md5("/".join(unit.names).encode("utf-8", "surrogateescape")).hexdigest()[:12]
        return os.path.join(unit.directory, PRIVATE, f"open-{digest}-{os.getpid()}.json")

    def _end(self, marker: str) -> None:
        mark = self._open.pop(marker, None)
        for path in (marker, *(mark.outdated if mark is not None else [])):
            with contextlib.suppress(OSError):
                system.remove(path)

    @_alone
    def _end_directories(self, directory: str | None = None) -> None:
        """The program has gone on, or has ended: the directories that it was writing are finished.

        Not those of a framework, nor those in which a save is going on or has failed.
        """
        for marker, mark in list(self._open.items()):
            unit = Unit(mark.content["directory"], mark.content["names"], mark.content["group"])
            if unit.group or mark.told or mark.failed or directory not in (None, unit.directory):
                continue
            if unit.names[0] in {there.names[0] for there in map(self.unit_of, self._writing.values()) if there}:
                continue
            self._end(marker)

    def _end_when_idle(self) -> None:
        self._stop_timer()
        if self._writing or not any(not mark.content["group"] for mark in list(self._open.values())):
            return
        self._timer = threading.Timer(IDLE, self._end_directories)
        self._timer.daemon = True
        with contextlib.suppress(RuntimeError):  # The interpreter is ending, and does it itself.
            self._timer.start()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    @_alone
    def at_exit(self) -> None:
        """The program ends: without an error, as far as can be seen, what it was writing is finished."""
        failed = getattr(sys, "last_exc", None) or getattr(sys, "last_type", None) or self.exit_status
        if not failed:
            self._end_directories()

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
                # What was complete before stays in sight.
                new = [] if content["group"] or content.get("there") else content["names"]
                # On another host, whether its writer lives cannot be seen from here: out of sight, but not touched.
                if content["host"] != system.host() or unfinished.lives(content):
                    if content["run"] != self._settings.run:
                        hidden.update(new)
                else:
                    # Until it is out of the way: on Windows, a program that has a file in it open can prevent that.
                    hidden.update(new)
                    kind = groups if content["group"] else unfinished
                    kind.set_aside(directory, marker, content, self._report)
                    hidden.difference_update(new)
            except FileNotFoundError:
                continue  # Another rank was faster.
            except (OSError, ValueError, KeyError) as error:
                self._report.say_once(os.path.basename(marker), f"{marker} cannot be dealt with: {error!r}")
        return hidden
