"""``lastgood sovits semantic``: the semantic codes of an experiment."""

from __future__ import annotations

from pathlib import Path

import click

from lastgood import LastGoodError
from lastgood_sovits.errors import SovitsError


@click.command(short_help="Write 6-name2semantic.tsv.")
@click.argument("experiment", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--weights", required=True, type=click.Path(path_type=Path, dir_okay=False), help="s2G*.pth")
def semantic(experiment: Path, weights: Path) -> None:
    """Write 6-name2semantic.tsv of the folder EXPERIMENT, with the quantizer of a stage-2 generator."""
    from lastgood_sovits.semantic import write_semantic

    try:
        done = write_semantic(experiment, weights)
    except (SovitsError, LastGoodError, OSError) as error:
        raise click.ClickException(str(error)) from error
    for name, reason in done.left_out.items():
        click.echo(f"{name} has no codes: {reason}", err=True)
    click.echo(f"{done.path}: {done.clips} clips")
