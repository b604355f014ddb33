"""``lastgood ls``: the checkpoints of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from lastgood import catalog, disk
from lastgood.catalog import Entry
from lastgood.cli import places
from lastgood.cli.i18n import _
from lastgood.cli.output import json_option, note, number, print_json, print_table, progress, size, when
from lastgood.errors import DamagedError, LastGoodError
from lastgood.manifest import Manifest

LIMIT = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One checkpoint as it is listed."""

    entry: Entry
    state: str
    """ok, damaged, uncommitted"""
    damage: str
    manifest: Manifest | None
    on_branch: bool

    def to_json(self) -> dict[str, object]:
        row: dict[str, object] = {
            "name": self.entry.name,
            "path": str(self.entry.path),
            "step": self.entry.step,
            "generation": self.entry.generation,
            "branch": "present" if self.on_branch else "history",
            "state": self.state,
            "damage": self.damage,
        }
        if self.manifest is not None:
            row |= {
                "time": self.manifest.time,
                "bytes": self.manifest.tensor_bytes,
                "world_size": self.manifest.world_size,
                "metrics": self.manifest.metrics,
                "parent": self.manifest.parent,
            }
        return row

    def cells(self) -> list[str]:
        states = {"ok": _("ok"), "damaged": _("DAMAGED"), "uncommitted": _("not committed")}
        branch = _("present") if self.on_branch else _("history")
        cells = [str(self.entry.step), str(self.entry.generation), branch if self.state != "uncommitted" else ""]
        if self.manifest is None:
            cells += ["", "", "", ""]
        else:
            metrics = " ".join(f"{name}={number(value)}" for name, value in self.manifest.metrics.items())
            cells += [when(self.manifest.time), size(self.manifest.tensor_bytes), str(self.manifest.world_size)]
            cells += [metrics]
        return [*cells, states[self.state], self.entry.name]


@click.command()
@click.argument("run", type=places.directory(exists=True))
@click.option("--limit", type=click.IntRange(min=1), default=LIMIT, show_default=True, help="How many of the newest.")
@click.option("--all", "everything", is_flag=True, help="List all, however many there are.")
@json_option
def ls(run: Path, limit: int, everything: bool, as_json: bool) -> None:
    """List the checkpoints of a RUN or a mirror, the newest first.

    "present" is what the job goes on from; "history" is what a roll-back left aside. The state is that of the quick
    check (names and sizes); `lastgood verify --full` reads every byte.
    """
    run = run.absolute()
    if not places.is_run(run):
        raise LastGoodError(_("{path} is not a run: it holds no checkpoints", path=run))
    entries = catalog.entries(run)
    shown = entries if everything else entries[-limit:]
    rows = _rows(run, entries, shown)
    if as_json:
        print_json([row.to_json() for row in rows])
        return
    if not rows:
        click.echo(_("{path} has no checkpoint yet", path=run))
        return
    columns = [_("step"), _("generation"), _("branch"), _("time"), _("size"), _("ranks"), _("metrics"), _("state")]
    print_table([*columns, _("name")], [row.cells() for row in rows], right=(0, 1, 4, 5))
    for row in rows:
        if row.damage:
            note(row.damage)
    if len(shown) < len(entries):
        note(_("{count} older ones are not listed (--all)", count=len(entries) - len(shown)))


def _rows(run: Path, entries: list[Entry], shown: list[Entry]) -> list[Row]:
    committed = [entry for entry in entries if entry.is_committed()]
    branch = {entry.name for entry in catalog.lineage(committed[-1], committed)} if committed else set()
    names = {entry.name for entry in committed}
    rows = []
    with progress(_("reading manifests"), len(shown)) as advance:
        for entry in reversed(shown):
            manifest, damage, state = None, "", "ok"
            if entry.name not in names:
                state = "uncommitted" if disk.exists(entry.path) else "gone"
            else:
                try:
                    manifest = catalog.check_quick(entry)
                except DamagedError as error:
                    # The manifest is what retention deletes first.
                    damage, state = str(error), "damaged" if entry.is_committed() else "gone"
            if state != "gone":
                rows.append(Row(entry, state, damage, manifest, entry.name in branch))
            advance(1)
    return rows
