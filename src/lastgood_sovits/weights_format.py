"""The marks by which GPT-SoVITS tells its weights files apart.

Source: GPT_SoVITS/process_ckpt.py and GPT_SoVITS/utils.py of RVC-Boss/GPT-SoVITS at commit 48b1a016.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Literal

import torch

from lastgood.pickle_limits import PickledObject
from lastgood_sovits.errors import SovitsError

Version = Literal["v1", "v2", "v2Pro", "v2ProPlus", "v3", "v4"]
Kind = Literal["s1", "s2", "s2D", "s1-checkpoint", "s2G-resume", "s2D-resume"]


@dataclass(frozen=True)
class Mark:
    """What upstream takes a file for."""

    symbols: Literal["v1", "v2"]
    """The phoneme table: 322 symbols in v1, 732 in v2, which all later versions share."""
    version: Version
    lora: bool
    """Only the low-rank changes to v3 or v4 are in the file."""


HEADERS = {
    b"00": Mark("v1", "v1", False),
    b"01": Mark("v2", "v2", False),
    b"02": Mark("v2", "v3", False),
    b"03": Mark("v2", "v3", True),
    b"04": Mark("v2", "v4", True),
    b"05": Mark("v2", "v2Pro", False),
    b"06": Mark("v2", "v2ProPlus", False),
}
"""The first two bytes of a file, which replace the `PK` of its zip format."""
PRETRAINED = {
    "dc3c97e17592963677a4a1681f30c653": Mark("v2", "v2", False),
    "43797be674a37c1c83ee81081941ed0f": Mark("v2", "v3", False),
    "6642b37f3dbb1f76882b69937c95a5f3": Mark("v2", "v2", False),
    "4f26b9476d0c5033e04162c486074374": Mark("v2", "v4", False),
    "c7e9fce2223f3db685cdfa1e6368728a": Mark("v2", "v2Pro", False),
    "66b313e39455b57ab1b0bc0b239c9d0a": Mark("v2", "v2ProPlus", False),
}
"""MD5 of the first 8192 bytes of the generators that upstream publishes."""
PRETRAINED_BYTES = 8192
V1_BELOW = 82_978 * 1024
V2_BELOW = 700 * 1024 * 1024
"""Bytes: without a header or a known MD5, upstream goes by the size of the file."""
LATEST = 233_333_333_333
"""The step in the names of resume files when only the newest is kept."""

_HPARAMS = ("utils.HParams", "GPT_SoVITS.utils.HParams", "module.utils.HParams", "__main__.HParams")
_PATHS = tuple(
    f"{module}.{pure}{system}Path"
    for module in ("pathlib", "pathlib._local")
    for pure in ("", "Pure")
    for system in ("", "Posix", "Windows")
)
_DICTS = tuple(
    f"{module}.AttributeDict"
    for module in (
        "lightning_fabric.utilities.data",
        "lightning.fabric.utilities.data",
        "pytorch_lightning.utilities.parsing",
    )
)
RECORDS = (*_HPARAMS, *_PATHS, *_DICTS)
"""Classes in upstream's files, which are read as records and turned into plain values by `plain`."""

S2_ROWS = "enc_p.text_embedding.weight"
S1_ROWS = "model.ar_text_embedding.word_embeddings.weight"
V1_SYMBOLS = 322
S1_V1_ROWS = 512


def known_mark(head: bytes) -> Mark | None:
    """What a file is that begins with `head` (8192 bytes), when it is one of those that upstream publishes."""
    # MD5 identifies known files here, and protects nothing.
    return PRETRAINED.get(hashlib.md5(head[:PRETRAINED_BYTES], usedforsecurity=False).hexdigest())


def upstream_mark(head: bytes, size: int) -> Mark | None:
    """What upstream takes a stage-2 file for that begins with `head` (8192 bytes) and has `size` bytes.

    The order is upstream's: MD5, header, size. None where upstream raises, for an unknown header.
    """
    if (known := known_mark(head)) is not None:
        return known
    if head[:2] != b"PK":
        return HEADERS.get(head[:2])
    if size < V1_BELOW:
        return HEADERS[b"00"]
    return HEADERS[b"01"] if size < V2_BELOW else HEADERS[b"02"]


def header_for(version: Version, lora: bool) -> bytes:
    """The two bytes that name `version` without doubt. Raises `SovitsError` where upstream has none (all of v4)."""
    for header, mark in HEADERS.items():
        if mark.version == version and mark.lora == lora:
            return header
    raise SovitsError(f"upstream has no mark for a {'LoRA' if lora else 'whole'} {version} file and could not read it")


def content_mark(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], lora_rank: int | None) -> Mark | None:
    """What a stage-2 generator is by its tensors, and by its configuration where tensors cannot tell (v3 from v4).

    None where neither can.
    """
    model = config.get("model")
    named = model.get("version") if isinstance(model, Mapping) else None
    named = config.get("version") if named is None else named
    rows = tensors[S2_ROWS].shape[0] if S2_ROWS in tensors else None
    lora = lora_rank is not None or any(".lora_A." in name for name in tensors)
    if any(name.startswith("cfm.") for name in tensors):
        return Mark("v2", "v4" if named == "v4" else "v3", lora)
    if any(name.startswith("sv_emb.") for name in tensors):
        width = tensors["dec.conv_pre.weight"].shape[0] if "dec.conv_pre.weight" in tensors else None
        plus = named == "v2ProPlus" if width is None else width == 768
        return Mark("v2", "v2ProPlus" if plus else "v2Pro", lora)
    if rows is not None:
        return Mark("v1", "v1", lora) if rows == V1_SYMBOLS else Mark("v2", "v2", lora)
    return None


def progress(info: str) -> tuple[int | None, int | None]:
    """(epoch, step) from the `info` of a weights file: `3epoch_120iteration` or `GPT-e3`. Both count finished ones."""
    if found := re.fullmatch(r"(\d{1,18})epoch_(\d{1,18})iteration", info):
        return int(found[1]), int(found[2])
    if found := re.fullmatch(r"GPT-e(\d{1,18})", info):
        return int(found[1]), None
    return None, None


def s2_name(experiment: str, epoch: int, step: int, lora_rank: int | None = None) -> str:
    """The file name of stage-2 weights: `voice_e8_s120.pth`, `voice_e2_s30_l32.pth`."""
    return f"{experiment}_e{epoch}_s{step}{'' if lora_rank is None else f'_l{lora_rank}'}.pth"


def s1_name(experiment: str, epoch: int) -> str:
    """The file name of stage-1 weights: `voice-e15.ckpt`."""
    return f"{experiment}-e{epoch}.ckpt"


def plain(value: Any) -> Any:
    """`value` with upstream's classes turned into plain ones: HParams into dicts, paths into text.

    Raises `SovitsError` for objects of any other class.
    """
    if isinstance(value, PickledObject):
        if value.name in _PATHS:
            parts = [part for part in value.args if isinstance(part, str)]
            return str((PureWindowsPath if "Windows" in value.name else PurePosixPath)(*parts))
        if value.name in _HPARAMS and isinstance(value.state, dict):
            return {key: plain(item) for key, item in value.state.items()}
        if value.name in _DICTS:
            return {key: plain(item) for key, item in value.items}
        raise SovitsError(f"an object of class {value.name}, which no GPT-SoVITS file has")
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return value


def discriminators(names: Iterable[str]) -> int:
    """How many discriminators the tensor names have: 6 in v1 and v2, 8 in v2Pro and v2ProPlus."""
    return len({name.split(".")[1] for name in names if name.startswith("discriminators.") and name.count(".") > 1})
