"""Reads the reference values in tests/sovits/golden (see the README there)."""

import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


def _load_fill() -> ModuleType:
    # By path: other test directories have modules of their own next to theirs, and no package ties them together.
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_FILL = _load_fill()


def read_json(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


@lru_cache(maxsize=4)
def read_tensors(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name)


def fixed_input(name: str, shape: tuple[int, ...], kind: str = "unit") -> Tensor:
    value: Tensor = _FILL.fixed_input(name, shape, kind)
    return value


def fill_module(module: torch.nn.Module) -> None:
    """Loads the reference weights, strictly, into a module in float32."""
    state = module.state_dict()
    module.load_state_dict(_FILL.fill_state_dict({k: tuple(v.shape) for k, v in state.items()}))


def assert_close(actual: Tensor, expected: Tensor, what: str, atol: float) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    worst = float((actual.double() - expected.double()).abs().max())
    assert worst <= atol, f"{what}: largest difference {worst:.3g}, allowed {atol:.3g}"
