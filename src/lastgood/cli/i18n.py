"""The language of the command line: English, and Chinese where the user's locale or ``LASTGOOD_LANG=zh`` says so.

The English text is the key of the catalogue in :mod:`lastgood.cli.texts`; a test sees to it that none is missing there.
Errors of the library itself stay English in both, as they stand in logs.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Iterator

import click

_CLICK_MODULES = ("core", "decorators", "exceptions", "formatting", "parser", "types")


@functools.cache
def language() -> str:
    """ "zh" or "en"."""
    asked = os.environ.get("LASTGOOD_LANG") or _locale()
    if not asked.lower().startswith(("zh", "chinese")):
        return "en"
    try:
        "检查点，".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "en"  # A terminal that would show question marks.
    return "zh"


def _locale() -> str:
    if sys.platform == "win32":
        import ctypes

        # The primary language of the user interface: the low ten bits of the language identifier; 4 is Chinese.
        return "zh" if ctypes.windll.kernel32.GetUserDefaultUILanguage() & 0x3FF == 4 else "en"
    return next((value for name in ("LC_ALL", "LC_MESSAGES", "LANG") if (value := os.environ.get(name))), "en")


def translate(text: str) -> str:
    """`text` in the user's language."""
    if language() == "en":
        return text
    from lastgood.cli.texts import CHINESE

    return CHINESE.get(text, text)


def _(text: str, /, **values: object) -> str:
    """`text` in the user's language, with `values` put in."""
    return translate(text).format(**values) if values else translate(text)


def localize(command: click.Command) -> None:
    """Put the help of a command, and of its options, into the user's language."""
    if language() == "en":
        return
    for holder, attribute, paragraphs in help_texts(command):
        setattr(holder, attribute, "\n\n".join(translate(paragraph) for paragraph in paragraphs))


def help_texts(command: click.Command) -> Iterator[tuple[object, str, list[str]]]:
    """What of a command's help is to be translated: the object, its attribute, and the paragraphs of the text."""
    holders: list[object] = [command, *command.params]
    for holder in holders:
        for attribute in ("help", "short_help", "epilog"):
            if text := getattr(holder, attribute, None):
                yield holder, attribute, [" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n")]
    if isinstance(command, click.Group):
        for child in command.commands.values():
            yield from help_texts(child)


def speak_click() -> None:
    """Give Click our words for its own: it asks gettext, which finds no Chinese catalogue of Click anywhere."""
    if language() == "en":
        return
    for name in _CLICK_MODULES:
        module = getattr(click, name)
        if hasattr(module, "_"):
            module._ = translate
        if hasattr(module, "ngettext"):
            module.ngettext = lambda one, many, count: translate(one if count == 1 else many)
