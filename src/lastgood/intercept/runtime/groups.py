"""Files that are saved together, as ``G_500.pth`` and ``D_500.pth``: which of their versions fit together.

Each version carries the number of its save in the journal, whichever rank has put it in place, and versions of one
number fit together. A save is whole when each of its files lies in its place or in the history. The newest whole save
is on the disk at every moment, wherever ranks are killed:

- A save has a number that none had before it; ranks that are in the same save at the same time share it.
- A file that is replaced is kept if its save is whole, and nothing else is kept.
- While files of more than one number are in place, a mark of whoever put them there says so.

Each step of it (a file is put in place, what a crash left is put right) holds the locks of all files of the group.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from . import journal, system, unfinished
from .report import Report


def locked(directory: str, names: list[str]) -> contextlib.AbstractContextManager[None]:
    """Only one process at a time does something with these files."""
    return system.locked(*(os.path.join(directory, name) for name in names))


def begin(marker: str, content: dict[str, Any], number: int, report: Report) -> None:
    """Complete the mark of a save that begins: which save it is, and what was there before.

    Args:
        number: of the save of which this rank has left a file to rank 0, so that it is in it; 0: it has not.
    """
    directory, names = content["directory"], content["names"]
    marks = dict(unfinished.marks(directory, unfinished.prefix(marker)))
    if not number and not any(map(unfinished.may_live, marks.values())):
        try:
            for path, other in marks.items():
                set_aside(directory, path, other, report)
            marks = {}
        except (OSError, KeyError) as error:  # On Windows, another program has a file open; or it is an old mark.
            report.say_once(os.path.basename(marker), f"what a crash left in {directory} stays there: {error!r}")
    for other in marks.values():
        # Another rank is writing it, or a dead process was: what these have put in place was never complete.
        content["there"] = [name for name in content["there"] if name in other.get("there", ())]
        same = (other["run"], other.get("round")) == (content["run"], content["round"])
        if same and not number and unfinished.may_live(other):
            number = other["save"]
    content["save"] = number or _new_number(directory, names, settled=not marks)


def _new_number(directory: str, names: list[str], *, settled: bool) -> int:
    """A number that no save of these files had.

    Args:
        settled: no save of them is unfinished. What lies there is a whole one then, whoever has put it there, for a
            program would load it: if it has not one number, it gets one, unless some of it is damaged.
    """
    versions = {target: journal.read(target) for target in (os.path.join(directory, name) for name in names)}
    number = 1 + max((version.save for known in versions.values() for version in known), default=0)
    lying = {target: journal.lying(target, known) for target, known in versions.items() if system.isfile(target)}
    numbers = {version.save if version is not None else 0 for version in lying.values()}
    if not settled or (0 not in numbers and len(numbers) <= 1):
        return number
    if any(version is None and journal.check(target, versions[target]) for target, version in lying.items()):
        return number
    for target, version in lying.items():
        if version is None:
            version = journal.unknown(target)
            versions[target].append(version)
        version.save = number
        journal.write(target, versions[target])
    return number + 1


def is_half_of_a_save(directory: str, names: list[str], target: str, number: int, going_on: int) -> bool:
    """Whether `target` is, in the save of this number, without its fellows.

    Args:
        going_on: the number of the save that is going on: it has its fellows when that is over.
    """
    others = [path for path in (os.path.join(directory, name) for name in _written(directory, names)) if path != target]
    return bool(others) and (number == going_on or any(number not in _available(other) for other in others))


def set_aside(directory: str, marker: str, content: dict[str, Any], report: Report) -> None:
    """Deal with a save whose writer is dead, and remove its mark, unless another rank is still in a save."""
    with locked(directory, content["names"]):
        marks = dict(unfinished.marks(directory, unfinished.prefix(marker)))
        # Another host's do not count: whether its rank lives cannot be seen from here.
        here = [other for other in marks.values() if other["host"] == content["host"]]
        if marker in marks and not any(map(unfinished.lives, here)):
            _take_back(directory, content, report)
            system.remove(marker)


def _take_back(directory: str, content: dict[str, Any], report: Report) -> None:
    """Where files of an unfinished save are in place, put the newest whole save back."""
    names = _written(directory, content["names"])
    lying = {name: journal.lying(os.path.join(directory, name)) for name in names}
    halves = [name for name, version in lying.items() if version is not None and version.save == content["save"]]
    if not halves:
        return
    available = {name: _available(os.path.join(directory, name)) for name in names}
    whole = set.intersection(*(set(numbers) for numbers in available.values()))
    others = ", ".join(name for name in content["names"] if name not in halves)
    for name in names:
        found = f"was saved and {others} was not when the program ended"
        if name not in halves:
            found = f"is not of the same save as {', '.join(halves)}"
        target = os.path.join(directory, name)
        if whole:
            # Not what somebody else has put there.
            if available[name][max(whole)] != target and (lying[name] is not None or not system.exists(target)):
                kept = [one for one in journal.read(target) if one.save == max(whole) and one.kept]
                unfinished.bring_back(target, kept[-1], found, report)
        elif name in halves and name in content["there"]:
            unfinished.say_that_it_stays(target, found, report)
        elif name in halves:
            unfinished.hide_away(directory, name, found, report)
            journal.forget(target)


def _written(directory: str, names: list[str]) -> list[str]:
    """Those of the names that the program writes, as a file shows that has the same name, whatever its numbers."""
    there = {journal.family(name) for name in system.listdir(directory)}
    return [name for name in names if journal.family(name) in there]


def _available(target: str) -> dict[int, str]:
    """By the number of the save, where the versions of a file lie."""
    versions = journal.read(target)
    kept = {version.save: journal.history_path(target, version.kept) for version in versions if version.kept}
    found = {save: path for save, path in kept.items() if system.exists(path)}
    if system.isfile(target):
        version = journal.lying(target, versions)
        found[version.save if version is not None else 0] = target
    return found
