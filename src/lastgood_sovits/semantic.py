"""6-name2semantic.tsv: the semantic codes of every clip, from the quantizer of stage 2."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from lastgood import replace_file
from lastgood_sovits.errors import SovitsError
from lastgood_sovits.s2.dataset import FEATURES, load_tensor, read_phonemes
from lastgood_sovits.s2.quantizer import Quantizer
from lastgood_sovits.weights import read_weights

logger = logging.getLogger(__name__)
_CODEBOOK = "quantizer.vq.layers.0._codebook.embed"
_PROJECTION = "ssl_proj.weight"


@dataclass(frozen=True)
class Written:
    """What was written."""

    path: Path
    clips: int
    left_out: dict[str, str]
    """Why a clip has no codes, by its name."""


def write_semantic(folder: Path, weights: Path) -> Written:
    """Writes 6-name2semantic.tsv of an experiment folder, whole or not at all.

    Args:
        folder: with 2-name2text.txt and 4-cnhubert.
        weights: a generator of stage 2: the pretrained one, which stage 1 belongs to, or one trained here.

    Raises:
        SovitsError: a file is missing or is of another kind, or no clip has usable features.
    """
    projection, quantizer = _quantizer(weights)
    phonemes, problems = read_phonemes(folder / "2-name2text.txt")
    for problem in problems:
        logger.warning("%s; it is left out", problem)
    lines, left_out = ["item_name\tsemantic_audio"], dict[str, str]()
    for name in phonemes:
        path = folder / FEATURES / f"{name}.pt"
        try:
            features = load_tensor(path)
            if features.dim() != 3 or features.shape[1] != projection.in_channels:
                raise SovitsError(
                    f"{path} has the shape {list(features.shape)}, and these weights need (1, "
                    f"{projection.in_channels}, frames)"
                )
            with torch.no_grad():
                codes = quantizer.encode(projection(features))[0].tolist()
        except SovitsError as error:
            left_out[name] = str(error)
            logger.warning("clip %s has no codes: %s", name, error)
        else:
            lines.append(f"{name}\t{' '.join(map(str, codes))}")
    if len(lines) == 1:
        raise SovitsError(
            f"none of the {len(phonemes)} clips of {folder} has usable features: {next(iter(left_out.values()), '')}"
        )
    data = ("\n".join(lines) + "\n").encode()

    def write(file: BinaryIO) -> None:
        file.write(data)

    target = folder / "6-name2semantic.tsv"
    replace_file(target, write)
    return Written(target, len(lines) - 1, left_out)


def _quantizer(path: Path) -> tuple[nn.Conv1d, Quantizer]:
    if not path.is_file():
        raise SovitsError(f"{path} does not exist: give the weights of a stage-2 generator")
    found = read_weights(path)
    if _CODEBOOK not in found.tensors or _PROJECTION not in found.tensors:
        raise SovitsError(f"{path} is {found.kind} and has no quantizer: give the weights of a stage-2 generator")
    weight, codes = found.tensors[_PROJECTION].float(), found.tensors[_CODEBOOK]
    projection = nn.Conv1d(weight.shape[1], weight.shape[0], weight.shape[2], stride=weight.shape[2])
    quantizer = Quantizer(codes.shape[0], codes.shape[1])
    for module, prefix in ((projection, "ssl_proj."), (quantizer, "quantizer.")):
        state = {name[len(prefix) :]: value.float() for name, value in found.tensors.items() if name.startswith(prefix)}
        module.load_state_dict(state)
    return projection.eval(), quantizer.eval()
