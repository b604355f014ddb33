"""``lastgood diff``: in what two checkpoints or files differ."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lastgood import disk
from lastgood.cli import places
from lastgood.cli.contents import Contents, Tensor, batches, read_contents
from lastgood.cli.i18n import _
from lastgood.cli.output import json_option, number, print_json, progress
from lastgood.errors import LastGoodError

if TYPE_CHECKING:
    import torch

_BLOCK = 1 << 24
"""Elements that are compared at a time: they are widened to 64 bits."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One name that is not the same on both sides."""

    name: str
    what: str
    """only-a, only-b, shape, dtype, tensor, value"""
    a: str
    b: str
    max_abs: float | None = None
    """For tensors of one shape: the largest absolute difference; inf where one side is not a number."""

    def line(self) -> str:
        if self.what == "only-a":
            return _("only in A: {name} ({a})", name=self.name, a=self.a)
        if self.what == "only-b":
            return _("only in B: {name} ({b})", name=self.name, b=self.b)
        if self.max_abs is None:
            return f"{self.name}: {self.a} → {self.b}"
        largest = _("largest difference {value}", value=number(self.max_abs))
        if self.what == "dtype":
            return f"{self.name}: {self.a} → {self.b}, {largest}"
        return f"{self.name}: {self.a}, {largest}"


@click.command()
@click.argument("a", type=places.anything())
@click.argument("b", type=places.anything())
@click.option("--part", help="Compare only this object, or what this key of a file holds.")
@json_option
def diff(a: Path, b: Path, part: str | None, as_json: bool) -> None:
    """Compare A and B: checkpoints, runs (their newest), .pth or .safetensors files.

    It compares names, shapes, types and values, of tensors and of everything else but random states. Between a
    checkpoint and a file, the checkpoint's model is compared. The exit code is 0 where all is equal, 1 where something
    differs, 2 where they could not be compared.
    """
    try:
        one_is_file = disk.is_file(a) != disk.is_file(b)
        count, others, differences = read_contents(
            a,
            part,
            lambda left: read_contents(
                b, part, lambda right: _count_and_compare(left, right), against_file=one_is_file
            ),
            against_file=one_is_file,
        )
    except (LastGoodError, OSError) as error:
        # 1 says that they differ, as with diff(1).
        click.echo(f"lastgood: {error}", err=True)
        sys.exit(2)
    if as_json:
        print_json({"same": not differences, "tensors": count, "differences": [asdict(d) for d in differences]})
    else:
        for difference in differences:
            click.echo(difference.line())
        if differences:
            text = _("{bad} differences in {count} tensors and {others} other values")
        else:
            text = _("equal: {count} tensors and {others} other values")
        click.echo(text.format(bad=len(differences), count=count, others=others))
    sys.exit(1 if differences else 0)


def _count_and_compare(a: Contents, b: Contents) -> tuple[int, int, list[Difference]]:
    """How many tensors and other values there are, and all differences."""
    return len(a.tensors.keys() | b.tensors.keys()), len(a.values.keys() | b.values.keys()), compare(a, b)


def compare(a: Contents, b: Contents) -> list[Difference]:
    """All differences, tensors first, in the order of `a`. Raises DamagedError where one of them cannot be read."""
    found: dict[str, Difference] = {}
    to_read = []
    for name, mine in a.tensors.items():
        theirs = b.tensors.get(name)
        if theirs is None:
            found[name] = Difference(name, "only-a", _form(mine), "")
        elif mine.shape != theirs.shape:
            found[name] = Difference(name, "shape", _form(mine), _form(theirs))
        elif mine.dtype != theirs.dtype or mine.checksums is None or mine.checksums != theirs.checksums:
            to_read.append(name)
    with progress(_("comparing"), len(to_read)) as advance:
        for batch in batches(to_read, a.tensors):
            left, right = a.read(batch), b.read(batch)
            for name in batch:
                largest = max_difference(left[name], right[name])
                mine, theirs = a.tensors[name], b.tensors[name]
                if mine.dtype != theirs.dtype:
                    found[name] = Difference(name, "dtype", _form(mine), _form(theirs), largest)
                elif largest:
                    found[name] = Difference(name, "tensor", _form(mine), _form(theirs), largest)
                advance(1)
    ordered = [found[name] for name in a.tensors if name in found]
    ordered += [Difference(n, "only-b", "", _form(t)) for n, t in b.tensors.items() if n not in a.tensors]
    for name in [*a.values, *(name for name in b.values if name not in a.values)]:
        if name not in b.values:
            ordered.append(Difference(name, "only-a", _text(a.values[name]), ""))
        elif name not in a.values:
            ordered.append(Difference(name, "only-b", "", _text(b.values[name])))
        elif json.dumps(a.values[name], sort_keys=True) != json.dumps(b.values[name], sort_keys=True):
            ordered.append(Difference(name, "value", _text(a.values[name]), _text(b.values[name])))
    return ordered


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference of two tensors of one shape. nan equals nan; nan and a number differ by inf."""
    import torch

    largest = 0.0
    flat = [tensor.reshape(-1) for tensor in (a, b)]
    for begin in range(0, flat[0].numel(), _BLOCK):
        wide = [part[begin : begin + _BLOCK] for part in flat]
        wide = [part.to(torch.complex128 if part.is_complex() else torch.float64) for part in wide]
        equal = (wide[0] == wide[1]) | (wide[0].isnan() & wide[1].isnan())
        distance = torch.where(equal, 0.0, (wide[0] - wide[1]).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
        largest = max(largest, float(distance.max()))
    return largest


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} {'×'.join(map(str, tensor.shape)) or _('scalar')}"


def _text(value: object) -> str:
    if isinstance(value, dict) and set(value) == {"$", "v"}:
        value = value["v"]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
