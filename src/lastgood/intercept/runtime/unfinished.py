"""What a crash left of checkpoints of several files: put out of the way, or back to what was there before.

What is new is moved to ``.lastgood/incomplete``. Of what was there before, the files that were replaced get their
earlier version back.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

from . import journal, system
from .report import Report
from .settings import PRIVATE


def files_of(directory: str, names: list[str]) -> list[str]:
    """The files that a checkpoint has, as paths below `directory`: those of `names`, and those in directories of it."""
    found = []
    for name in names:
        path = os.path.join(directory, name)
        if system.isfile(path):
            found.append(name)
        elif os.path.isdir(path):
            below = [entry for entry in system.listdir(path) if entry != PRIVATE and not system.is_of_macos(entry)]
            found += files_of(directory, [os.path.join(name, entry) for entry in below])
    return found


def marks(directory: str, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The marks of unfinished checkpoints in `directory`, with what they say."""
    private = os.path.join(directory, PRIVATE)
    for name in system.listdir(private) if os.path.isdir(private) else []:
        if not name.startswith(prefix):
            continue
        try:
            with system.open_file(os.path.join(private, name), encoding="utf-8") as file:
                content = json.load(file)
        except (OSError, ValueError):
            continue  # Another rank has removed it; or it is none.
        yield os.path.join(private, name), content


def lives(content: dict[str, Any]) -> bool:
    """Whether the process of a mark of this host still runs; where that cannot be told from another, it does."""
    if not system.is_alive(content["pid"]):
        return False
    born = system.birth(content["pid"])
    return not born or not content["birth"] or content["birth"] == born


def set_aside(directory: str, marker: str, content: dict[str, Any], report: Report) -> None:
    """Deal with a checkpoint whose writer is dead, and remove its mark."""
    with system.locked(os.path.dirname(marker)):
        if not system.exists(marker):
            return
        if content["group"]:
            _take_back_group(directory, content, report)
        elif content.get("there"):
            placed = files_of(directory, content["names"])
            placed = [name for name in placed if _is_placed(directory, name, content["began"])]
            _take_back(directory, placed, content, f"the other files of {content['names'][0]}", report)
        else:
            for name in content["names"]:
                _hide_away(directory, name, "was not completely written when its program ended", report)
        system.remove(marker)


def _take_back_group(directory: str, content: dict[str, Any], report: Report) -> None:
    placed = [name for name in content["names"] if _is_placed(directory, name, content["began"])]
    others = [name for name in content["names"] if name not in placed]
    if has_family(
        directory, others
    ):  # Else all are there; or the program never writes the others, and there's no pair.
        _take_back(directory, placed, content, ", ".join(others), report)


def _take_back(directory: str, placed: list[str], content: dict[str, Any], others: str, report: Report) -> None:
    """Give the files that were replaced before the crash their earlier versions, as the others have."""
    for name in placed:
        target = os.path.join(directory, name)
        versions = journal.read(target)
        kept = [
            index
            for index, version in enumerate(versions)
            if version.kept
            and version.time < content["began"]
            and system.exists(journal.history_path(target, version.kept))
        ]
        found = f"was saved and {others} was not when the program ended"
        if kept:
            version = versions[kept[-1]]
            temporary = system.temporary(target)
            system.copyfile(journal.history_path(target, version.kept), temporary)
            system.sync_path(temporary)
            system.replace(temporary, target)
            system.sync_dir(os.path.dirname(target))
            version.inode = os.stat(target).st_ino
            journal.write(target, versions[: kept[-1] + 1])
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(version.time))
            report.add(set_aside=1)
            report.say(f"{target} {found}: the version of {when} is back, which fits")
        elif name in content.get("there", ()):
            # It may be the only one of its name, without which some programs begin anew.
            report.say(f"{target} {found}. There is no earlier version of it (see --history), so it stays as it is")
        else:
            _hide_away(directory, name, found, report)
            journal.forget(target)


def _hide_away(directory: str, name: str, found: str, report: Report) -> None:
    source = os.path.join(directory, name)
    if not system.exists(source):
        return
    target = os.path.join(directory, PRIVATE, "incomplete", f"{name}.{int(time.time() * 1000)}")
    system.make_dirs(os.path.dirname(target))
    system.rename(source, target)
    report.add(set_aside=1)
    report.say(f"{source} {found}; it is now {target}")


def _is_placed(directory: str, name: str, began: float) -> bool:
    """Whether what has this name now was put in place after `began`.

    The newest entry of its journal alone does not tell: it is written before, and its writer may have been killed in
    between, when another rank had put its own file there.
    """
    target = os.path.join(directory, name)
    try:
        inode = os.stat(target).st_ino
    except FileNotFoundError:
        return False
    entries = [version for version in journal.read(target) if version.inode == inode]
    return bool(entries) and entries[-1].time >= began


def has_family(directory: str, names: list[str]) -> bool:
    """Whether a file is there that has one of these names, whatever its numbers."""
    wanted = {journal.family(name) for name in names}
    return any(journal.family(there) in wanted for there in system.listdir(directory))
