"""``lastgood sovits train``: stage 1 or stage 2, from the configuration file that upstream's web page writes."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import click

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(short_help="Train a stage, or go on with it.")
@click.argument("stage", type=click.Choice(["s1", "s2"]))
@click.option("--config", required=True, type=_FILE, help="tmp_s1.yaml or tmp_s2.json of upstream's web page.")
@click.option("--nproc", type=click.IntRange(1), help="Training processes on this machine; by default one a GPU.")
@click.option("--global-batch", type=click.IntRange(1), help="Clips per step over all processes together.")
@click.option("--precision", type=click.Choice(["32", "fp16", "bf16"]), help="Instead of the configured one.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="CUDA where there is any, by default.")
@click.option("--workers", type=click.IntRange(0), help="Processes that load clips, for each training process.")
@click.option("--save-every", type=click.IntRange(1), help="Save after each so many steps.")
@click.option("--save-minutes", default=10.0, show_default=True, help="Save after each so many minutes.")
@click.option("--mirror", type=click.Path(path_type=Path, file_okay=False), help="A directory for copies.")
@click.option(
    "--import",
    "import_from",
    type=click.Path(path_type=Path, exists=True),
    help="Go on from upstream's G_*.pth and D_*.pth, or epoch=*.ckpt, in this folder.",
)
@click.option("--log-every", type=click.IntRange(1), help="Steps between two log lines.")
@click.option("--deterministic", is_flag=True, help="CUDA: kernels that give the same bits every time; slower.")
@click.option("--no-dropout", is_flag=True, help="Without dropout: losses are then comparable between any --nproc.")
@click.option("--upstream-compat", is_flag=True, help="Stage 1: mask padding on the side that upstream masks.")
def train(stage: str, config: Path, nproc: int | None, **given: Any) -> None:
    """Train STAGE s1 (text to semantic codes) or s2 (codes to sound), or go on where it was stopped.

    The same command continues a run. Ctrl-C, SIGTERM or a file named "stop" in the run's folder ends the training
    after the present step, saved, with exit code 75.
    """
    from lastgood_sovits.train.launch import launch, note_exit_code

    child = "RANK" in os.environ
    if not child:
        fitting = _devices(stage, config, given["device"])
        nproc = fitting if nproc is None else nproc
        if nproc > 1:
            sys.exit(launch(["train", stage, "--config", str(config), *_arguments(given)], nproc))
    from lastgood import LastGoodError
    from lastgood_sovits.errors import SovitsError
    from lastgood_sovits.train.options import Options
    from lastgood_sovits.train.program import train as run

    given["dropout"] = not given.pop("no_dropout")
    try:
        code = run("s1" if stage == "s1" else "s2", config, Options(**given))
    except (SovitsError, LastGoodError) as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            raise click.ClickException(str(error)) from error
        # What all ranks say, the first says; a rank that alone has a reason is heard before it is ended.
        time.sleep(2.0)
        raise click.ClickException(f"rank {rank}: {error}") from error
    note_exit_code(code)
    sys.exit(code)


def _arguments(given: dict[str, Any]) -> list[str]:
    """The options once more, as text."""
    arguments = []
    for name, value in given.items():
        option = "--" + ("import" if name == "import_from" else name.replace("_", "-"))
        if value is True:
            arguments.append(option)
        elif value is not None and value is not False:
            arguments += [option, str(value)]
    return arguments


def _devices(stage: str, config: Path, device: str | None) -> int:
    """Hides the GPUs that the configuration does not choose, as upstream does; returns how many processes fit.

    Raises ClickException where a chosen one does not exist: CUDA itself would leave it out without a word.
    """
    if device == "cpu":
        return 1
    chosen = _chosen(stage, config)
    theirs = chosen if "CUDA_VISIBLE_DEVICES" not in os.environ else ""
    if theirs:
        os.environ["CUDA_VISIBLE_DEVICES"] = theirs
    import torch

    count, wanted = torch.cuda.device_count(), len(chosen.split(","))
    if theirs and count < wanted:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        there = torch.cuda.device_count()
        if there == 0:  # Upstream's page writes "0" on a machine without CUDA, too.
            return 1
        source = "train.gpu_numbers" if stage == "s2" else "_CUDA_VISIBLE_DEVICES"
        raise click.ClickException(
            f"{source} chooses the GPUs {chosen}, and torch sees {there} here, which are counted from 0: correct it, "
            "or give --device cpu"
        )
    return max(1, min(count, wanted))


def _chosen(stage: str, config: Path) -> str:
    """The numbers of the GPUs that upstream's page has chosen, separated by commas; empty where it chose none."""
    if stage == "s1":
        return os.environ.get("_CUDA_VISIBLE_DEVICES", "")
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    found = re.search(r'"gpu_numbers"\s*:\s*"([0-9-]+)"', text)
    return found[1].replace("-", ",") if found else ""
