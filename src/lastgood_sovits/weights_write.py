"""Weights files that GPT-SoVITS reads, and any `torch.load(weights_only=True)` too.

Where upstream pickles its class `utils.HParams`, a plain nested dict is written, which upstream's loader takes as well.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import torch

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.weights_format import HEADERS, Mark, Version, header_for, upstream_mark

ReplaceFile = Callable[[Path, Callable[[BinaryIO], None]], object]
"""Puts a file in place at once and durably: `replace_file(path, write)` calls `write` with the open new file."""


def half(tensors: Mapping[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    """`tensors` in float16 on the CPU, each with its own memory. Integers stay as they are.

    Raises `SovitsError` that names every tensor with values that float16 cannot hold or that are not finite.
    """
    result: OrderedDict[str, torch.Tensor] = OrderedDict()
    wrong = []
    for name, tensor in tensors.items():
        source = tensor.detach()
        target = source.to("cpu", torch.float16 if source.is_floating_point() else source.dtype, copy=True).contiguous()
        if not torch.isfinite(target).all():
            largest = source.abs().max().item()
            wrong.append(f"{name} (largest value {largest:g})")
        result[name] = target
    if wrong:
        raise SovitsError(f"float16 ends at 65504 and cannot hold {', '.join(wrong)}; nothing was written")
    return result


def write_s2_weights(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    version: Version,
    epoch: int,
    step: int,
    replace_file: ReplaceFile,
    lora_rank: int | None = None,
) -> None:
    """Writes stage-2 weights for inference: float16, without the posterior encoder (`enc_q`), under upstream's marks.

    `tensors` is the generator's state_dict (for LoRA what upstream exports), `config` plain values, `epoch` and `step`
    count finished ones. A v1 or v2 file begins with PK as upstream's do where its size tells upstream the right
    version, and with 00 or 01, which upstream reads too, where it would not. Raises `SovitsError` before anything is
    written where values overflow float16 or the version has no mark.
    """
    weight = half({name: tensor for name, tensor in tensors.items() if "enc_q" not in name})
    content = {"config": plain_config(config), "info": f"{epoch}epoch_{step}iteration"}
    if lora_rank is not None:
        content["lora_rank"] = lora_rank
    write_content(path, weight, content, mark=mark_of(version, lora_rank is not None), replace_file=replace_file)


def write_s1_weights(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    epoch: int,
    replace_file: ReplaceFile,
) -> None:
    """Writes stage-1 weights for inference: float16, names with the prefix `model.`, `epoch` counts finished ones.

    Raises `SovitsError` where values overflow float16 or a name lacks the prefix.
    """
    if bare := [name for name in tensors if not name.startswith("model.")]:
        raise SovitsError(f"stage-1 tensors are named model.*, these are not: {', '.join(bare[:5])}")
    content = {"config": plain_config(config), "info": f"GPT-e{epoch}"}
    write_content(path, half(tensors), content, mark=None, replace_file=replace_file)


def plain_config(value: Any) -> Any:
    """`value` as dicts, lists, text and numbers only, so that every loader takes it; paths become text.

    Raises `SovitsError` that names the class of anything else.
    """
    if isinstance(value, Mapping):
        return {str(key): plain_config(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_config(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise SovitsError(f"a {type(value).__name__} in the configuration, which only holds plain values")


def mark_of(version: Version, lora: bool) -> Mark:
    """The mark of a stage-2 version. Raises `SovitsError` where upstream has none."""
    if version not in get_args(Version):
        raise SovitsError(f"{version!r} is no version of GPT-SoVITS: {', '.join(get_args(Version))}")
    return HEADERS[header_for(version, lora)]


def write_content(
    path: str | Path,
    weight: Mapping[str, torch.Tensor],
    content: Mapping[str, Any],
    *,
    mark: Mark | None,
    replace_file: ReplaceFile,
    header: Literal["upstream", "always", "never"] = "upstream",
) -> None:
    """Writes `weight` as it is, with `content` beside it.

    `mark` is what upstream must take the file for, None for stage 1. `header` "upstream" keeps PK wherever upstream
    guesses right, "always" names every stage-2 version, "never" leaves a file that plain `torch.load` opens.
    """
    whole = OrderedDict(weight=OrderedDict(weight), **content)
    first = b"PK"
    if mark is not None and header != "never":
        named = header_for(mark.version, mark.lora)
        counter = _Counter()
        torch.save(whole, counter)  # type: ignore[arg-type]
        by_size = upstream_mark(b"PK", counter.size)
        if header == "always" or mark.lora or mark.version in ("v2Pro", "v2ProPlus") or by_size != mark:
            first = named
    save_torch(Path(path), whole, replace_file, first)


def save_torch(path: Path, content: Any, replace_file: ReplaceFile, first: bytes = b"PK") -> None:
    """`torch.save` through `replace_file`, with `first` as the first two bytes.

    An error of the disk is raised as it was, not as torch's complaint about its writer.
    """

    def write(file: BinaryIO) -> None:
        marked = _Marked(file, first)
        try:
            torch.save(content, marked)  # type: ignore[arg-type]
        except RuntimeError:
            if marked.error is not None:
                raise marked.error from None
            raise

    replace_file(path, write)


class _Counter:
    """Counts what is written to it."""

    size = 0

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is kept."""


class _Marked:
    """Writes to `file`, with `first` in the place of the first two bytes."""

    def __init__(self, file: BinaryIO, first: bytes) -> None:
        self._file, self._first = file, first
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        taken = min(len(self._first), len(data))
        try:
            if taken:
                self._file.write(self._first[:taken])
                self._first = self._first[taken:]
            self._file.write(memoryview(data)[taken:])
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        self._file.flush()
