"""One file, replaced atomically, whatever the system says."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from lastgood import disk, one_writer
from lastgood.errors import DamagedError, LastGoodError, SaveError

_COUNT = itertools.count()
_BUFFER = 4 << 20
# Bytes. torch.save writes in many pieces of a few bytes.


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process uses and that no pattern such as ``G_*.pth`` matches.

    The random part is needed beside the pid: pids repeat, in containers and on Windows.
    """
    return path.with_name(f".lastgood-{os.getpid()}-{next(_COUNT)}-{secrets.token_hex(4)}.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file has such a name: nobody relies on it once its writer is gone."""
    return name.startswith(".lastgood-") and name.endswith(".tmp")


def is_of_macos(name: str) -> bool:
    """Whether it is a file of macOS beside a program's: Finder's, or what an exFAT or network drive cannot hold within
    the file. They come, change and go as the system likes.
    """
    return name == ".DS_Store" or name.startswith("._")


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


def save(
    obj: object,
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    patience: float | None = None,
    timeout: float = 300.0,
) -> None:
    """Save `obj` as ``torch.save`` does, whole or not at all; every rank of a job may call it, and one of them writes.

    The file is written beside `path`, synced, and put in its place. Nothing is added to it: any torch opens it, and its
    size is that of ``torch.save`` to a buffer. A path that ends in ``.safetensors`` takes a flat dict of tensors.

    Args:
        obj: what ``torch.save`` takes.
        path: where. Its directory must exist. A symbolic link is followed.
        rank: the rank of this process, where it cannot be seen from the environment or the process group. Rank 0
            always writes; see :mod:`lastgood.one_writer` for how the others decide.
        patience: seconds to try again while another program holds `path` open (Windows); 10 by default.
        timeout: seconds to wait for another rank that is writing `path`; after that this one writes too.

    Raises:
        SaveError: the file could not be written; the old one is untouched and nothing is left behind.
        LastGoodError: it could not be put in place; the complete data stay under the name that the error gives.
    """
    if not isinstance(path, str | os.PathLike):
        raise SaveError(
            f"lastgood.save takes a path, not {path!r}: only a file with a name can be replaced as a whole. Pass the "
            "path, or write to the file object with torch.save."
        )
    target = disk.real_path(path)
    if not disk.is_dir(target.parent):
        raise SaveError(f"{target} was not saved: the directory {target.parent} does not exist. Make it first.")
    writer = _safetensors_writer(obj, target) if target.suffix == ".safetensors" else _torch_writer(obj)

    def write() -> None:
        try:
            replace_file(target, writer, patience=patience)
        except OSError as error:
            raise SaveError(
                f"{target} was not saved: {error}. What had this name before is unchanged, and nothing is left behind. "
                "Free some space or mend the permissions, then save again."
            ) from error

    one_writer.write_once(target, write, rank=rank, timeout=timeout)


def _torch_writer(obj: object) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        import torch

        # Through a file object, never a name: torch puts the name of a file into every member of the zip, and some
        # programs tell models apart by their size in bytes.
        torch.save(obj, file)

    return write


def _safetensors_writer(obj: object, path: Path) -> Callable[[BinaryIO], None]:
    import torch

    if not isinstance(obj, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in obj.items()):
        raise SaveError(f"{path} was not saved: a .safetensors file holds a flat dict from names to tensors only.")

    def write(file: BinaryIO) -> None:
        from safetensors.torch import save as to_bytes

        try:
            data = to_bytes({name: tensor.contiguous() for name, tensor in obj.items()})
        except (RuntimeError, ValueError) as error:
            raise SaveError(f"{path} was not saved: {error}") from error
        file.write(data)

    return write


def load(
    path: str | os.PathLike[str],
    map_location: Any = "cpu",
    *,
    weights_only: bool | None = True,
    mmap: bool | None = None,
    allow: Iterable[Any] = (),
) -> Any:
    """Load what :func:`save` or ``torch.save`` wrote, checked, without running any code from the file.

    Args:
        path: a torch file; a .safetensors file, which gives a dict of tensors; or a run or one of its checkpoints,
            which gives the state of every object by name, as its ``load_state_dict`` takes it. A run is not taken: a
            job may use it meanwhile. Of the ranks' own versions, it is rank 0's.
        map_location: as in ``torch.load``: a device, a dict, a function, or None for the devices they were saved from.
        weights_only: taken for the sake of ``torch.load``'s callers; False changes nothing.
        mmap: map tensors from the file instead of copying them, as in ``torch.load``; they are checked all the same.
            It makes no difference for .safetensors files.
        allow: classes and functions, beyond those of tensors and plain containers, that the file may name.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedError: the file is short, or bytes in it have changed.
        RefusedError: reading it would run code from it.
        LastGoodError: `path` is a directory without a checkpoint, or no path at all.
    """
    if not isinstance(path, str | os.PathLike):
        raise LastGoodError(
            f"lastgood.load takes a path, not {path!r}. Pass the path of the file; "
            "lastgood.torchfile.read reads a file object that can seek."
        )
    source = Path(path)
    if disk.is_dir(source):
        from lastgood.states import read_states
        from lastgood.torchfile import safetensors_device

        return read_states(source, safetensors_device(map_location))
    if not disk.is_file(source):
        missing = FileNotFoundError(f"{source} was not loaded: there is no such file.")
        missing.errno = errno.ENOENT
        raise missing
    if source.suffix == ".safetensors":
        return _load_safetensors(source, map_location)
    from lastgood import torchfile

    damage = torchfile.verify(source)
    if damage:
        raise DamagedError(f"{source} is damaged: {'; '.join(damage)}. Load an earlier file, or a copy.")
    return torchfile.read(source, map_location=map_location, mmap=bool(mmap), allow=allow)


def _load_safetensors(path: Path, map_location: Any) -> Any:
    import safetensors.torch

    with disk.open_read(path) as file:
        data = file.read()
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        # The format has no checksum: what can be noticed is a header or a length that does not fit.
        raise DamagedError(f"{path} is damaged: {error}. Load an earlier file, or a copy.") from error
    from lastgood.torchfile import safetensors_device

    device = safetensors_device(map_location)
    return {name: tensor.to(device) for name, tensor in tensors.items()}
