"""What a path on the command line stands for: a run, a checkpoint, or a single file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from lastgood import catalog, disk, generation
from lastgood.catalog import Entry
from lastgood.cli.i18n import _
from lastgood.errors import LastGoodError

_T = TypeVar("_T")
FILE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
JOURNAL = ".lastgood"
"""The directory that ``lastgood run`` keeps beside the files that it watches."""


class _AnyLength(click.Path):
    """A path, which click asks the system about: on Windows in the form that knows no limit of 260 characters."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(disk.native(Path(value)), param, ctx)


def directory(**options: Any) -> click.Path:
    """The type of an argument that names a directory."""
    return _AnyLength(file_okay=False, path_type=Path, **options)


def anything() -> click.Path:
    """The type of an argument that names a file or a directory that exists."""
    return _AnyLength(exists=True, path_type=Path)


def is_run(path: Path) -> bool:
    """Whether a directory is a run, or a mirror of one, even an empty one."""
    return bool(generation.generations(path) or catalog.entries(path) or generation.highest_note(path))


def has_journal(path: Path) -> bool:
    """Whether ``lastgood run`` saved something in a directory or below it."""
    return any(JOURNAL in directories for _, directories, _ in os.walk(path))


def read_checkpoint(path: Path, read: Callable[[Entry], _T]) -> _T:
    """What `read` makes of the checkpoint at `path`: itself, or the newest one where it is a run.

    A job may delete a checkpoint while it is read: in a run the newest is then chosen again.

    Raises:
        LastGoodError: there is none, or it was deleted.
    """
    named = catalog.entry_at(path)
    while True:
        entry = named or catalog.newest(path.absolute())
        if entry is None:
            raise LastGoodError(_("{path} holds no checkpoint", path=path))
        if named is not None and not entry.is_committed():
            raise LastGoodError(
                _(
                    "{path} has no manifest: it is what a save left behind that did not finish, not a checkpoint",
                    path=path,
                )
            )
        try:
            return read(entry)
        except (LastGoodError, OSError) as error:
            # The manifest is what is deleted first: with it, the checkpoint is there and something is wrong.
            if entry.is_committed():
                raise
            if named is not None:
                raise LastGoodError(_("{path} was deleted while it was read", path=path)) from error
