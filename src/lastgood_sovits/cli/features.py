"""``lastgood sovits features``: HuBERT, BERT and speaker features of an experiment, with models of this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from lastgood import LastGoodError
from lastgood_sovits.errors import SovitsError

_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command(short_help="Write 3-bert, 4-cnhubert, 5-wav32k and 7-sv_cn.")
@click.argument("experiment", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--audio", type=_FOLDER, help="The recordings; by default where a file *.list in EXPERIMENT says.")
@click.option("--hubert", required=True, type=_FOLDER, help="Folder of chinese-hubert-base.")
@click.option("--bert", type=_FOLDER, help="Folder of chinese-roberta-wwm-ext-large, for Mandarin.")
@click.option("--sv", type=_FILE, help="File pretrained_eres2netv2w24s4ep4.ckpt, for v2Pro and v2ProPlus.")
@click.option("--device", default="cpu", show_default=True, help="Where the models run.")
def features(
    experiment: Path, audio: Path | None, hubert: Path, bert: Path | None, sv: Path | None, device: str
) -> None:
    """Write 5-wav32k, 4-cnhubert, 3-bert and 7-sv_cn of the folder EXPERIMENT, which has 2-name2text.txt."""
    if importlib.util.find_spec("transformers") is None:
        raise click.ClickException("this command needs transformers: pip install 'lastgood[transformers]'")
    from lastgood_sovits.features import make_features

    try:
        made = make_features(experiment, audio, hubert, bert, sv, device=device)
    except (SovitsError, LastGoodError, OSError) as error:
        raise click.ClickException(str(error)) from error
    for name, reason in made.left_out.items():
        click.echo(f"{name} is left out: {reason}", err=True)
    counts = f"{made.waves} sounds, {made.hubert} of HuBERT, {made.bert} of BERT, {made.speakers} speaker vectors"
    click.echo(f"{experiment}: {counts}")
