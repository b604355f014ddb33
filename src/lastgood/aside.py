"""Work that is done beside something else, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


def aside(work: Callable[[], _T], name: str) -> Future[_T]:
    """Begin `work` in a thread called `name`; where there are no more threads, do it here and now."""
    done: Future[_T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(result)

    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except RuntimeError:  # No more threads, or the interpreter is ending.
        run()
    return done
