"""``lastgood prune``: delete checkpoints that nobody needs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Literal

import click

from lastgood import catalog
from lastgood.cli import places
from lastgood.cli.i18n import _
from lastgood.cli.output import json_option, print_json, progress, size
from lastgood.errors import LastGoodError
from lastgood.generation import Holder
from lastgood.program import Events
from lastgood.retain import Keep, Known, Retention, choose, known_of
from lastgood.world import World

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}


def byte_count(text: str) -> int:
    """A number of bytes, written as 500000, 20GB or 1.5TiB. Raises click.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise click.BadParameter(_("{value!r} is not a size such as 500000, 20GB or 1.5TiB", value=text))
    return int(float(match[1]) * _UNITS[match[2]])


@click.command()
@click.argument("run", type=places.directory(exists=True))
@click.option("--keep-last", type=click.IntRange(min=0), help="Keep so many of the newest on the present branch.")
@click.option("--keep-best", type=click.IntRange(min=0), default=0, help="Keep so many with the best --metric.")
@click.option("--metric", help="The metric by which checkpoints are compared.")
@click.option("--mode", type=click.Choice(["min", "max"]), default="min", help="Which value of the metric is the best.")
@click.option("--keep-every", type=click.IntRange(min=1), help="Keep steps that are multiples of this.")
@click.option(
    "--max-bytes",
    type=byte_count,
    metavar="SIZE",
    help="Delete the oldest until the run is no larger; the two newest stay, or one with --keep-last 0 or 1.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be deleted; delete nothing.")
@json_option
def prune(
    run: Path,
    keep_last: int | None,
    keep_best: int,
    metric: str | None,
    mode: Literal["min", "max"],
    keep_every: int | None,
    max_bytes: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete those checkpoints of a RUN that none of the rules keeps.

    The newest is read back and verified first, and never deleted. A run that a job holds is refused: a job applies its
    own rules, the Keep that it was given.
    """
    if keep_last is None and not keep_best and keep_every is None and max_bytes is None:
        raise click.UsageError(_("which ones? Pass --keep-last, --keep-best, --keep-every or --max-bytes"))
    if keep_last is None:
        # Where only the size is limited, no rule but the size deletes.
        keep_last = 0 if keep_best or keep_every is not None else sys.maxsize
    keep = Keep(last=keep_last, best=keep_best, metric=metric, mode=mode, every=keep_every, max_bytes=max_bytes)
    run = run.absolute()
    known = _known(run)
    if not known:
        raise LastGoodError(_("{path} holds no checkpoint", path=run))
    newest = known[-1].entry
    branch = [entry.name for entry in catalog.lineage(newest, [k.entry for k in known])]
    doomed = choose(known, branch, keep)
    if not dry_run and doomed:
        gone = set(_delete(run, keep))
        doomed = [k for k in known if k.entry.name in gone]
    _report(doomed, known, dry_run, as_json)


def _known(run: Path) -> list[Known]:
    entries = catalog.committed(run)
    known = []
    with progress(_("reading manifests"), len(entries)) as advance:
        for entry in entries:
            known.append(known_of(entry))
            advance(1)
    return known


def _delete(run: Path, keep: Keep) -> list[str]:
    """Take the run, choose again, delete, give it back. Returns the names of what was deleted."""
    with progress(_("taking the run")):
        holder = Holder.take(run, World(0, 1, True), {})
    try:
        newest = catalog.newest(run)
        if newest is None:
            return []
        retention = Retention(run, keep, holder, Events(run, holder.number).report)
        with progress(_("verifying and deleting")):
            return retention.apply(newest)
    finally:
        holder.release()


def _report(doomed: list[Known], known: list[Known], dry_run: bool, as_json: bool) -> None:
    freed = sum(k.bytes for k in doomed)
    if as_json:
        names = [k.entry.name for k in doomed]
        kept = [k.entry.name for k in known if k.entry.name not in names]
        print_json({"dry_run": dry_run, "deleted": names, "kept": kept, "bytes": freed})
        return
    for k in doomed:
        text = _("would delete {name} ({size})") if dry_run else _("deleted {name} ({size})")
        click.echo(text.format(name=k.entry.name, size=size(k.bytes)))
    text = _("{count} of {total} checkpoints, {size}")
    click.echo(text.format(count=len(doomed), total=len(known), size=size(freed)))
