"""``lastgood doctor``: whether a file system keeps what checkpoints need."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from lastgood.cli import places, probes
from lastgood.cli.i18n import _
from lastgood.cli.output import json_option, print_json, progress
from lastgood.errors import LastGoodError


@click.command()
@click.argument("directory", metavar="DIR", type=places.directory(exists=True))
@click.option(
    "--megabytes",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="How much is written to measure the speed.",
)
@json_option
def doctor(directory: Path, megabytes: int, as_json: bool) -> None:
    """Try whether the file system of DIR keeps what checkpoints need, and say what to do where it does not.

    It writes into a directory of its own in DIR, and removes it. The exit code is 1 where a promise cannot be kept.
    """
    labels = {"ok": _("ok"), "note": _("note"), "risk": _("RISK"), "broken": _("BROKEN")}
    findings = []
    try:
        with progress(_("trying")):
            for finding in probes.examine(directory.absolute(), megabytes << 20):
                findings.append(finding)
    except OSError as error:
        raise LastGoodError(_("{path} cannot be written: {error}", path=directory, error=error)) from error
    broken = [finding for finding in findings if finding.level == "broken"]
    if as_json:
        rows = [{"name": f.name, "level": f.level, "text": f.text} for f in findings]
        print_json({"path": str(directory.absolute()), "ok": not broken, "findings": rows})
    else:
        for finding in findings:
            click.echo(f"{labels[finding.level]}: {finding.text}")
        if broken:
            click.echo(_("This is no place for runs."))
    sys.exit(1 if broken else 0)
