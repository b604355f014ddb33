"""The journal that `lastgood run` keeps beside saved files, for `lastgood verify`."""

from __future__ import annotations

import os

from lastgood.intercept.runtime.journal import Finding
from lastgood.intercept.runtime.journal import verify as _verify

__all__ = ["Finding", "verify"]


def verify(directory: str | os.PathLike[str]) -> list[Finding]:
    """Check every file below `directory` that `lastgood run` saved, and the kept versions, against their checksums.

    Returns one finding for each file; its `damage` is empty where the file is good. A file that was deleted is left
    out, and one that a program outside of `lastgood run` has replaced by a whole file is good.
    """
    return _verify(os.path.abspath(directory))
