"""The random state of one rank: python, numpy (where the program uses it), torch on CPU, every CUDA device, and MPS."""

from __future__ import annotations

import ctypes
import hashlib
import random
import struct
from typing import Any

import torch

from lastgood.values import Json, decode, encode, numpy_in_use

_PLACES = {"pos": 624, "buffer_pos": 4}
# Of MT19937 and of Philox.


def capture() -> Json:
    """The random state of this process, as JSON."""
    return as_json(take())


def take() -> dict[str, Any]:
    """The random state of this process, as it is given, for :func:`as_json`: that takes longer, and can wait."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if numpy_in_use():
        import numpy as np

        # Not always a Mersenne Twister: numpy.random.set_bit_generator takes others.
        state["numpy"] = np.random.get_state(legacy=False)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available() and torch.mps.current_allocated_memory():  # The program has tensors there.
        state["mps"] = torch.mps.get_rng_state()
    return state


def as_json(taken: dict[str, Any]) -> Json:
    """What :func:`take` gave, as JSON."""
    version, words, gauss = taken["python"]
    state = {**taken, "python": (version, struct.pack(f"<{len(words)}I", *words), gauss)}
    for kind in ("torch", "mps"):
        if kind in state:
            state[kind] = _raw(state[kind])
    if "cuda" in state:
        state["cuda"] = [_raw(item) for item in state["cuda"]]
    if "numpy" in state:
        state["numpy"] = without_arrays(state["numpy"])
    return encode(state, "random", _no_tensor)


def apply(saved: Json) -> list[str]:
    """Set the random state that :func:`capture` took. Returns what could not be set, in words."""
    state = decode(saved, _no_tensor)
    left = []
    version, words, gauss = state["python"]
    numbers = tuple(int.from_bytes(words[i : i + 4], "little") for i in range(0, len(words), 4))
    random.setstate((version, numbers, gauss))
    torch.set_rng_state(_tensor(state["torch"]))
    if "numpy" in state:
        try:
            import numpy as np

            held = state["numpy"]
            if type(held) is tuple:  # As it was written first: a Mersenne Twister, in the older form that numpy has.
                name, words, *rest = held
                with_arrays({"pos": rest[0]})
                np.random.set_state((name, np.frombuffer(words, dtype="<u4"), *rest))
            else:
                np.random.set_state(with_arrays(held))
        except (ImportError, TypeError, ValueError) as error:
            left.append(f"the random state of numpy ({error})")
    devices = state.get("cuda", [])
    if devices and torch.cuda.is_available():
        here = torch.cuda.device_count()
        for index, item in enumerate(devices[:here]):
            torch.cuda.set_rng_state(_tensor(item), index)
        if here != len(devices):
            left.append(f"{len(devices)} CUDA devices had a random state, and here are {here}")
    elif devices:
        left.append("there is no CUDA device here to take the saved random state")
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_tensor(state["mps"]))
    elif "mps" in state:
        left.append("there is no MPS device here to take the saved random state")
    return left


def derive(saved: Json, rank: int, world_size: int, step: int) -> int:
    """Seed this process for a rank that has no saved random state: from rank 0's, the place in the job, and the step.

    The same checkpoint and the same place always give the same seed, and different ranks different ones.
    Returns the seed.
    """
    text = f"{hashlib.sha256(repr(saved).encode()).hexdigest()} {rank} {world_size} {step}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    random.seed(seed)
    torch.manual_seed(seed)
    if numpy_in_use():
        import numpy as np

        np.random.seed(seed)
    return seed


def without_arrays(value: Any) -> Any:
    """A state of numpy as plain values."""
    if isinstance(value, dict):
        return {key: without_arrays(item) for key, item in value.items()}
    if hasattr(value, "tobytes") and value.shape:
        return ("array", value.dtype.str, value.tobytes())
    return value.item() if hasattr(value, "item") else value


def with_arrays(value: Any) -> Any:
    """What :func:`without_arrays` was given. Raises ValueError for a place that is not in the arrays: numpy would read
    there."""
    if isinstance(value, dict):
        for key, most in _PLACES.items():
            if key in value and not 0 <= value[key] <= most:
                raise ValueError(f"{key} of a generator of numpy is {value[key]}")
        return {key: with_arrays(item) for key, item in value.items()}
    if type(value) is tuple:
        import numpy as np

        return np.frombuffer(value[2], dtype=value[1]).astype(np.dtype(value[1]).newbyteorder("="))
    return value


def _raw(state: torch.Tensor) -> bytes:
    here = state.cpu().contiguous()
    return ctypes.string_at(here.data_ptr(), here.numel())


def _tensor(raw: bytes) -> torch.Tensor:
    return torch.tensor(list(raw), dtype=torch.uint8, device="cpu")


def _no_tensor(*_: Any) -> Any:
    raise TypeError("random state holds no tensors")
