"""The group of commands: each is imported when it is used, and an error ends in one sentence."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from lastgood.cli.i18n import _, localize
from lastgood.errors import LastGoodError

ENTRY_POINTS = "lastgood.commands"


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one only when it is called or its help is shown.

    Args:
        commands_at: name to "module:attribute".
    """

    def __init__(self, *args: Any, commands_at: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._commands_at = dict(commands_at)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self._commands_at, *sorted(point.name for point in _entry_points() if self._is_new(point.name))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        where = self._commands_at.get(cmd_name)
        if where is None:
            where = next((point.value for point in _entry_points() if point.name == cmd_name), None)
        if where is None:
            return None
        module, _colon, attribute = where.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), where
        localize(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            try:
                command = self.get_command(ctx, name)
            except ImportError as error:
                # Another package's, or one that needs an extra: the others are still to be listed.
                rows.append((name, _("(cannot be loaded: {error})", error=error)))
                continue
            assert command is not None
            rows.append((name, command.get_short_help_str(limit=formatter.width)))
        with formatter.section(_("Commands")):
            formatter.write_dl(rows)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run a command. A LastGoodError, or a refusal of the disk, is one sentence and exit code 1."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # A console or pipe of another code page (cp936, cp1252) shows "?" for what it has no sign for.
                stream.reconfigure(errors="replace")
        if args is None and sys.argv[1:2] == ["run"]:
            # On Windows click expands patterns; those of `run`, and the words of the program, are not ours to expand.
            extra["windows_expand_args"] = False
        try:
            return super().main(args, *rest, **extra)
        except LastGoodError as error:
            click.echo(f"lastgood: {error}", err=True)
            sys.exit(1)
        except OSError as error:
            click.echo("lastgood: " + _("the system refused: {error}", error=error), err=True)
            sys.exit(1)

    def _is_new(self, name: str) -> bool:
        return name not in self._commands_at


def _entry_points() -> Sequence[importlib.metadata.EntryPoint]:
    return list(importlib.metadata.entry_points(group=ENTRY_POINTS))
