"""What `lastgood run` brings into the program's own process: standard library only, Python 3.8 and newer.

It is imported twice under two names: by the hook in the program (as ``_lastgood_run``, with no lastgood installed), and
by lastgood itself, for the journal.
"""

from __future__ import annotations

from types import ModuleType


def patch(module: ModuleType) -> None:
    """Make the saves of a module safe that was imported just now."""
    from . import patches

    patches.patch(module)
