"""An experiment's features from its recordings: 5-wav32k, 4-cnhubert, 3-bert and 7-sv_cn, with models of this machine.

The levels and layers are upstream's (GPT_SoVITS/prepare_datasets/1-get-text.py, 2-get-hubert-wav32k.py and 2-get-sv.py
at commit 48b1a016), so that its pretrained models understand the result.
"""

from __future__ import annotations

import ast
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import soundfile  # type: ignore[import-untyped]
import torch
from torch import Tensor

from lastgood import replace_file
from lastgood_sovits.audio import read_wave
from lastgood_sovits.errors import SovitsError
from lastgood_sovits.speaker import SpeakerVectors
from lastgood_sovits.text import is_cantonese, read_lines

logger = logging.getLogger(__name__)
RATE = 32000
LOUDEST = 2.2
"""A clip whose peak is higher is damaged, and is left out."""
_PEAK, _SHARE = 0.95, 0.5
_HUBERT_SCALE = 1145.14
"""Of the samples that HuBERT gets."""
_BERT_LAYER = -3


@dataclass
class Made:
    """What was written."""

    waves: int = 0
    hubert: int = 0
    bert: int = 0
    speakers: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    """Why a clip has no features, by its name."""


def make_features(
    folder: Path,
    audio: Path | None,
    hubert: Path,
    bert: Path | None = None,
    speaker: Path | None = None,
    *,
    device: str = "cpu",
) -> Made:
    """Writes the features of every clip that 2-name2text.txt names.

    Args:
        folder: the experiment, with 2-name2text.txt.
        audio: the folder of the recordings, with the names in that file; None takes them from where the list of the
            transcription says, a file ``*.list`` in `folder`.
        hubert: a folder of chinese-hubert-base, as transformers stores it.
        bert: a folder of chinese-roberta-wwm-ext-large; only clips in Mandarin have features from it.
        speaker: the file pretrained_eres2netv2w24s4ep4.ckpt, for the vectors that the Pro versions need.
        device: where the models run.

    Raises:
        SovitsError: a folder or file is missing, a model cannot be loaded, or no clip can be used.
    """
    texts = _texts(folder / "2-name2text.txt")
    recordings = _listed(folder) if audio is None else {name: audio / name for name in texts}
    listen = _Hubert(hubert, device)
    read = _Bert(bert, device) if bert is not None else None
    recognise = SpeakerVectors(speaker, device) if speaker is not None else None
    made = Made()
    for part in ("3-bert", "4-cnhubert", "5-wav32k", *(["7-sv_cn"] if recognise is not None else [])):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, (phonemes, spans, text) in texts.items():
        try:
            recording = recordings.get(name)
            if recording is None or not recording.is_file():
                raise SovitsError(f"there is no recording {recording or 'of it in the list'}")
            wave = levelled(read_wave(recording, RATE))
            features = listen(wave)
            if read is not None and spans is not None and not is_cantonese(phonemes):
                _save(folder / "3-bert" / f"{name}.pt", read(text, spans))
                made.bert += 1
            if recognise is not None:
                _save(folder / "7-sv_cn" / f"{name}.pt", recognise(_halved(wave.stored / 32768)))
                made.speakers += 1
            _save_wave(folder / "5-wav32k" / name, wave.stored)
            made.waves += 1
            _save(folder / "4-cnhubert" / f"{name}.pt", features)
            made.hubert += 1
        except SovitsError as error:
            made.left_out[name] = str(error)
            logger.warning("clip %s is left out: %s", name, error)
    if not made.hubert:
        raise SovitsError(
            f"none of the {len(texts)} clips of {folder} has features now: {next(iter(made.left_out.values()), '')}"
        )
    return made


@dataclass(frozen=True)
class Levelled:
    """A clip at upstream's two levels, 32 kHz."""

    stored: Tensor
    """(n,) int16, for 5-wav32k."""
    heard: Tensor
    """(n,) float32, for HuBERT."""


def levelled(wave: Tensor) -> Levelled:
    """Half the clip brought to a peak of 0.95, and half as it is. Raises SovitsError for a clip that is too loud."""
    peak = float(wave.abs().max())
    if peak > LOUDEST:
        raise SovitsError(f"its peak is {peak:.1f}, above {LOUDEST}: the recording is damaged")
    if peak == 0:
        raise SovitsError("it is silent")
    mixed = wave / peak * (_PEAK * _SHARE) + (1 - _SHARE) * wave
    return Levelled((mixed * 32768).clamp(-32768, 32767).to(torch.int16), mixed * _HUBERT_SCALE)


class _Hubert:
    def __init__(self, folder: Path, device: str) -> None:
        from transformers import HubertModel

        self._device = device
        self._model = _load("HuBERT", folder, HubertModel.from_pretrained).eval().to(device)

    @torch.no_grad()
    def __call__(self, wave: Levelled) -> Tensor:
        """(1, width, frames) at 50 Hz."""
        low = _halved(wave.heard)
        if len(low) < 400:
            raise SovitsError(f"it has {len(low)} samples at 16 kHz, and HuBERT needs 400")
        heard: Tensor = self._model(low.unsqueeze(0).to(self._device))["last_hidden_state"]
        features = heard.transpose(1, 2).float().cpu().contiguous()
        if not torch.isfinite(features).all():
            raise SovitsError("HuBERT's features of it are not finite")
        return features


def _halved(wave: Tensor) -> Tensor:
    """From 32 to 16 kHz."""
    import soxr  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return torch.from_numpy(soxr.resample(wave.numpy(), RATE, RATE // 2).copy())


class _Bert:
    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        self._device = device
        self._tokenizer = _load("BERT's tokenizer", folder, AutoTokenizer.from_pretrained)
        self._model = _load("BERT", folder, AutoModelForMaskedLM.from_pretrained).eval().to(device)

    @torch.no_grad()
    def __call__(self, text: str, spans: list[int]) -> Tensor:
        """(width, phonemes): a character's vector once for each of its phonemes."""
        if len(spans) != len(text):
            raise SovitsError(f"2-name2text.txt has {len(text)} characters and {len(spans)} numbers of phonemes for it")
        tokens = self._tokenizer(text, return_tensors="pt").to(self._device)
        layers = self._model(**tokens, output_hidden_states=True)["hidden_states"]
        vectors: Tensor = layers[_BERT_LAYER][0, 1:-1].float().cpu()
        if len(vectors) != len(text):
            raise SovitsError(f"BERT makes {len(vectors)} tokens of its {len(text)} characters: normalise the text")
        return vectors.repeat_interleave(torch.tensor(spans), dim=0).T.contiguous()


def _load(what: str, folder: Path, load: Callable[..., Any]) -> Any:
    if not folder.is_dir():
        raise SovitsError(f"{folder} is no folder: give the folder of {what} as transformers stores it")
    try:
        return load(str(folder), local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SovitsError(f"{what} cannot be loaded from {folder}: {first}") from error


def _texts(path: Path) -> dict[str, tuple[list[str], list[int] | None, str]]:
    """Phonemes, phonemes per character (Chinese only) and text of each clip."""
    if not path.is_file():
        raise SovitsError(f"{path} does not exist: run step 1A (text) of the data preparation first")
    found: dict[str, tuple[list[str], list[int] | None, str]] = {}
    for line in read_lines(path):
        parts = line.split("\t")
        if len(parts) != 4:
            continue
        name, phonemes, spans, text = parts
        if Path(name).name != name:
            raise SovitsError(f"{path} names a clip {name!r}, which is no file name")
        try:
            numbers = ast.literal_eval(spans)
        except (ValueError, SyntaxError) as error:
            raise SovitsError(f"{path} has {spans!r} where the phonemes per character of {name} belong") from error
        listed = isinstance(numbers, list) and all(type(number) is int for number in numbers)
        found[name] = (phonemes.split(" "), numbers if listed else None, text)
    return found


def _listed(folder: Path) -> dict[str, Path]:
    """The recordings by name, as upstream's list has them: path|speaker|language|text in each line."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("[!.]*.list")):  # Not the ._ files that macOS puts beside others on some drives.
        for line in read_lines(path):
            if line.count("|") >= 3:
                recording = Path(line.split("|")[0])
                found[recording.name] = recording
    if not found:
        raise SovitsError(
            f"{folder} does not say where the recordings are: give their folder with --audio, or put the list of the "
            "transcription there, a file *.list with lines path|speaker|language|text"
        )
    return found


def _save(path: Path, tensor: Tensor) -> None:
    def write(file: BinaryIO) -> None:
        torch.save(tensor, file)

    replace_file(path, write)


def _save_wave(path: Path, samples: Tensor) -> None:
    sound = io.BytesIO()  # soundfile goes back to the header, and the file goes forward only
    soundfile.write(sound, samples.numpy(), RATE, subtype="PCM_16", format="WAV")

    def write(file: BinaryIO) -> None:
        file.write(sound.getvalue())

    replace_file(path, write)
