"""Every weights, checkpoint and resume file of GPT-SoVITS, read without running anything from it.

What upstream guesses by the size of a file is decided here by its content, and `utils.HParams` becomes a plain dict.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

import lastgood
from lastgood import DamagedError, LastGoodError, RefusedError
from lastgood_sovits.errors import SovitsError
from lastgood_sovits.weights_format import (
    HEADERS,
    LATEST,
    PRETRAINED_BYTES,
    RECORDS,
    S1_ROWS,
    S1_V1_ROWS,
    Kind,
    Mark,
    Version,
    content_mark,
    discriminators,
    known_mark,
    plain,
    progress,
    upstream_mark,
)

METADATA = "lastgood_sovits"
"""The key of our entry in the metadata of a safetensors file."""


@dataclass(frozen=True)
class Weights:
    """One weights or resume file of upstream, or the same in safetensors."""

    kind: Kind
    version: Version | None
    """For stage 1, v2 stands for every version after v1. A discriminator is the same in v1 and v2, and in v2Pro and
    v2ProPlus: v2 and v2Pro stand for both. None where the content does not tell."""
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    """Plain nested dict; empty in resume files, which have none."""
    info: str = ""
    epoch: int | None = None
    """Finished epochs."""
    step: int | None = None
    """Optimizer steps; None where the file does not say."""
    lora_rank: int | None = None
    optimizer: dict[str, Any] | None = None
    """`state_dict()` of the optimizer, in checkpoints and resume files."""
    learning_rate: float | None = None
    """As written in a resume file: the configured one, not the one in use (that is in `optimizer`)."""
    extra: dict[str, Any] | None = None
    """Everything else in a Lightning checkpoint: loops, callbacks, lr_schedulers, hyper_parameters."""
    header: str = ""
    """The first two bytes: PK, or 00 to 06."""
    size: int = 0
    """Bytes of the file."""
    notes: tuple[str, ...] = ()
    """Sentences about what is odd, such as a file that upstream would take for another version."""


class _Restored(io.RawIOBase):
    """A file with `PK` in the place of its first two bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        start = self._file.tell()
        data = self._file.read(len(buffer))
        if start < 2:
            data = b"PK"[start : start + len(data)] + data[2 - start :]
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def open_restored(path: Path) -> Iterator[tuple[BinaryIO, bytes, int]]:
    """(the file as torch wrote it, its first 8192 bytes as they are, its size in bytes). Raises OSError."""
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(PRETRAINED_BYTES)
        file.seek(0)
        marked = head[:2] in HEADERS and head[2:4] == b"\x03\x04"
        yield (io.BufferedReader(_Restored(file)) if marked else file), head, size


def read_weights(path: str | Path, *, map_location: str | torch.device = "cpu") -> Weights:
    """Any weights, checkpoint or resume file of either stage. `map_location="meta"` reads shapes only.

    Raises `lastgood.LastGoodError` for a damaged or hostile file, `SovitsError` for one that is not GPT-SoVITS's.
    """
    path = Path(path)
    try:
        with open_restored(path) as (file, head, size):
            content = lastgood.read_torch_file(file, map_location=map_location, records=RECORDS)
            metadata = _metadata(file) if head[8:9] == b"{" else None
    except LastGoodError as error:
        kind = next(kind for kind in (DamagedError, RefusedError, LastGoodError) if isinstance(error, kind))
        raise kind(f"{path}: {str(error).removeprefix(f'{path}: ').removeprefix('the file: ')}") from error.__cause__
    except OSError as error:
        raise LastGoodError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return _understand(content, path.name, head, size, metadata)
    except SovitsError as error:
        raise SovitsError(f"{path}: {error}") from error.__cause__


def _metadata(file: BinaryIO) -> dict[str, Any]:
    """What `convert` wrote beside the tensors in a safetensors file."""
    file.seek(0)
    # The header was checked when the tensors were read.
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    try:
        metadata = json.loads(header.get("__metadata__", {}).get(METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"the entry {METADATA} of its metadata is damaged") from error
    return metadata if isinstance(metadata, dict) else {}


def _understand(content: Any, name: str, head: bytes, size: int, metadata: dict[str, Any] | None) -> Weights:
    if metadata is not None:
        content = {"weight": content, **metadata}
    if not isinstance(content, dict):
        raise SovitsError(f"a {type(content).__name__}, not a GPT-SoVITS file")
    header = head[:2].decode("latin-1") if metadata is None else ""
    if "pytorch-lightning_version" in content:
        return _lightning(content, header, size)
    if {"model", "iteration", "optimizer"} <= content.keys():
        return _resume(content, name, header, size)
    tensors = _tensors(content.get("weight"), "weight")
    config = plain(content.get("config", {}))
    if not isinstance(config, dict):
        raise SovitsError("its config is no dict")
    info, lora_rank = str(content.get("info", "")), content.get("lora_rank")
    if lora_rank is not None and type(lora_rank) is not int:
        raise SovitsError("its lora_rank is no integer")
    epoch, step = progress(info)
    common: dict[str, Any] = {"tensors": tensors, "config": config, "info": info, "epoch": epoch, "step": step}
    common |= {"header": header, "size": size}
    if S1_ROWS in tensors or (tensors and all(key.startswith("model.") for key in tensors)):
        return Weights("s1", _s1_version(tensors), **common)
    if discriminators(tensors):
        return Weights("s2D", _d_version(tensors), **common)
    mark, notes = _s2_mark(tensors, config, lora_rank, head if metadata is None else None, size)
    return Weights("s2", mark.version if mark else None, lora_rank=lora_rank, notes=notes, **common)


def _s2_mark(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], lora_rank: int | None, head: bytes | None, size: int
) -> tuple[Mark | None, tuple[str, ...]]:
    content = content_mark(tensors, config, lora_rank)
    if head is None:
        return content, ()
    if (known := known_mark(head)) is not None:
        return known, ()  # Certain, where tensors leave v3 and v4 alike.
    upstream = upstream_mark(head, size)
    if upstream == content or content is None:
        return content or upstream, ()
    if head[:2] == b"PK" and upstream is not None and upstream.lora == content.lora:
        return content, (f"upstream would take this file for {upstream.version}, by its {size} bytes",)
    stated = f"{upstream.version}{' LoRA' if upstream.lora else ''}" if upstream else "an unknown version"
    return content, (f"its first bytes say {stated}, its tensors {content.version}{' LoRA' if content.lora else ''}",)


def _s1_version(tensors: Mapping[str, torch.Tensor]) -> Version | None:
    rows = tensors[S1_ROWS].shape[0] if S1_ROWS in tensors else None
    return None if rows is None else "v1" if rows <= S1_V1_ROWS else "v2"


def _d_version(tensors: Mapping[str, torch.Tensor]) -> Version:
    return "v2" if discriminators(tensors) <= 6 else "v2Pro"


def _tensors(value: Any, what: str) -> dict[str, torch.Tensor]:
    if not isinstance(value, dict) or not value:
        raise SovitsError(f"it has no {what}, so it is not a GPT-SoVITS file")
    if any(type(key) is not str or not isinstance(tensor, torch.Tensor) for key, tensor in value.items()):
        raise SovitsError(f"its {what} holds something other than tensors by name")
    return dict(value)


def _whole(value: Any, what: str) -> int:
    if type(value) is not int or value < 0:
        raise SovitsError(f"its {what} is no whole number")
    return value


def _resume(content: dict[str, Any], name: str, header: str, size: int) -> Weights:
    tensors = _tensors(content["model"], "model")
    if not isinstance(content["optimizer"], dict):
        raise SovitsError("its optimizer is no state_dict")
    numbered = re.fullmatch(r"[GD]_(\d{1,18})\.pth", name)
    step = int(numbered[1]) if numbered and int(numbered[1]) != LATEST else None
    common: dict[str, Any] = {"epoch": _whole(content["iteration"], "iteration"), "step": step}
    common |= {"optimizer": plain(content["optimizer"]), "learning_rate": content.get("learning_rate")}
    common |= {"config": {}, "header": header, "size": size}
    if discriminators(tensors):
        return Weights("s2D-resume", _d_version(tensors), tensors, **common)
    mark = content_mark(tensors, {}, None)
    return Weights("s2G-resume", mark.version if mark else None, tensors, **common)


def _lightning(content: dict[str, Any], header: str, size: int) -> Weights:
    tensors = _tensors(content.get("state_dict"), "state_dict")
    states = content.get("optimizer_states")
    if not isinstance(states, list) or len(states) != 1 or not isinstance(states[0], dict):
        raise SovitsError("it has not the state of one optimizer")
    extra = plain({k: v for k, v in content.items() if k not in ("state_dict", "optimizer_states")})
    hyper = extra.get("hyper_parameters", {})
    config = hyper.get("config", {}) if isinstance(hyper, dict) else {}
    return Weights(
        "s1-checkpoint",
        _s1_version(tensors),
        tensors,
        config if isinstance(config, dict) else {},
        epoch=_whole(content.get("epoch"), "epoch") + 1,  # upstream counts from 0 here, and only here
        step=_whole(content.get("global_step"), "global_step"),
        optimizer=plain(states[0]),
        extra=extra,
        header=header,
        size=size,
    )
