"""The clips of an experiment folder, as stage 1 reads them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.s1.batch import Batch, Codes
from lastgood_sovits.s1.model import BERT_WIDTH
from lastgood_sovits.text import is_cantonese, read_lines

logger = logging.getLogger(__name__)

CODES_PER_SECOND = 25
CODES = 1024
"""Semantic codes are 0 to 1023; 1024 is the end."""
PHONES_PER_SECOND = (3, 25)
"""A clip outside this is more likely mislabelled than slow or fast."""
FEW_CLIPS = 100
"""Fewer clips than this are repeated, so that an epoch is worth its fixed costs."""


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A line or clip that is not trained on."""

    name: str
    """The clip, or the file and line where it has no name."""
    reason: str
    """Why, as a phrase."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One clip; its text features stay on disk."""

    name: str
    """File name of the audio, extension included."""
    phones: tuple[int, ...]
    """Phone ids."""
    codes: tuple[int, ...]
    """Semantic codes, 25 a second."""

    @property
    def seconds(self) -> float:
        return len(self.codes) / CODES_PER_SECOND


class S1Dataset(Dataset[tuple[Clip, Tensor]]):
    """Clips that have phones and codes, in the order of the codes' file.

    Reads 2-name2text.txt (name, phones, word2ph, text; TAB between fields, blank between phones), 6-name2semantic.tsv
    (a header line, then name and codes) and, per clip, 3-bert/<name>.pt ((1024, phones), zeros where there is no file).
    An item is a clip and its (1024, phones) float32 text features. Item i of n clips is clip i modulo n: fewer than
    100 clips are repeated as upstream repeats them, at least twice.
    """

    def __init__(
        self, phoneme_path: Path | str, semantic_path: Path | str, symbol_ids: Mapping[str, int], *, max_sec: float = 54
    ) -> None:
        """`symbol_ids` maps phones to ids; `max_sec` is the longest clip in seconds.

        What is dropped is in `dropped`, with the reason, and is logged. Raises SovitsError when a file cannot be read
        or no clip remains.
        """
        self._bert = Path(phoneme_path).parent / "3-bert"
        self.dropped: list[Dropped] = []
        """Every line and clip that is not used."""
        self._mandarin: set[str] = set()
        phones = self._read_phones(Path(phoneme_path))
        self.clips = self._with_sound_features(self._read_clips(Path(semantic_path), phones, symbol_ids, max_sec))
        """The clips that are used, each once."""
        self._report()
        if not self.clips:
            raise SovitsError(
                f"None of the clips in {semantic_path} can be trained on ({self._summary()}). Prepare the data set "
                "again and check that 2-name2text.txt and 6-name2semantic.tsv come from the same audio and version."
            )
        few = len(self.clips) < FEW_CLIPS
        self.repeats = max(2, FEW_CLIPS // len(self.clips)) if few else 1
        """How often every clip is in the data set."""

    def __len__(self) -> int:
        return len(self.clips) * self.repeats

    def __getitem__(self, index: int) -> tuple[Clip, Tensor]:
        clip = self.clips[index % len(self.clips)]
        return clip, self._load_bert(clip)

    @property
    def seconds(self) -> list[float]:
        """Length of every item, in seconds."""
        return [clip.seconds for clip in self.clips] * self.repeats

    def batch_size(self, wanted: int) -> int:
        """`wanted`, limited so that an epoch has at least four micro-batches."""
        return max(min(wanted, len(self) // 4), 1)

    def _drop(self, name: str, reason: str) -> None:
        self.dropped.append(Dropped(name=name, reason=reason))

    def _read_phones(self, path: Path) -> dict[str, str]:
        phones: dict[str, str] = {}
        for number, line in _lines(path):
            parts = line.split("\t")
            if len(parts) == 4:
                phones[parts[0]] = parts[1]
                # Only Chinese has a list of phones per character there, and of it only Mandarin has text features.
                if parts[2].startswith("[") and not is_cantonese(parts[1].split(" ")):
                    self._mandarin.add(parts[0])
            elif line.strip():
                self._drop(f"{path.name}, line {number}", f"has {len(parts)} fields where 4 are needed")
        return phones

    def _read_clips(
        self, path: Path, phones: Mapping[str, str], symbol_ids: Mapping[str, int], max_sec: float
    ) -> list[Clip]:
        clips: list[Clip] = []
        for number, line in _lines(path):
            if number == 1 or not line.strip():
                continue
            # Not the csv module: it stops at fields above 131,072 characters, so one long clip would end the training.
            name, _, text = line.partition("\t")
            clip = _make_clip(name, text, phones.get(name), symbol_ids, max_sec)
            if isinstance(clip, Clip):
                clips.append(clip)
            else:
                self._drop(name or f"{path.name}, line {number}", clip)
        return clips

    def _with_sound_features(self, clips: list[Clip]) -> list[Clip]:
        sound: list[Clip] = []
        for clip in clips:
            try:
                self._load_bert(clip)
            except SovitsError as error:
                self._drop(clip.name, str(error))
            else:
                sound.append(clip)
        without = [c.name for c in sound if c.name in self._mandarin and not (self._bert / f"{c.name}.pt").is_file()]
        if without:
            logger.warning(
                "%d clips in Mandarin have no text features in %s, first %s: zeros are used. Run step 1A of the data "
                "preparation, or lastgood sovits features with --bert, for a better voice.",
                len(without),
                self._bert,
                without[0],
            )
        return sound

    def _summary(self) -> str:
        kinds = Counter(item.reason for item in self.dropped)
        return "; ".join(f"{count} x {reason}" for reason, count in kinds.most_common(5)) or "the file lists none"

    def _report(self) -> None:
        for item in self.dropped:
            logger.warning("%s is not trained on: %s", item.name, item.reason)
        seconds = sum(clip.seconds for clip in self.clips)
        logger.info("%d clips, %.0f seconds; %d dropped", len(self.clips), seconds, len(self.dropped))

    def _load_bert(self, clip: Clip) -> Tensor:
        path = self._bert / f"{clip.name}.pt"
        wanted = (BERT_WIDTH, len(clip.phones))
        try:
            features = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:  # no text features for this language
            return torch.zeros(wanted)
        except Exception as error:  # torch has no common class for what a damaged file, or one with code, can cause
            raise SovitsError(f"The text features {path} cannot be read; prepare them again. ({error})") from error
        if not isinstance(features, Tensor) or tuple(features.shape) != wanted:
            found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise SovitsError(
                f"The text features {path} are {found}, but the clip's {wanted[1]} phones need {list(wanted)}; the "
                "text has changed since they were made. Prepare the text features again."
            )
        features = features.float()
        if not math.isfinite(float(features.sum())):
            raise SovitsError(f"The text features {path} hold numbers that are not finite. Prepare them again.")
        return features


def collate(items: Sequence[tuple[Clip, Tensor]]) -> Batch:
    """Items of a data set, padded on the right: phones with 0, codes with 1024, features with zeros."""
    clips = [clip for clip, _ in items]
    return Batch(
        phones=pad_sequence([torch.tensor(clip.phones) for clip in clips], batch_first=True),
        phone_lengths=tuple(len(clip.phones) for clip in clips),
        bert=pad_sequence([features.T for _, features in items], batch_first=True).transpose(1, 2),
        codes=Codes(
            ids=pad_sequence([torch.tensor(clip.codes) for clip in clips], batch_first=True, padding_value=CODES),
            lengths=tuple(len(clip.codes) for clip in clips),
        ),
        names=tuple(clip.name for clip in clips),
    )


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        lines = read_lines(path)
    except OSError as error:
        raise SovitsError(
            f"{path} cannot be read; prepare the data set (text and semantic tokens) first. ({error})"
        ) from error
    return list(enumerate(lines, start=1))


def _make_clip(
    name: str, codes_text: str, phones_text: str | None, symbol_ids: Mapping[str, int], max_sec: float
) -> Clip | str:
    """The clip, or the reason why it is dropped."""
    if phones_text is None:
        return "it is not in 2-name2text.txt"
    try:
        codes = tuple(int(code) for code in codes_text.split())
    except ValueError:
        return "its semantic codes are not whole numbers"
    if not codes:
        return "it has no semantic codes"
    if min(codes) < 0 or max(codes) >= CODES:
        return f"its semantic codes are not all within 0 and {CODES - 1}"
    if len(codes) > max_sec * CODES_PER_SECOND:
        return f"it is longer than {max_sec:g} seconds"
    symbols = phones_text.split(" ")
    unknown = next((symbol for symbol in symbols if symbol not in symbol_ids), None)
    if unknown is not None:
        return f"the phone {unknown!r} is not in this version's table"
    if len(symbols) > max_sec * CODES_PER_SECOND / 2.5:
        return f"it has more than {math.floor(max_sec * CODES_PER_SECOND / 2.5)} phones"
    rate = len(symbols) / (len(codes) / CODES_PER_SECOND)
    if not PHONES_PER_SECOND[0] <= rate <= PHONES_PER_SECOND[1]:
        return f"its phones per second are outside {PHONES_PER_SECOND[0]} to {PHONES_PER_SECOND[1]}"
    return Clip(name=name, phones=tuple(symbol_ids[symbol] for symbol in symbols), codes=codes)
