"""The clips of an experiment folder, as upstream's preparation tools write it.

All clips are checked before the training: one that cannot be used is left out and named with the reason, and the others
keep their sorted order, which is therefore the same on every rank and in every run.
"""

import logging
import math
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lastgood_sovits.audio import read_wave, spectrogram
from lastgood_sovits.errors import SovitsError
from lastgood_sovits.s2.batch import Clip
from lastgood_sovits.s2.config import Config
from lastgood_sovits.s2.sampler import BOUNDARIES
from lastgood_sovits.text import read_lines, symbol_ids

logger = logging.getLogger(__name__)

MIN_CLIPS = 100
"""A smaller data set is repeated to about this size, so that an epoch is not over in a step or two."""

TEXT, FEATURES, WAVES, SPEAKERS = "2-name2text.txt", "4-cnhubert", "5-wav32k", "7-sv_cn"
_MADE_BY = {
    TEXT: "1A (text and BERT)",
    FEATURES: "1B (HuBERT features)",
    WAVES: "1B (HuBERT features)",
    SPEAKERS: "1B with a v2Pro version chosen (speaker vectors)",
}


def load_tensor(path: Path) -> Tensor:
    """Loads the one tensor of a .pt file, without running code from it.

    Returns:
        The tensor in float32.

    Raises:
        SovitsError: if the file is missing, damaged, or holds anything but a tensor of finite numbers.
    """
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no common class for what a damaged file can cause
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SovitsError(f"{path} cannot be read as a tensor file ({first_line}): prepare this clip again") from error
    if not isinstance(value, Tensor):
        raise SovitsError(f"{path} holds a {type(value).__name__}, not a tensor: prepare this clip again")
    value = value.float()
    if not math.isfinite(float(value.sum())):
        raise SovitsError(f"{path} holds numbers that are not finite: prepare this clip again")
    return value


def read_phonemes(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Reads 2-name2text.txt.

    Returns:
        The phonemes of each clip, and a sentence for each line that is not four fields separated by tabs.

    Raises:
        SovitsError: if the file is missing or is not UTF-8.
    """
    try:
        lines = read_lines(path)
    except FileNotFoundError as error:
        raise _missing(path) from error
    phonemes, problems = {}, []
    for number, line in enumerate(lines, start=1):
        parts = line.split("\t")
        if len(parts) == 4:
            phonemes[parts[0]] = parts[1].split(" ")
        elif line:
            problems.append(f"line {number} of {path} has {len(parts)} fields instead of 4")
    return phonemes, problems


def _missing(path: Path) -> SovitsError:
    return SovitsError(f"{path} does not exist: run step {_MADE_BY[path.name]} of the data preparation first")


class ClipDataset(Dataset[Clip]):
    """The usable clips of an experiment folder, sorted by name, repeated if they are few.

    Args:
        folder: the experiment folder, with 2-name2text.txt, 4-cnhubert, 5-wav32k and, for the Pro versions, 7-sv_cn.
        config: the configuration.

    Raises:
        SovitsError: if a file or folder is missing, or no clip can be used.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        if not folder.is_dir():
            raise SovitsError(f"{folder} is no folder: give the experiment folder that the data preparation made")
        for name in (FEATURES, WAVES, *([SPEAKERS] if config.model.is_pro else [])):
            if not (folder / name).is_dir():
                raise _missing(folder / name)
        phonemes, problems = read_phonemes(folder / TEXT)
        for problem in problems:
            logger.warning("%s; it is left out", problem)
        self.left_out: dict[str, str] = {}
        """Why a clip is not used, by its name."""
        ids, usable = symbol_ids(config.model.version), []
        for name in sorted(phonemes):
            try:
                usable.append((name, self._check(name), self._text(name, phonemes[name], ids)))
            except SovitsError as error:
                self.left_out[name] = str(error)
                logger.warning("clip %s is left out: %s", name, error)
        if not usable:
            raise SovitsError(self._nothing_usable(len(phonemes)))
        logger.info("%d clips are used, %d are left out", len(usable), len(self.left_out))
        repeats = max(2, MIN_CLIPS // len(usable)) if len(usable) < MIN_CLIPS else 1
        self.names = [name for name, _, _ in usable] * repeats
        self.lengths = [frames for _, frames, _ in usable] * repeats
        """Frames of each clip, for the sampler."""
        self._texts = {name: text for name, _, text in usable}

    def _nothing_usable(self, listed: int) -> str:
        if not listed:
            return f"{self.folder / TEXT} lists no clip: transcribe the recordings and prepare them again"
        reasons = Counter(self.left_out.values()).most_common(3)
        return f"none of the {listed} clips in {self.folder} can be used. Reasons: " + "; ".join(r for r, _ in reasons)

    def _text(self, name: str, phonemes: list[str], ids: dict[str, int]) -> Tensor:
        if phonemes == [""]:
            raise SovitsError(f"it has no phonemes in {TEXT}: correct its text and prepare it again")
        unknown = sorted({phoneme for phoneme in phonemes if phoneme not in ids})
        if unknown:
            raise SovitsError(
                f"its phonemes {' '.join(repr(p) for p in unknown)} are not known to {self.config.model.version}: "
                "prepare the texts for this version"
            )
        return torch.tensor([ids[phoneme] for phoneme in phonemes])

    def _paths(self, name: str) -> tuple[Path, Path, Path]:
        return (
            self.folder / FEATURES / f"{name}.pt",
            self.folder / WAVES / name,
            self.folder / SPEAKERS / f"{name}.pt",
        )

    def _check(self, name: str) -> int:
        """Gives the frames of a clip if all its files can be read and fit each other."""
        features, wave, speaker = self._paths(name)
        required = (features, wave, speaker) if self.config.model.is_pro else (features, wave)
        for path in required:
            if not path.is_file():
                raise SovitsError(f"{path.parent.name}/{path.name} is missing: prepare this clip again")
        data = self.config.data
        frames = len(read_wave(wave, data.sampling_rate)) // data.hop_length
        if not BOUNDARIES[0] < frames <= BOUNDARIES[-1]:
            unit = data.hop_length / data.sampling_rate
            raise SovitsError(
                f"it is {frames * unit:.2f} s long, and usable are clips from {(BOUNDARIES[0] + 1) * unit:.2f} s to "
                f"{BOUNDARIES[-1] * unit:.2f} s"
            )
        self._check_features(load_tensor(features), frames, features)
        if self.config.model.is_pro:
            self._speaker(speaker)
        return frames

    def _speaker(self, path: Path) -> Tensor:
        vector = load_tensor(path).flatten()
        if len(vector) != self.config.model.sv_channels:
            raise SovitsError(
                f"{path.parent.name}/{path.name} has {len(vector)} numbers instead of "
                f"{self.config.model.sv_channels}: prepare this clip again"
            )
        return vector

    def _check_features(self, ssl: Tensor, frames: int, path: Path) -> None:
        expected = (1, self.config.model.ssl_channels)
        if ssl.dim() != 3 or ssl.shape[:2] != expected or abs(ssl.shape[2] - frames) > 1:
            raise SovitsError(
                f"{path.parent.name}/{path.name} has the shape {tuple(ssl.shape)}, and its sound needs "
                f"{(*expected, frames)}: prepare this clip again"
            )

    @property
    def clips(self) -> list[tuple[str, int, list[int]]]:
        """Name, frames and phoneme ids of each clip, once."""
        return [(n, f, self._texts[n].tolist()) for n, f in dict(zip(self.names, self.lengths, strict=True)).items()]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Clip:
        """Reads a clip.

        Raises:
            SovitsError: if a file was changed or damaged since it was checked; the message names it.
        """
        name, data = self.names[index], self.config.data
        features, sound, speaker = self._paths(name)
        wave = read_wave(sound, data.sampling_rate)
        spec = spectrogram(wave.unsqueeze(0), data.filter_length, data.hop_length, data.win_length)[0]
        ssl = load_tensor(features)
        self._check_features(ssl, spec.shape[1], features)
        # HuBERT's last frame needs 400 samples of 16 kHz, so it may have one frame less than the spectrogram.
        ssl = F.pad(ssl, (0, 1), mode="replicate")[0, :, : spec.shape[1]]
        sv = self._speaker(speaker) if self.config.model.is_pro else None
        return Clip(name=name, ssl=ssl, spec=spec, wave=wave, text=self._texts[name], sv=sv)
