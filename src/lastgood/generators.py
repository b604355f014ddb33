"""Random generators that are registered as objects: torch's, Python's ``random.Random``, and numpy's."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from typing import Any

import torch

from lastgood import values
from lastgood.random_state import with_arrays, without_arrays

PLAIN = "torch.Generator"
"""The class whose state is saved as it is, without a name."""
_BLOCK = 4096
# Bytes to whose multiple a state is padded: a tensor that has another length at every save is planned anew each time.


def is_generator(value: Any) -> bool:
    """Whether it is a random generator whose state can be read and set."""
    if isinstance(value, torch.Generator):
        return True
    if isinstance(value, random.Random):
        return not isinstance(value, random.SystemRandom)  # That of the system has no state.
    numpy = sys.modules.get("numpy.random")
    return numpy is not None and isinstance(value, (numpy.Generator, numpy.RandomState))


def class_of(generator: Any) -> str:
    """What it must be where its state is restored."""
    bits = _bits(generator)
    kind = type(bits if bits is not None else generator)
    if issubclass(kind, torch.Generator):
        return PLAIN
    known = random.Random if issubclass(kind, random.Random) else kind
    return f"{known.__module__}.{known.__qualname__}"


def state_of(generator: Any, name: str) -> torch.Tensor:
    """Its state, as bytes. Raises LastGoodError, with its name, where a class of one's own has some that cannot be."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    bits = _bits(generator)
    if bits is None:
        state: Any = generator.getstate()
    elif hasattr(generator, "get_state"):
        state = without_arrays(generator.get_state(legacy=False))  # With the half of a pair that is left of a Gauss.
    else:
        state = without_arrays(bits.state)
    text = json.dumps(values.encode(state, name, _no_tensor)).encode()
    return torch.frombuffer(bytearray(text.ljust(-(-len(text) // _BLOCK) * _BLOCK)), dtype=torch.uint8)


def set_state(generator: Any, state: torch.Tensor) -> None:
    """Set what :func:`state_of` gave for a generator of the same class."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
        return
    held = values.decode(json.loads(bytes(state.tolist())), _no_tensor)
    bits = _bits(generator)
    if bits is None:
        generator.setstate(held)
    elif hasattr(generator, "set_state"):
        generator.set_state(with_arrays(held))
    else:
        bits.state = with_arrays(held)


def derive(generator: Any, name: str, rank: int, world_size: int, step: int) -> int:
    """Seed a generator that holds rank 0's state, for a rank that has none: from that, the place, and the step.

    The same checkpoint and the same place always give the same seed, and different ranks and generators different
    ones. Returns the seed.
    """
    state = hashlib.sha256(bytes(state_of(generator, name).tolist())).hexdigest()
    text = f"{state} {name} {rank} {world_size} {step}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    bits = _bits(generator)
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif bits is None:
        generator.seed(seed)
    elif hasattr(generator, "set_state"):
        generator.set_state({**type(bits)(seed).state, "has_gauss": 0, "gauss": 0.0})
    else:
        bits.state = type(bits)(seed).state
    return seed


def _bits(generator: Any) -> Any:
    """What makes the numbers of a generator of numpy; None for others."""
    held = getattr(generator, "bit_generator", None)
    return held if held is not None else getattr(generator, "_bit_generator", None)


def _no_tensor(*_: Any) -> Any:
    raise TypeError("the state of a generator holds no tensors")
