"""One file, replaced atomically, whatever the system says."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from lastgood import disk
from lastgood.errors import LastGoodError

_COUNT = itertools.count()
_BUFFER = 4 << 20
# Bytes. torch.save writes in many pieces of a few bytes.


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process uses and that no pattern such as ``G_*.pth`` matches.

    The random part is needed beside the pid: pids repeat, in containers and on Windows.
    """
    return path.with_name(f".lastgood-{os.getpid()}-{next(_COUNT)}-{secrets.token_hex(4)}.tmp")


def replace_file(path: Path, write: Callable[[BinaryIO], None], *, patience: float | None = None) -> None:
    """Write a file under a temporary name in the same directory, sync it, and put it in place of `path`.

    At every moment `path` is absent, the whole old file or the whole new one. When another program holds `path` open
    (Windows) the replacement is tried again for `patience` seconds.

    Raises:
        LastGoodError: the file could not be put in place. The complete data stay under the name that the error gives.
        OSError: the data could not be written (disk full, no permission). Nothing is left behind.
    """
    temporary = temporary_name(path)
    try:
        with disk.NewFile(temporary) as file:
            buffered = io.BufferedWriter(file, _BUFFER)
            write(buffered)
            buffered.flush()
            file.sync()
    except BaseException:
        with contextlib.suppress(OSError):
            disk.remove(temporary, missing_ok=True, patience=0)
        raise
    try:
        disk.replace(temporary, path, patience=patience)
    except OSError as error:
        raise LastGoodError(
            f"{path} could not be replaced: {error}. The complete new data are in {temporary}, the old file is "
            f"unchanged. Close the program that has {path.name} open, then rename the new file by hand or save again."
        ) from error
    disk.sync_dir(path.parent)
