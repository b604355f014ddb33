"""The types of tensors: torch's, and the names that safetensors gives them."""

from __future__ import annotations

import torch

from lastgood.errors import LastGoodError

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7 and newer
    DTYPE_NAMES[torch.float8_e8m0fnu] = "F8_E8M0"
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def dtype_name(dtype: torch.dtype, path: str) -> str:
    """The name that safetensors gives a type. Raises LastGoodError for a type that it does not hold."""
    if dtype not in DTYPE_NAMES:
        raise LastGoodError(
            f"{path}: a tensor of type {dtype} cannot be saved, since safetensors files do not hold that type. "
            "Nothing was written. Convert it, or leave it out with leave_out=[...]."
        )
    return DTYPE_NAMES[dtype]
