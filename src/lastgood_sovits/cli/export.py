"""``lastgood sovits export``: files for upstream from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from lastgood import LastGoodError
from lastgood_sovits.errors import SovitsError


@click.command(short_help="Write a checkpoint's weights for upstream.")
@click.argument("stage", type=click.Choice(["s1", "s2"]))
@click.option("--config", required=True, type=click.Path(path_type=Path, dir_okay=False), help="As it was trained.")
@click.option("--step", type=click.IntRange(1), help="Of the checkpoint; the newest by default.")
@click.option(
    "--upstream",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write into this folder what upstream's own trainer continues from, instead of weights.",
)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="The weights file, under another name.")
def export(stage: str, config: Path, step: int | None, upstream: Path | None, output: Path | None) -> None:
    """Write the weights of STAGE s1 or s2 from a checkpoint of its run, or upstream's resume files."""
    from lastgood_sovits.train.export import export as write

    if upstream is not None and output is not None:
        raise click.UsageError("--upstream writes files with upstream's names, so --output cannot name them")

    try:
        done = write("s1" if stage == "s1" else "s2", config, step=step, upstream=upstream, output=output)
    except (SovitsError, LastGoodError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Step {done.step}, {done.epoch} epochs:")
    for file in done.files:
        click.echo(f"{file}{' (replaced)' if file in done.replaced else ''}")
