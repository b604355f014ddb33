"""`lastgood run`: start a training program that does not know lastgood, with safe saves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from lastgood.errors import LastGoodError
from lastgood.intercept import doctor as doctor_
from lastgood.intercept import launch, presets
from lastgood.intercept.runtime.settings import Settings


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--save-on",
    type=click.Choice(["auto", "rank0"]),
    default="auto",
    show_default=True,
    help="Which ranks write a file that several save: rank 0 wins where they collide, or alone writes.",
)
@click.option(
    "--history",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Earlier versions to keep of a file that is overwritten (hard links).",
)
@click.option("--fallback", is_flag=True, help="Load the newest intact version in place of a damaged file, and say so.")
@click.option(
    "--complete",
    multiple=True,
    metavar="PATTERN",
    help="Directories, or comma-separated files, that are one checkpoint: 'checkpoint-*', 'G_*.pth,D_*.pth'.",
)
@click.option("--match", multiple=True, metavar="PATTERN", help="Further file names that are checkpoints.")
@click.option("--preset", type=click.Choice(sorted(presets.PRESETS)), help="Recognised by itself, as a rule.")
@click.option("--mirror", type=click.Path(file_okay=False, path_type=Path), help="A directory for copies of saves.")
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Seconds to try again while another program holds a file open.",
)
@click.option("--doctor", is_flag=True, help="Say what would be done; run nothing.")
@click.option("--install", metavar="PYTHON", help="Put one .pth file into a Python that ignores PYTHONPATH.")
@click.option("--uninstall", metavar="PYTHON", help="Remove that file.")
@click.option("--quiet", is_flag=True, help="No summary at the end.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(
    context: click.Context,
    save_on: str,
    history: int,
    fallback: bool,
    complete: tuple[str, ...],
    match: tuple[str, ...],
    preset: str | None,
    mirror: Path | None,
    patience: float,
    doctor: bool,
    install: str | None,
    uninstall: str | None,
    quiet: bool,
    command: tuple[str, ...],
) -> None:
    """Run a training COMMAND so that its checkpoints are whole or not there at all.

    The program is not changed. Its exit code is ours, but for 74: it ended with 0 although its last save failed.
    """
    try:
        if install or uninstall:
            _install(install, uninstall)
            return
        if not command:
            raise click.UsageError("which command? For example: lastgood run -- python train.py")
        arguments = list(command)
        name = preset or presets.recognise(arguments)
        patterns = [*complete, *(presets.PRESETS[name].complete if name else ())]
        settings = Settings(
            save_on=save_on,
            history=history,
            fallback=fallback,
            complete=list(dict.fromkeys(patterns)),
            match=list(match),
            mirror=os.path.abspath(mirror) if mirror else "",
            patience=patience,
        )
        if doctor:
            click.echo("\n".join(doctor_.examine(arguments, settings, Path.cwd())))
            return
        blind = launch.blind_python(arguments)
        if blind:
            click.echo(f"lastgood run: {blind}", err=True)
        result = launch.run(arguments, settings)
    except LastGoodError as error:
        click.echo(f"lastgood run: {error}", err=True)
        sys.exit(127)
    if not quiet:
        click.echo(launch.summary(result), err=True)
    context.exit(result.code)


def _install(install: str | None, uninstall: str | None) -> None:
    if install:
        click.echo(f"{launch.install(install)} was written. It does nothing outside of lastgood run.")
    if uninstall:
        path = launch.uninstall(uninstall)
        click.echo(f"{path} was removed." if path else f"There was nothing of ours in {uninstall}.")


if __name__ == "__main__":
    run(windows_expand_args=False)
