"""The reference values of stage 1, and models and batches made to compare with them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lastgood_sovits.s1 import Batch, Codes, Text2Semantic
from lastgood_sovits.s1.config import ModelConfig

GOLDEN = Path(__file__).parents[1] / "golden"


class Golden:
    """The files of `tests/sovits/golden`, read once."""

    def __init__(self) -> None:
        spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
        assert spec is not None and spec.loader is not None
        self.fill = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.fill)
        self._json: dict[str, Any] = {}

    def json(self, name: str) -> Any:
        if name not in self._json:
            self._json[name] = json.loads((GOLDEN / f"{name}.json").read_text())
        return self._json[name]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(GOLDEN / f"{name}.safetensors")

    def model(self, size: str) -> Text2Semantic:
        """In eval mode, with the weights that `fill.py` makes from the key names."""
        wanted = self.json(f"s1_{size}")["config"]
        known = ModelConfig.__dataclass_fields__
        model = Text2Semantic(ModelConfig(**{k: v for k, v in wanted.items() if k in known})).eval()
        keys = self.json("keys/s1_v2_small" if size == "small" else "keys/s1_v2")["keys"]
        model.load_state_dict(self.fill.fill_state_dict({k: shape for k, (shape, _) in keys.items()}))
        return model

    def batch(self, case: str) -> Batch:
        """`b1` is one clip, `b3` is three of different lengths; see golden/README.md."""
        phones, codes = {"b1": ((13,), (20,)), "b3": ((13, 9, 6), (20, 14, 17))}[case]
        clips = len(phones)
        ids = self.fill.fixed_input(f"s1.{case}.phones", (clips, 13), "int:732")
        semantic = self.fill.fixed_input(f"s1.{case}.codes", (clips, 20), "int:1024")
        bert = self.fill.fixed_input(f"s1.{case}.bert", (clips, 1024, 13))
        for clip in range(clips):
            ids[clip, phones[clip] :] = 0
            semantic[clip, codes[clip] :] = 1024
            bert[clip, :, phones[clip] :] = 0
        return Batch(phones=ids, phone_lengths=phones, bert=bert, codes=Codes(ids=semantic, lengths=codes))


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()


@pytest.fixture(scope="session")
def small_config() -> ModelConfig:
    return ModelConfig(embedding_dim=16, hidden_dim=16, head=2, n_layer=2, phoneme_vocab_size=40)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def random_batch(small_config: ModelConfig) -> Callable[..., Batch]:
    """Batches of clips with given (phones, codes) lengths, different for each seed."""

    def make(*lengths: tuple[int, int], seed: int = 0) -> Batch:
        draw = torch.Generator().manual_seed(seed)
        x, y = max(n for n, _ in lengths), max(n for _, n in lengths)
        shape = (len(lengths), x)
        return Batch(
            phones=torch.randint(0, small_config.phoneme_vocab_size, shape, generator=draw),
            phone_lengths=tuple(n for n, _ in lengths),
            bert=torch.randn(len(lengths), 1024, x, generator=draw),
            codes=Codes(
                ids=torch.randint(0, 1024, (len(lengths), y), generator=draw),
                lengths=tuple(n for _, n in lengths),
            ),
            names=tuple(f"clip{i}.wav" for i in range(len(lengths))),
        )

    return make
