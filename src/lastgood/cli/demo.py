"""``lastgood demo``: see the promises kept, on this machine, in less than a minute."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click

from lastgood.cli.i18n import _
from lastgood.cli.output import json_option, note, print_json


@click.command()
@click.option("--nproc", default=2, show_default=True, type=click.IntRange(1), help="Number of training processes.")
@click.option("--keep-files", is_flag=True, help="Leave the runs on the disk, to look at.")
@json_option
def demo(nproc: int, keep_files: bool, as_json: bool) -> None:
    """Train, kill in the middle of a save, damage the newest checkpoint, resume, and compare.

    The exit code is 1 where a promise is not kept.
    """
    missing = [name for name in ("sklearn", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(_("the demo needs {names}: pip install 'lastgood[demo]'", names=", ".join(missing)))
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lastgood.demo import story

    logging.getLogger("lastgood").addHandler(logging.NullHandler())
    console = Console(highlight=False)
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="lastgood-demo-"))

    def say(text: str) -> None:
        line = f"{time.monotonic() - began:5.1f} s  {text}"
        if as_json:
            note(line)
        else:
            console.print(Text(line))

    try:
        findings = story.tell(directory, nproc, say)
    finally:
        if not keep_files:
            shutil.rmtree(directory, ignore_errors=True)
    if as_json:
        found = [{"promise": item.promise, "seen": item.seen, "kept": item.kept} for item in findings]
        print_json({"promises": found, "files": str(directory) if keep_files else None})
    else:
        table = Table(show_lines=True)
        for heading in (_("promise"), _("what was seen"), _("kept")):
            table.add_column(heading, overflow="fold")
        for item in findings:
            kept = Text(_("yes"), "green") if item.kept else Text(_("NO"), "red")
            table.add_row(Text(item.promise), Text(item.seen), kept)
        console.print(table)
        if keep_files:
            console.print(Text(_("The files are in {path}", path=directory)))
    if not all(item.kept for item in findings):
        sys.exit(1)
