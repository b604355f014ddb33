"""What a crash left of checkpoints of several files: put out of the way, or back to what was there before.

What is new is moved to ``.lastgood/incomplete``. Of what was there before, the files that were replaced get their
earlier version back.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
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


def marks(directory: str, beginning: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The marks of unfinished checkpoints in `directory`, with what they say."""
    private = os.path.join(directory, PRIVATE)
    for name in system.listdir(private) if os.path.isdir(private) else []:
        if not name.startswith(beginning):
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


def prefix(marker: str) -> str:
    """How the names of all marks of the checkpoint begin that has this one."""
    return os.path.basename(marker).rsplit("-", 1)[0]


def may_live(content: dict[str, Any]) -> bool:
    """Whether the process of a mark still runs; or may do so, on another host."""
    return content["host"] != socket.gethostname() or lives(content)


def set_aside(directory: str, marker: str, content: dict[str, Any], report: Report) -> None:
    """Deal with a directory whose writer is dead, and remove its mark."""
    with system.locked(os.path.dirname(marker)):
        if not system.exists(marker):
            return
        if content.get("there"):
            placed = files_of(directory, content["names"])
            placed = [name for name in placed if _is_placed(directory, name, content["began"])]
            _take_back(directory, placed, content, f"the other files of {content['names'][0]}", report)
        else:
            for name in content["names"]:
                hide_away(directory, name, "was not completely written when its program ended", report)
        system.remove(marker)


def _take_back(directory: str, placed: list[str], content: dict[str, Any], others: str, report: Report) -> None:
    """Give the files that were replaced before the crash their earlier versions, as the others have."""
    for name in placed:
        target = os.path.join(directory, name)
        kept = [
            version
            for version in journal.read(target)
            if version.kept
            and version.time < content["began"]
            and system.exists(journal.history_path(target, version.kept))
        ]
        found = f"was saved and {others} was not when the program ended"
        if kept:
            bring_back(target, kept[-1], found, report)
        elif name in content["there"]:
            say_that_it_stays(target, found, report)
        else:
            hide_away(directory, name, found, report)
            journal.forget(target)


def bring_back(target: str, version: journal.Version, found: str, report: Report) -> None:
    """Put a version from the history in place again."""
    system.clear_leftovers(os.path.dirname(target))  # A recovery that was killed has left such a copy.
    temporary = system.temporary(target)
    system.copyfile(journal.history_path(target, version.kept), temporary)
    system.sync_path(temporary)
    # In the journal before it is in place, as every file. What is in the history is its, and not two entries'.
    back = dataclasses.replace(version, inode=os.stat(temporary).st_ino)
    others = [dataclasses.replace(one, kept="") if one.kept == version.kept else one for one in journal.read(target)]
    journal.write(target, [*others, back])
    system.replace(temporary, target)
    system.sync_dir(os.path.dirname(target))
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(version.time))
    report.add(set_aside=1)
    report.say(f"{target} {found}: the version of {when} is back, which fits")


def say_that_it_stays(target: str, found: str, report: Report) -> None:
    """It may be the only one of its name, without which some programs begin anew."""
    report.say(f"{target} {found}. There is no earlier version of it (see --history), so it stays as it is")


def hide_away(directory: str, name: str, found: str, report: Report) -> None:
    """Move what was not completely saved to where no program looks for it."""
    source = os.path.join(directory, name)
    if not system.exists(source):
        return
    target = os.path.join(directory, PRIVATE, "incomplete", f"{name}.{int(time.time() * 1000)}")
    system.make_dirs(os.path.dirname(target))
    system.rename(source, target)
    report.add(set_aside=1)
    report.say(f"{source} {found}; it is now {target}")


def _is_placed(directory: str, name: str, began: float) -> bool:
    """Whether what has this name now was put in place after `began`."""
    version = journal.lying(os.path.join(directory, name))
    return version is not None and version.time >= began
