"""``lastgood import``: an existing weights file becomes the first checkpoint of a run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lastgood import catalog, disk
from lastgood.cli.i18n import _
from lastgood.cli.output import note, progress
from lastgood.errors import LastGoodError

if TYPE_CHECKING:
    from lastgood.foreign import Foreign

KINDS = ("module", "optimizer", "stateful", "value")


@dataclass(frozen=True, slots=True)
class Assignment:
    """``NAME[:KIND]=SOURCE``: what becomes which object."""

    name: str
    kind: str | None
    source: str


def assignment(text: str) -> Assignment:
    """An :class:`Assignment` as it is written. Raises click.BadParameter."""
    left, equals, source = text.partition("=")
    name, colon, kind = left.partition(":")
    if not equals or not name.isidentifier() or not source or (colon and kind not in KINDS):
        raise click.BadParameter(_("{value!r} is not NAME=SOURCE or NAME:KIND=SOURCE", value=text))
    return Assignment(name, kind or None, source)


@click.command("import")
@click.argument("paths", nargs=-1, required=True, metavar="[FILE] RUN", type=click.Path(path_type=Path))
@click.option(
    "--as", "files", multiple=True, type=assignment, metavar="NAME=FILE", help="FILE becomes the object NAME."
)
@click.option(
    "--map",
    "keys",
    multiple=True,
    type=assignment,
    metavar="NAME=KEY",
    help="What the FILE holds under KEY becomes the object NAME; a dot leads into a nested dict.",
)
@click.option("--step", type=click.IntRange(min=0), default=0, show_default=True, help="The step of the checkpoint.")
def import_(paths: tuple[Path, ...], files: tuple[Assignment, ...], keys: tuple[Assignment, ...], step: int) -> None:
    """Make the first checkpoint of a RUN from existing .pth, .pt, .ckpt or .safetensors files.

    A FILE that holds a state dict becomes the object "model": `Checkpointer(RUN, model=model).restore()` loads it.
    Otherwise say what becomes what, with --as for whole files and --map for parts of one FILE. The kind is seen from
    the content; --map scheduler:value=KEY says it: module, optimizer, stateful or value. Nothing in a file is executed.
    """
    *sources, run = paths
    if len(sources) > 1:
        raise click.UsageError(_("one FILE, or --as NAME=FILE for each of several"))
    if not sources and not files:
        raise click.UsageError(_("which file? lastgood import FILE RUN"))
    if keys and not sources:
        raise click.UsageError(_("--map takes parts of a FILE: lastgood import --map NAME=KEY FILE RUN"))
    run = run.absolute()
    if disk.is_file(run):
        raise LastGoodError(_("{path} is a file: the last argument is the run, a directory", path=run))
    if catalog.newest(run) is not None:
        raise LastGoodError(_("{path} already has checkpoints: import into a new run", path=run))
    from lastgood import foreign
    from lastgood.files import load

    found: dict[str, Foreign] = {}
    with progress(_("reading")):
        if sources:
            content = load(_existing(sources[0]))
            parts = [(a, foreign.at_key(content, a.source, sources[0])) for a in keys] or [
                (Assignment("model", None, ""), foreign.whole(content, sources[0]))
            ]
        else:
            parts = []
        parts += [(a, load(_existing(Path(a.source)))) for a in files]
    for given, value in parts:
        if given.name in found:
            raise click.UsageError(_("{name} is given twice", name=given.name))
        found[given.name] = foreign.Foreign.of(given.name, value, given.kind)
    _save(run, step, found)


def _existing(path: Path) -> Path:
    if not disk.is_file(path):
        raise click.UsageError(_("there is no file {path}", path=path))
    return path


def _save(run: Path, step: int, found: dict[str, Foreign]) -> None:
    from lastgood import foreign
    from lastgood.checkpointer import Checkpointer

    objects, remarks = foreign.objects(found)
    for remark in remarks:
        note(remark)
    # What is saved and where is said below, once.
    logging.getLogger("lastgood").addHandler(logging.NullHandler())
    foreign.seed()
    with Checkpointer(run, rank=0, world_size=1, **objects) as checkpointer:
        checkpointer.restore()
        path = checkpointer.save(step, blocking=True).result()
    for name, part in found.items():
        click.echo(_("{name}: a {kind} of {count} tensors", name=name, kind=part.kind, count=part.tensor_count()))
    click.echo(_("saved as {path}", path=path))
