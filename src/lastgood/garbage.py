"""Python's cyclic garbage collection, held back while training waits."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Let no collection begin inside: what a save makes of thousands of tensors would set one off.

    In a program with millions of objects that takes half a second. None of what a save makes is cyclic: it goes
    without a collection when it is written.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
