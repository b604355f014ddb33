"""``lastgood show``: everything that one checkpoint is."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import click

from lastgood import catalog
from lastgood.catalog import Entry
from lastgood.cli import places
from lastgood.cli.i18n import _
from lastgood.cli.output import json_option, note, number, print_json, print_table, size, when
from lastgood.errors import DamagedError
from lastgood.manifest import DTYPE_BYTES, Manifest, TensorRecord


@click.command()
@click.argument("checkpoint", type=places.anything())
@click.option("--tensors/--no-tensors", default=True, help="List every tensor, or only count them.")
@json_option
def show(checkpoint: Path, tensors: bool, as_json: bool) -> None:
    """Show what a CHECKPOINT holds; of a run, the newest one.

    It reads the manifest alone: a checkpoint whose data are damaged is shown too (see `lastgood verify --full`).
    """
    entry, manifest, damage = places.read_checkpoint(checkpoint, _read)
    if as_json:
        print_json({"name": entry.name, "path": str(entry.path), "damage": damage, **_to_json(manifest)})
        return
    print_table(["", ""], _facts(entry.name, manifest))
    click.echo()
    _print_objects(manifest)
    if tensors:
        click.echo()
        _print_tensors(manifest)
    if damage:
        note(damage)


def _read(entry: Entry) -> tuple[Entry, Manifest, str]:
    """The checkpoint, its manifest, and what is damaged besides."""
    manifest = catalog.read_manifest(entry)
    try:
        catalog.check_quick(entry)
    except DamagedError as error:
        if not entry.is_committed():
            raise
        return entry, manifest, str(error)
    return entry, manifest, ""


def nbytes(tensor: TensorRecord) -> int:
    return math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]


def object_of(name: str, manifest: Manifest) -> str:
    """The object that a tensor belongs to: names begin with the object's, which may itself hold dots."""
    name = name.partition("/")[2] if name.startswith("rank") and "/" in name else name
    owners = [o for o in manifest.objects if name == o or name.startswith((f"{o}.", f"{o}[", f"{o}+"))]
    return max(owners, key=len, default="")


def _facts(name: str, manifest: Manifest) -> list[list[str]]:
    command = manifest.program.get("command")
    missing = [str(rank) for rank, record in manifest.ranks.items() if record.random is None]
    facts = [
        (_("checkpoint"), name),
        (_("step"), str(manifest.step)),
        (_("generation"), str(manifest.generation)),
        (_("parent"), manifest.parent or _("none: the first of its run")),
        (_("time"), when(manifest.time)),
        (_("ranks"), str(manifest.world_size)),
        (_("ranks without random state"), ", ".join(missing)),
        (_("size"), f"{size(manifest.tensor_bytes)}, {len(manifest.shards)} × safetensors"),
        (_("metrics"), " ".join(f"{key}={number(value)}" for key, value in manifest.metrics.items())),
        (_("command"), shlex.join(map(str, command)) if isinstance(command, list) else ""),
        (_("git commit"), str(manifest.program.get("git_commit") or "")),
        (_("versions"), ", ".join(f"{key} {value}" for key, value in manifest.versions.items())),
    ]
    return [[key, value] for key, value in facts if value]


def _print_objects(manifest: Manifest) -> None:
    rows = []
    for name in manifest.objects:
        owned = [tensor for key, tensor in manifest.tensors.items() if object_of(key, manifest) == name]
        own = [str(rank) for rank, record in manifest.ranks.items() if name in record.objects]
        kind = manifest.kinds.get(name, "")
        rows.append([name, kind, str(len(owned)), size(sum(map(nbytes, owned))), ", ".join(own)])
    columns = [_("object"), _("kind"), _("tensors"), _("size"), _("ranks with a version of their own")]
    print_table(columns, rows, right=(2, 3))


def _print_tensors(manifest: Manifest) -> None:
    rows = []
    for name, tensor in manifest.tensors.items():
        shards = sorted({chunk.shard for chunk in tensor.chunks})
        shape = "×".join(map(str, tensor.shape)) or _("scalar")
        files = ", ".join(manifest.shards[index].file for index in shards)
        rows.append([name, tensor.dtype, shape, size(nbytes(tensor)), files])
    print_table([_("tensor"), _("type"), _("shape"), _("size"), _("shards")], rows, right=(3,))


def _to_json(manifest: Manifest) -> dict[str, object]:
    return {
        "step": manifest.step,
        "generation": manifest.generation,
        "attempt": manifest.attempt,
        "parent": manifest.parent,
        "time": manifest.time,
        "world_size": manifest.world_size,
        "bytes": manifest.tensor_bytes,
        "metrics": manifest.metrics,
        "versions": manifest.versions,
        "program": manifest.program,
        "objects": {
            name: {"kind": manifest.kinds.get(name), "value": tree if manifest.kinds.get(name) == "value" else None}
            for name, tree in manifest.objects.items()
        },
        "tensors": {
            name: {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "bytes": nbytes(tensor),
                "object": object_of(name, manifest),
                "shards": sorted({manifest.shards[chunk.shard].file for chunk in tensor.chunks}),
            }
            for name, tensor in manifest.tensors.items()
        },
        "ranks": {
            str(rank): {
                "random": record.random is not None,
                "objects": sorted(record.objects),
                "tensors": sorted(record.local),
            }
            for rank, record in manifest.ranks.items()
        },
        "shards": [{"file": shard.file, "bytes": shard.size} for shard in manifest.shards],
    }
