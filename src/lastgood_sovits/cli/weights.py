"""`weights`: look at, check and convert GPT-SoVITS weights files. Nothing in a file is ever run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

import lastgood
from lastgood import LastGoodError
from lastgood_sovits.convert import Header
from lastgood_sovits.convert import convert as convert_weights
from lastgood_sovits.errors import SovitsError
from lastgood_sovits.weights import Weights, open_restored, read_weights

_FILE = click.Path(path_type=Path)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object.")


@click.group(short_help="Look at, check and convert weights files.")
def weights() -> None:
    """Look at, check and convert GPT-SoVITS weights, without running anything from them."""


@weights.command()
@click.argument("file", type=_FILE)
@_JSON
def show(file: Path, as_json: bool) -> None:
    """What FILE is: version, epoch, step, configuration and tensors."""
    try:
        found = _described(read_weights(file, map_location="meta"))
    except (LastGoodError, SovitsError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        _print_json({"file": str(file), **found})
        return
    for name, value in found.items():
        if name == "config":
            click.echo("config:")
            click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))
        elif name == "tensors":
            click.echo(f"tensors: {len(value)}, {sum(entry['numel'] for entry in value.values())} values")
        elif value not in (None, "", []):
            click.echo(f"{name}: {'; '.join(value) if isinstance(value, list) else value}")


@weights.command()
@click.argument("files", type=_FILE, nargs=-1, required=True)
@_JSON
def verify(files: tuple[Path, ...], as_json: bool) -> None:
    """Whether each of FILES is whole and safe to read. Exits with 1 where one is not."""
    found = {str(file): _checked(file) for file in files}
    if as_json:
        _print_json(found)
    else:
        for name, entry in found.items():
            state = "whole" if entry["ok"] else "NOT GOOD"
            if entry["ok"] and not entry["checksums"]:
                state += " (no checksums in this file: changed bytes in tensors cannot be noticed)"
            click.echo(f"{name}: {state}")
            for sentence in entry["problems"]:
                click.echo(f"  {sentence}")
    if not all(entry["ok"] for entry in found.values()):
        raise click.exceptions.Exit(1)


@weights.command()
@click.argument("source", type=_FILE)
@click.argument("target", type=_FILE)
@click.option(
    "--header",
    type=click.Choice(["upstream", "always", "never"]),
    default="upstream",
    show_default=True,
    help="First two bytes of a .pth: as upstream needs them, always the version, or never.",
)
@click.option("--force", is_flag=True, help="Replace TARGET where it exists.")
@_JSON
def convert(source: Path, target: Path, header: Header, force: bool, as_json: bool) -> None:
    """Write the weights in SOURCE to TARGET (.safetensors, .pth, .ckpt), with plain values for pickled classes."""
    if target.exists() and not force:
        raise click.ClickException(f"{target} exists; --force replaces it")
    try:
        converted = convert_weights(source, target, header=header, replace_file=lastgood.replace_file)
        size = target.stat().st_size
    except (LastGoodError, SovitsError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        _print_json({"source": str(source), "target": str(target), "bytes": size, "version": converted.version})
    else:
        click.echo(f"{target}: {converted.kind} {converted.version or ''}, {size} bytes")


def _described(found: Weights) -> dict[str, Any]:
    return {
        "kind": found.kind,
        "version": found.version,
        "lora_rank": found.lora_rank,
        "epoch": found.epoch,
        "step": found.step,
        "info": found.info,
        "learning_rate": found.learning_rate,
        "optimizer": None if found.optimizer is None else "present",
        "header": found.header,
        "bytes": found.size,
        "notes": list(found.notes),
        "config": found.config,
        "tensors": {
            name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "numel": t.numel()}
            for name, t in found.tensors.items()
        },
    }


def _checked(file: Path) -> dict[str, Any]:
    """Damage first; then whether it can be read as what it says."""
    try:
        with open_restored(file) as (stream, _, _):
            info = lastgood.inspect_torch_file(stream)
        problems = list(info.damage)
        checksums = info.checksums
        if not problems:
            read_weights(file, map_location="meta")
    except OSError as error:
        problems, checksums = [f"cannot be read: {error.strerror}"], False
    except (LastGoodError, SovitsError) as error:
        problems = [str(error).removeprefix(f"{file}: ")]
    return {"ok": not problems, "checksums": checksums, "problems": problems}


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))
