"""Whether a safetensors file is whole. Format: https://huggingface.co/docs/safetensors (8 bytes length, JSON, data)."""

from __future__ import annotations

import json
import struct
from typing import Any, BinaryIO

from lastgood.errors import DamagedError

MAX_HEADER = 100_000_000
"""Bytes of header that the safetensors library accepts."""
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


def is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins with `head` (9 bytes or more) looks like safetensors."""
    return len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= MAX_HEADER


def check_safetensors(file: BinaryIO, size: int) -> None:
    """Raises `DamagedError` for the first thing that is wrong: lengths, types, holes, overlaps, a wrong end."""
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, MAX_HEADER):
        raise DamagedError(f"the file is cut off: {size} bytes, its header alone has {length}")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"the header is damaged: {str(error)[:200]}") from error
    if not isinstance(header, dict):
        raise DamagedError("the header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise DamagedError("the header's __metadata__ holds something other than text")
    end = 0
    for begin, stop, name in sorted(_range(name, entry) for name, entry in header.items()):
        if begin != end:
            raise DamagedError(f"{name[:200]!r}: starts at byte {begin} of the data, the one before ends at {end}")
        end = stop
    if 8 + length + end != size:
        what = "the file is cut off" if 8 + length + end > size else "the file has bytes that belong to no tensor"
        raise DamagedError(f"{what}: {size} bytes where the header says {8 + length + end}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    for name, value in pairs:
        # Half of a surrogate pair is no text: the safetensors library refuses the file.
        for text in (name, value) if isinstance(value, str) else (name,):
            text.encode()
    return result


def _range(name: str, entry: Any) -> tuple[int, int, str]:
    shown = repr(name[:200])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise DamagedError(f"{shown}: its entry is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise DamagedError(f"{shown}: an unknown data type")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise DamagedError(f"{shown}: a shape or a place that is no list of whole numbers")
    bits = _BITS[dtype]
    for n in shape:
        bits *= n
        if bits >= 1 << 70:
            raise DamagedError(f"{shown}: an absurd shape")
    begin, stop = offsets
    if (stop - begin) * 8 != bits:
        raise DamagedError(f"{shown}: {stop - begin} bytes where its shape needs {-(-bits // 8)}")
    return begin, stop, name


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in values)
