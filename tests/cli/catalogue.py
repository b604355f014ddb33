"""All texts that the command line shows, found in its source."""

from __future__ import annotations

import ast
from pathlib import Path

import click

import lastgood.cli
from lastgood.cli import main
from lastgood.cli.i18n import help_texts


def shown_texts() -> set[str]:
    """Everything that is passed to ``_()``, and the help of every command and option."""
    found = set()
    here = Path(lastgood.cli.__file__).parent
    for path in [*here.glob("*.py"), *(here.parent / "demo").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_" and node.args:
                found.add(ast.literal_eval(node.args[0]))
    context = click.Context(main)
    for name in lastgood.cli.COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        found |= {text for _holder, _attribute, texts in help_texts(command) for text in texts}
    return found | {text for _holder, _attribute, texts in help_texts(main) for text in texts}
