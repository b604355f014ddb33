"""The phoneme tables: which row of the text embedding belongs to which phoneme. Also how files of text are read.

The tables are facts of the published GPT-SoVITS models (`text/symbols.py` for v1, `text/symbols2.py` for all later
versions): the weights of an embedding mean nothing under another order. They are built here from the inventories of the
languages, because 732 written-out lines cannot be reviewed and 30 can.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from lastgood_sovits.errors import SovitsError

# Punctuation, pauses, the unknown symbol and the (historical) padding mark. The id used for padding is 0, which is "!".
_MARKS = "! ? … , . - SP SP2 SP3 UNK _"

_PINYIN_INITIALS = "AA EE OO b c ch d f g h j k l m n p q r s sh t w x y z zh"
_PINYIN_FINALS = (
    "E En a ai an ang ao e ei en eng er i i0 ia ian iang iao ie in ing iong ir iu "
    "o ong ou u ua uai uan uang ui un uo v van ve vn"
)
_PINYIN_TONES = "12345"

_JAPANESE = "I N U a b by ch cl d dy e f g gy h hy i j k ky m my n ny o p py r ry s sh t ts u v w y z"
_JAPANESE_PITCH = "[ ]"  # rise and fall; only in the later table

_ARPABET_VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
_ARPABET_STRESS = "012"
_ARPABET_UNSTRESSED = "B CH D DH ER F G HH IH JH K L M N NG P R S SH T TH V W Y Z ZH"

_KOREAN = "ㄱㄴㄷㄹㅁㅂㅅㅇㅈㅊㅋㅌㅍㅎㄲㄸㅃㅆㅉㅏㅓㅗㅜㅡㅣㅐㅔ空停"

# Jyutping. Syllabic and split-off parts occur with and without a tone, other initials without, other finals with.
_JYUTPING_BOTH = "a aa ai ak au e g k m n o oi ok on ou p t uk"
_JYUTPING_TONED = (
    "aai aak aam aan aang aap aat aau am an ang ap at ei ek eng eoi eon eot i ik im in ing ip it iu "
    "oe oek oeng ong ot u ui un ung ut yu yun yut"
)
_JYUTPING_TONELESS = "b c d f gw h j kw l ng s w z"
_JYUTPING_TONES = "123456"

SYMBOL_COUNTS = MappingProxyType({"v1": 322, "v2": 732})
"""Rows of the text embedding in the two tables."""


def _toned(stems: str, tones: str) -> set[str]:
    return {stem + tone for stem in stems.split() for tone in tones}


def _first_table() -> list[str]:
    plain = " ".join((_MARKS, _PINYIN_INITIALS, _JAPANESE, _ARPABET_UNSTRESSED))
    toned = _toned(_PINYIN_FINALS, _PINYIN_TONES) | _toned(_ARPABET_VOWELS, _ARPABET_STRESS)
    return sorted(set(plain.split()) | toned)


def _later_table() -> list[str]:
    # Languages that were added later stand behind the first table, each sorted by itself, so that old ids keep their
    # meaning. The prefix keeps Cantonese apart from pinyin.
    toned = _toned(f"{_JYUTPING_BOTH} {_JYUTPING_TONED}", _JYUTPING_TONES)
    cantonese = {"Y" + part for part in toned | set(f"{_JYUTPING_BOTH} {_JYUTPING_TONELESS}".split())}
    return _first_table() + _JAPANESE_PITCH.split() + sorted(_KOREAN) + sorted(cantonese)


@lru_cache(maxsize=2)
def _table(first: bool) -> tuple[str, ...]:
    return tuple(_first_table() if first else _later_table())


def symbol_ids(version: str) -> dict[str, int]:
    """Gives the id of every phoneme for a model version.

    Args:
        version: "v1" (322 symbols), or any later version such as "v2" or "v2Pro" (732 symbols).

    Returns:
        A new dictionary from phoneme to row of the text embedding, in their order. Id 0 is "!", and also pads.

    Raises:
        SovitsError: if `version` is empty.
    """
    if not version:
        raise SovitsError('the model version is empty: give "v1", "v2", "v2Pro" or "v2ProPlus"')
    return {symbol: index for index, symbol in enumerate(_table(version == "v1"))}


def read_lines(path: Path) -> list[str]:
    """The lines of a file of the data preparation, without their ends.

    Only a line feed ends a line, also after a carriage return: upstream's texts may hold other characters that Unicode
    calls line ends, such as U+2028. A byte order mark, as Windows editors write it, is not part of the first line.

    Raises:
        SovitsError: if the file is not UTF-8.
        OSError: if it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise SovitsError(f"{path} is not UTF-8 ({error}): prepare the texts again") from error


def is_cantonese(phonemes: Sequence[str]) -> bool:
    """Whether a Chinese text is not Mandarin: Cantonese phonemes begin with Y, and else only English's consonant Y."""
    return any(len(phoneme) > 1 and phoneme.startswith("Y") for phoneme in phonemes)
