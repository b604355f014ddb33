"""``lastgood sovits features``: HuBERT and BERT features of an experiment, with models stored on this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from lastgood.errors import LastGoodError
from lastgood_sovits.errors import SovitsError

_FOLDER = click.Path(path_type=Path, file_okay=False)
_NO_SV = (
    "--sv: speaker vectors for v2Pro and v2ProPlus need the network ERes2NetV2, which is not part of this package. "
    "Make the folder 7-sv_cn with step 1B of upstream's data preparation; training here reads it."
)


@click.command()
@click.argument("experiment", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--audio", required=True, type=_FOLDER, help="The recordings, named as in 2-name2text.txt.")
@click.option("--hubert", required=True, type=_FOLDER, help="Folder of chinese-hubert-base.")
@click.option("--bert", type=_FOLDER, help="Folder of chinese-roberta-wwm-ext-large, for Mandarin.")
@click.option("--sv", type=click.Path(path_type=Path), help="Not supported: speaker vectors.")
@click.option("--device", default="cpu", show_default=True, help="Where the models run.")
def features(experiment: Path, audio: Path, hubert: Path, bert: Path | None, sv: Path | None, device: str) -> None:
    """Write 5-wav32k, 4-cnhubert and 3-bert of the folder EXPERIMENT, which has 2-name2text.txt."""
    if sv is not None:
        raise click.ClickException(_NO_SV)
    if importlib.util.find_spec("transformers") is None:
        raise click.ClickException("this command needs transformers: pip install 'lastgood[transformers]'")
    from lastgood_sovits.features import make_features

    try:
        made = make_features(experiment, audio, hubert, bert, device=device)
    except (SovitsError, LastGoodError, OSError) as error:
        raise click.ClickException(str(error)) from error
    for name, reason in made.left_out.items():
        click.echo(f"{name} is left out: {reason}", err=True)
    click.echo(f"{experiment}: {made.waves} sounds, {made.hubert} of HuBERT, {made.bert} of BERT")
