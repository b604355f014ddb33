"""Checks of what the caller passes: each wrong argument is refused at once, with its name and what it should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lastgood import disk
from lastgood.errors import LastGoodError
from lastgood.retain import Keep


def check_keep(keep: Any) -> Keep:
    """`keep` as it was given, or the default policy."""
    if keep is None:
        return Keep()
    if not isinstance(keep, Keep):
        raise LastGoodError(f"Checkpointer(keep={keep!r}): it is a lastgood.Keep, for instance Keep(last=3)")
    return keep


def check_options(
    *, every: Any, minutes: Any, writers: Any, deadline: Any, busy: Any, stop_code: Any, stale: Any
) -> None:
    """Raise LastGoodError for an option that cannot be used."""
    for name, value, kind in (
        ("every", every, int),
        ("minutes", minutes, (int, float)),
        ("writers", writers, int),
        ("deadline", deadline, (int, float)),
        ("stale", stale, (int, float)),
    ):
        optional = name in ("every", "minutes", "writers")
        if value is None and optional:
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
            what = "a whole number" if kind is int else "a number"
            raise LastGoodError(f"Checkpointer({name}={value!r}): it must be {what} greater than 0")
    if busy not in ("wait", "skip"):
        raise LastGoodError(f'Checkpointer(busy={busy!r}): it is "wait" or "skip"')
    if type(stop_code) is not int or not 0 <= stop_code <= 255:
        raise LastGoodError(f"Checkpointer(stop_code={stop_code!r}): an exit code is a whole number from 0 to 255")


def check_patterns(name: str, patterns: Any) -> Sequence[str]:
    """`patterns` as a tuple. A single string is refused: its letters would be taken for patterns, "*" for all."""
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise LastGoodError(
            f"Checkpointer({name}={patterns!r}): it is a list of patterns, for instance ['model.head.*']"
        )
    return tuple(patterns)


def check_objects(objects: Mapping[str, Any]) -> None:
    """Raise LastGoodError for what is registered by mistake."""
    for name, value in objects.items():
        if not isinstance(name, str):
            raise LastGoodError(f"{name!r}: what is registered has a name, which is a string")
        if isinstance(value, type):
            raise LastGoodError(f"{name} is the class {value.__name__}, not an object of it")


def check_metrics(metrics: Any) -> dict[str, float]:
    """Metrics as plain numbers."""
    if not isinstance(metrics, Mapping):
        raise LastGoodError(f"metrics={metrics!r}: it is a dict of numbers, for instance {{'loss': 0.1}}")
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise LastGoodError(f"metrics[{name!r}] is {value!r}: a metric is one number") from error
    return numbers


def check_restore_step(step: Any) -> None:
    """Raise LastGoodError for what cannot name a step to restore."""
    if step not in (None, "best") and (type(step) is not int or step < 0):
        raise LastGoodError(f'restore(step={step!r}): it is a step that was saved, "best", or None for the newest')


def group_number(group: str | int | None) -> int | None:
    """The number of a POSIX group."""
    if group is None or isinstance(group, int):
        return group
    if disk.WINDOWS:
        raise LastGoodError("group= names a POSIX group; on Windows, set the permissions of the run directory")
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise LastGoodError(f"there is no group {group!r} on this machine") from error
