"""What is loaded in place of a damaged file: alone where it stands alone, else with all that belongs to it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator

from . import journal, system
from .report import Report
from .units import Units

_PART = re.compile(r"-\d{5}-of-\d{5}\.|\.distcp$|\.metadata$")
"""Names of files that fit to the others of their save only: model-00001-of-00003.safetensors, __0_0.distcp."""


class DamagedFileError(RuntimeError):
    """A file is not what was saved under its name."""


class Fallback:
    """Checks the files that this process loads."""

    def __init__(self, units: Units, report: Report, refused: set[str], *, wanted: bool) -> None:
        """
        Args:
            refused: is told what is not loaded.
            wanted: load something else in place of a damaged file; else only name it.
        """
        self._units = units
        self._report = report
        self._refused = refused
        self._wanted = wanted
        self._loaded: set[str] = set()
        """Files of groups that were loaded as they are: nothing else fits to them than what lies beside them."""
        self._chosen: dict[str, tuple[os.stat_result, str]] = {}
        """By file of a group, what it was when another path was chosen for it, since one of the group is damaged."""

    def instead_of(self, path: str, target: str) -> str | None:
        """The path that is to be loaded in place of `path`, a link to `target` or the same; None: itself.

        Raises:
            DamagedFileError: it is not what was saved, and names the newest file that is.
        """
        if not system.exists(target):
            return None  # Torch says that it is missing.
        damage = journal.check(target, journal.read(target))
        group, fellows = self._units.fellows(target)
        if group:
            return self._of_group(target, damage, group, fellows)
        if not damage:
            return None
        found = f"{path} is damaged: {damage}."
        if fellows:
            names = ", ".join(sorted(os.path.basename(fellow) for fellow in fellows))
            raise self._refusal([target], f"{found} It and {names} belong together: load another checkpoint.")
        if _PART.search(os.path.basename(target)):
            raise self._refusal([target], f"{found} It is one part of several files: load another checkpoint.")
        newest = next(journal.intact_versions(target), None)
        if newest is None:
            raise self._refusal([target], f"{found} There is no intact version of it; load another checkpoint.")
        if self._wanted:
            self._report.add(fallbacks=1)
            self._report.say(f"{found} Loading {newest[0]} of {_when(newest[1].time)} instead.")
            return newest[0]
        raise self._refusal(
            [target],
            f"{found} The newest intact version is {newest[0]}, of {_when(newest[1].time)}: copy it to {path}, or "
            "start again with `lastgood run --fallback`, which loads it.",
        )

    def _refusal(self, targets: list[str], message: str) -> DamagedFileError:
        """The error for the program, and the same for its user: some programs catch it, say nothing and begin anew."""
        self._refused.update(targets)
        self._report.add(refusals=1)
        self._report.say(message)
        return DamagedFileError(message)

    def _of_group(self, target: str, damage: str, group: list[str], fellows: list[str]) -> str | None:
        if target in self._chosen:
            before, chosen = self._chosen[target]
            if _same(before, os.stat(target)):
                return chosen
        # All of them, before the first is loaded: nothing can be done for the second when the first is in use.
        damages = {target: damage}
        if self._wanted:
            unread = [one for one in fellows if one not in self._loaded]
            damages.update({one: journal.check(one, journal.read(one)) for one in unread})
        if not any(damages.values()):
            self._loaded.add(target)
            return None
        free = not self._loaded.intersection(fellows)
        # Where nothing is to be replaced, one in use changes nothing: started again, the program can have the others.
        others = next(self._whole_ones(target, group), None) if free or not self._wanted else None
        found = " ".join(f"{one} is damaged: {says}." for one, says in damages.items() if says)
        if others is not None and self._wanted:
            when, instead = others
            self._chosen.update({one: (os.stat(one), instead[one]) for one in instead if system.exists(one)})
            self._report.add(fallbacks=1)
            self._report.say(f"{found} Loading {', '.join(instead.values())} of {_when(when)} instead.")
            return instead[target]
        if not damage:
            self._loaded.add(target)
            return None
        names = ", ".join(os.path.basename(one) for one in group)
        if others is None:
            raise self._refusal(group, f"{found} {names} belong together: load another checkpoint.")
        raise self._refusal(
            group,
            f"{found} {names} belong together. The newest that are intact are {', '.join(others[1].values())}, of "
            f"{_when(others[0])}: copy them, or start again with `lastgood run --fallback`, which loads them.",
        )

    def _whole_ones(self, target: str, group: list[str]) -> Iterator[tuple[float, dict[str, str]]]:
        """What can stand in for a group, newest first: its earlier versions, and those of other steps."""
        found = []
        # Of what was saved before saves had numbers, nothing shows what fits together.
        for version in [version for version in journal.read(target) if version.save]:
            paths = {one: journal.path_of_save(one, version.save) for one in group}
            found.append((version.time, {one: there for one, there in paths.items() if there is not None}))
        for name in journal.siblings(target):
            sibling, _ = self._units.fellows(os.path.join(os.path.dirname(target), name))
            intact = [one for one in sibling if system.isfile(one) and not journal.check(one, journal.read(one))]
            newest = journal.read(os.path.join(os.path.dirname(target), name))[-1:]
            if newest and len(intact) == len(group):
                # No strict in Python 3.8.
                found.append((newest[0].time, dict(zip(group, intact))))  # noqa: B905
        for when, instead in sorted(found, key=lambda one: one[0], reverse=True):
            if len(instead) == len(group):
                yield when, instead


def _same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_ino, one.st_size, one.st_mtime_ns) == (other.st_ino, other.st_size, other.st_mtime_ns)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
