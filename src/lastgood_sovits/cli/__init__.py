"""``lastgood sovits COMMAND``. One file a command, loaded when it is used."""

from __future__ import annotations

import importlib

import click

COMMANDS = {
    "train": "lastgood_sovits.cli.train:train",
    "export": "lastgood_sovits.cli.export:export",
    "semantic": "lastgood_sovits.cli.semantic:semantic",
    "features": "lastgood_sovits.cli.features:features",
    "weights": "lastgood_sovits.cli.weights:weights",
    "demo": "lastgood_sovits.cli.demo:demo",
}
"""Name to module and attribute."""


class _Group(click.Group):
    """A group whose commands are imported when they are called for: torch takes seconds."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train GPT-SoVITS voices: both stages, from the files of its own web page, stopped and resumed at any step."""
