"""The reference case of stage 2: models with the reference weights, and the batch they were run on."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from s2_golden import fill_module, fixed_input, read_json, read_tensors
from torch import Tensor

from lastgood_sovits.s2.batch import Batch
from lastgood_sovits.s2.config import Config, DataConfig, ModelConfig, TrainConfig
from lastgood_sovits.s2.discriminator import Discriminator
from lastgood_sovits.s2.synthesizer import Synthesizer

LENGTHS, TEXT_LENGTHS = (40, 36), (15, 11)


def published_config(version: str) -> Config:
    """The configuration of the published model of a version."""
    model = ModelConfig(version=version)
    if model.is_pro:
        model = replace(model, gin_channels=1024, p_dropout=0.0)
    if version == "v2ProPlus":
        model = replace(model, upsample_initial_channel=768, upsample_kernel_sizes=(20, 16, 8, 2, 2))
    return Config(data=DataConfig(), model=model, train=TrainConfig())


def build_generator(version: str) -> Synthesizer:
    generator = Synthesizer(published_config(version).model)
    fill_module(generator)
    return generator.eval()


def build_discriminator(version: str) -> Discriminator:
    discriminator = Discriminator(published_config(version).model.periods)
    fill_module(discriminator)
    return discriminator.eval()


def symbols(version: str) -> str:
    return "int:322" if version == "v1" else "int:732"


@lru_cache(maxsize=4)
def reference_batch(version: str) -> Batch:
    wave = fixed_input("s2.wav", (2, 1, 25600), "wave:32000")
    wave[1, :, 36 * 640 :] = 0
    spec = fixed_input("s2.spec", (2, 1025, 40), "pos") * 4
    ssl = fixed_input("s2.ssl", (2, 768, 40))
    spec[1, :, 36:] = 0
    ssl[1, :, 36:] = 0
    text = fixed_input("s2.text", (2, 15), symbols(version))
    text[1, 11:] = 0
    return Batch(
        names=("a.wav", "b.wav"),
        ssl=ssl,
        spec=spec,
        lengths=torch.tensor(LENGTHS),
        wave=wave,
        text=text,
        text_lengths=torch.tensor(TEXT_LENGTHS),
        sv=fixed_input("s2.sv", (2, 20480)) if published_config(version).model.is_pro else None,
    )


def reference_noise() -> Tensor:
    return fixed_input("s2.eps", (2, 192, 40))


def reference_starts() -> Tensor:
    return torch.tensor([3, 1])


def reference_json(version: str) -> dict[str, Any]:
    values: dict[str, Any] = read_json(f"s2_{version}.json")
    return values


def reference_tensors(version: str) -> dict[str, Tensor]:
    return read_tensors(f"s2_{version}.safetensors")
