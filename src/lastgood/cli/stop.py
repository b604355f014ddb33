"""``lastgood stop``: ask the job on a run to save and end."""

from __future__ import annotations

import time
from pathlib import Path

import click

from lastgood import generation
from lastgood import stop as stop_file
from lastgood.cli import places
from lastgood.cli.i18n import _
from lastgood.cli.output import note, progress, when
from lastgood.errors import LastGoodError

_PAUSE = 0.2


@click.command()
@click.argument("run", type=places.directory(exists=True))
@click.option("--wait", is_flag=True, help="Return only when the job has ended.")
@click.option("--timeout", type=click.FloatRange(min=0), help="With --wait: give up after so many seconds.")
def stop(run: Path, wait: bool, timeout: float | None) -> None:
    """Ask the job that holds a RUN to save, and to end, at the next step.

    It leaves a stop file, which `Checkpointer.steps` looks for: the way to stop where no signal can be sent, on Windows
    or on another machine.
    """
    run = run.absolute()
    if not places.is_run(run):
        raise LastGoodError(_("{path} is not a run: it holds no checkpoints", path=run))
    stop_file.ask(run)
    with progress(_("looking for the job")):
        who = generation.holder(run)
    if who is None:
        click.echo(_("No job holds {path}. The next one that starts removes the stop file.", path=run))
        return
    job = {"pid": who.get("pid"), "host": who.get("host"), "since": when(who.get("started", 0))}
    click.echo(_("Asked process {pid} on {host} (since {since}) to stop.", **job))
    if not wait:
        return
    end = None if timeout is None else time.monotonic() + timeout
    with progress(_("waiting for the job to end")) as advance:
        while generation.holder(run) is not None:
            if end is not None and time.monotonic() > end:
                raise LastGoodError(_("The job has not ended after {seconds:.0f} s.", seconds=timeout))
            time.sleep(_PAUSE)
            advance(_PAUSE)
    if stop_file.is_asked(run):
        note(_("The job has ended, but not because it was asked to: the stop file is still there."))
        return
    click.echo(_("The job has ended."))
