"""``lastgood export``: a part of a checkpoint as a file that any program reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lastgood import catalog, disk
from lastgood.catalog import Entry
from lastgood.cli import places
from lastgood.cli.contents import check_parts, model_of
from lastgood.cli.i18n import _
from lastgood.cli.output import note, progress, size
from lastgood.errors import LastGoodError

if TYPE_CHECKING:
    import torch

_TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")


@click.command()
@click.argument("checkpoint", type=places.anything())
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--part", "parts", multiple=True, help="The object to export: by default the model. May be repeated.")
@click.option("--half", is_flag=True, help="Store float32 and float64 tensors as float16.")
@click.option("--bfloat16", is_flag=True, help="Store float32 and float64 tensors as bfloat16.")
@click.option("--overwrite", is_flag=True, help="Replace OUT where it exists.")
def export(checkpoint: Path, out: Path, parts: tuple[str, ...], half: bool, bfloat16: bool, overwrite: bool) -> None:
    """Write a part of a CHECKPOINT (of a run: the newest) to OUT, a .safetensors or a .pth file.

    Names are those of the object's own state_dict: `model.load_state_dict(torch.load(OUT, weights_only=True))` takes
    it. Several parts become a dict of parts in a .pth file, and names with the part in front in a .safetensors file.
    Every byte is checked while it is read.
    """
    if half and bfloat16:
        raise click.UsageError(_("--half and --bfloat16 exclude each other"))
    if out.suffix not in (".safetensors", *_TORCH_SUFFIXES):
        raise click.UsageError(_("OUT must end in .safetensors or .pth, not in {suffix!r}", suffix=out.suffix))
    if disk.exists(out) and not overwrite:
        raise LastGoodError(_("{path} exists: pass --overwrite to replace it", path=out))

    from lastgood.states import state_of

    def read(entry: Entry) -> tuple[int, dict[str, Any]]:
        manifest = catalog.check_quick(entry)
        chosen = check_parts(manifest, entry.path, parts or [model_of(manifest, entry.path)])
        return manifest.step, {part: state_of(entry, manifest, part) for part in chosen}

    import torch

    from lastgood.files import save

    with progress(_("exporting"), None):
        step, states = places.read_checkpoint(checkpoint, read)
        if half or bfloat16:
            states = _narrowed(states, torch.float16 if half else torch.bfloat16)
        if out.suffix == ".safetensors":
            result: Any = _flat(states)
        else:
            result = states if len(states) > 1 else next(iter(states.values()))
        # Whatever the launcher's variables say: this process is alone, and it writes.
        save(result, out, rank=0)
    text = _("{out}: {parts} of step {step}, {size}")
    click.echo(text.format(out=out, parts=", ".join(states), step=step, size=size(disk.file_size(out))))


def _flat(states: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors by name, as .safetensors holds them: each with memory of its own, and nothing else."""
    flat: dict[str, torch.Tensor] = {}
    left: list[str] = []
    seen: set[int] = set()

    def add(name: str, value: Any) -> None:
        import torch

        if isinstance(value, torch.Tensor):
            # The format refuses tied tensors: a second name gets a copy.
            flat[name] = value.clone() if value.data_ptr() in seen else value
            seen.add(value.data_ptr())
        elif isinstance(value, dict) and value:
            for key, item in value.items():
                add(f"{name}.{key}" if name else str(key), item)
        else:
            left.append(name)

    for part, state in states.items():
        add(part if len(states) > 1 else "", state)
    if not flat:
        raise LastGoodError(_("{parts}: there is no tensor in it; export to .pth", parts=", ".join(states)))
    if left:
        note(_("not in the file, since .safetensors holds tensors only: {names}", names=", ".join(left)))
    return flat


def _narrowed(states: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The states with wide floating-point tensors in `dtype`.

    Raises:
        LastGoodError: finite values would become infinite.
    """
    import torch

    done: dict[int, torch.Tensor] = {}
    overflow: list[str] = []

    def narrow(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.float64):
            if id(value) not in done:
                done[id(value)] = value.to(dtype)
                if bool((done[id(value)].isinf() & value.isfinite()).any()):
                    largest = float(torch.where(value.isfinite(), value.abs(), 0.0).max())
                    overflow.append(f"{name} ({largest:.6g})")
            return done[id(value)]
        if isinstance(value, dict):
            return {key: narrow(item, f"{name}.{key}") for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(narrow(item, f"{name}[{index}]") for index, item in enumerate(value))
        return value

    result = {part: narrow(state, part) for part, state in states.items()}
    if overflow:
        raise LastGoodError(
            _(
                "values too large for {dtype}, and nothing was written: {names}. --bfloat16 has the range of float32.",
                dtype=str(dtype).removeprefix("torch."),
                names=", ".join(overflow),
            )
        )
    return result
