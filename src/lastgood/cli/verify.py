"""``lastgood verify``: is it what was saved?"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

from lastgood import catalog, disk
from lastgood.catalog import Entry
from lastgood.cli import places
from lastgood.cli.i18n import _
from lastgood.cli.output import json_option, print_json, progress
from lastgood.errors import DamagedError, LastGoodError
from lastgood.manifest import NAME


@dataclass(slots=True)
class Result:
    """What was found out about one checkpoint or file."""

    path: Path
    kind: str
    """checkpoint, left-over, gone, file"""
    damage: list[str] = field(default_factory=list)
    """A sentence for each."""
    note: str = ""

    def to_json(self) -> dict[str, object]:
        return {
            "path": str(self.path),
            "kind": self.kind,
            "ok": not self.damage,
            "damage": self.damage,
            "note": self.note,
        }


@click.command()
@click.argument("paths", nargs=-1, required=True, type=places.anything(), metavar="PATH...")
@click.option("--full", is_flag=True, help="Read every byte of checkpoints, not only names, sizes and manifests.")
@json_option
def verify(paths: tuple[Path, ...], full: bool, as_json: bool) -> None:
    """Check runs, checkpoints and single weights files.

    Files are .pth, .pt, .ckpt or .safetensors, and are always read as a whole. A directory is compared with the
    journals that `lastgood run` kept in and below it. The exit code is 1 where something is damaged, 2 where a PATH is
    nothing that can be checked.
    """
    for path in paths:
        if _kind(path) is None:
            raise click.UsageError(
                _("{path} is no run, no checkpoint, no weights file, and `lastgood run` saved nothing there", path=path)
            )
    results = []
    for path in paths:
        for result in _results(path, full):
            results.append(result)
            if not as_json:
                _print(result)
    if as_json:
        print_json([result.to_json() for result in results])
    else:
        bad = sum(bool(result.damage) for result in results)
        count = sum(result.kind != "gone" for result in results)
        click.echo(_("{count} checked, {bad} damaged", count=count, bad=bad))
        if not full and any(result.kind == "checkpoint" for result in results):
            click.echo(_("Names, sizes and manifests were compared; --full reads every byte."))
    sys.exit(1 if any(result.damage for result in results) else 0)


def _print(result: Result) -> None:
    remark = f" ({result.note})" if result.note else ""
    if not result.damage:
        label = {"left-over": _("not committed"), "gone": _("deleted")}.get(result.kind, _("ok"))
        click.echo(f"{label}  {result.path}{remark}")
    for damage in result.damage:
        click.echo(_("DAMAGED") + f"  {damage}{remark}")


def _kind(path: Path) -> str | None:
    if path.name == NAME:
        return "checkpoint"
    if disk.is_file(path):
        return "file"
    if catalog.entry_of(path.absolute().parent, path.absolute().name) or disk.exists(path / NAME):
        return "checkpoint"
    if places.is_run(path):
        return "run"
    return "journal" if places.has_journal(path) else None


def _results(path: Path, full: bool) -> Iterator[Result]:
    kind = _kind(path)
    if kind == "file":
        yield _check_file(path)
    elif kind == "checkpoint":
        yield _check_at(path, full)
    elif kind == "run":
        for entry in catalog.entries(path):
            yield _check(entry, full)
    if places.has_journal(path):
        yield from _check_journal(path)


def _check_at(path: Path, full: bool) -> Result:
    try:
        entry = catalog.entry_at(path)
    except DamagedError as error:
        return Result(path, "checkpoint", [str(error)])
    assert entry is not None
    if not entry.is_committed():
        text = _("{path} has no manifest: it is what a save left behind that did not finish", path=path)
        return Result(path, "checkpoint", [text])
    return _check(entry, full)


def _check(entry: Entry, full: bool) -> Result:
    if not entry.is_committed():
        if not disk.exists(entry.path):
            return _gone(entry)
        text = _("left over from a save that did not finish, or one that is being written")
        return Result(entry.path, "left-over", note=text)
    try:
        manifest = catalog.read_manifest(entry)
    except DamagedError as error:
        damage = [str(error)]
    else:
        with progress(entry.name, manifest.tensor_bytes) as advance:
            damage = catalog.damage(entry, manifest, full=full, advance=advance)
    # The manifest is what retention deletes first.
    return _gone(entry) if damage and not entry.is_committed() else Result(entry.path, "checkpoint", damage)


def _gone(entry: Entry) -> Result:
    return Result(entry.path, "gone", note=_("by its job, while this was checked"))


def _check_file(path: Path) -> Result:
    from lastgood import torchfile

    try:
        with progress(str(path)):
            info = torchfile.inspect(path)
    except LastGoodError as error:
        return Result(path, "file", [str(error)])
    text = "" if info.checksums else _("it holds no checksums of its content: only its form could be checked")
    if info.refusal:
        text = info.refusal
    return Result(path, "file", [f"{path}: {damage}" for damage in info.damage], note=text)


def _check_journal(path: Path) -> Iterator[Result]:
    from lastgood.intercept.journal import verify as verify_journal

    with progress(str(path)):
        findings = verify_journal(path)
    for finding in findings:
        damage = [f"{finding.path}: {finding.damage}"] if finding.damage else []
        yield Result(Path(finding.path), "file", damage, note=_("by the journal of `lastgood run`"))
