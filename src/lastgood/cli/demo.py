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


@click.command()
@click.option("--nproc", default=2, show_default=True, type=click.IntRange(1), help="Number of training processes.")
@click.option("--keep-files", is_flag=True, help="Leave the runs on the disk, to look at.")
def demo(nproc: int, keep_files: bool) -> None:
    """Train, kill in the middle of a save, damage the newest checkpoint, resume, and compare."""
    missing = [name for name in ("sklearn", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(f"the demo needs {', '.join(missing)}: pip install 'lastgood[demo]'")
    from rich.console import Console
    from rich.table import Table

    from lastgood.demo.story import tell

    logging.getLogger("lastgood").addHandler(logging.NullHandler())
    console = Console()
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="lastgood-demo-"))
    try:
        findings = tell(
            directory, nproc, lambda text: console.print(f"[dim]{time.monotonic() - began:5.1f} s[/]  {text}")
        )
    finally:
        if not keep_files:
            shutil.rmtree(directory, ignore_errors=True)
    table = Table("promise", "what was seen", "kept")
    for finding in findings:
        table.add_row(finding.promise, finding.seen, "[green]yes[/]" if finding.kept else "[red]NO[/]")
    console.print(table)
    console.print(f"{time.monotonic() - began:.0f} s" + (f", files in {directory}" if keep_files else ""))
    if not all(finding.kept for finding in findings):
        sys.exit(1)
