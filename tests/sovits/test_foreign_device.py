"""Both stages on a device that is not the processor: no tensor of a step is made on the wrong one.

The device is torch's "meta", which has shapes and no numbers, and refuses to mix with the processor as CUDA does.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from lastgood_sovits.s1 import Batch as Batch1
from lastgood_sovits.s1 import Codes, Text2Semantic, make_optimizer
from lastgood_sovits.s1.config import ModelConfig
from lastgood_sovits.s2 import step
from lastgood_sovits.s2.batch import Batch as Batch2
from lastgood_sovits.s2.config import Config, parse_config
from lastgood_sovits.s2.discriminator import Discriminator
from lastgood_sovits.s2.quantizer import Codebook
from lastgood_sovits.s2.synthesizer import Synthesizer

DEVICE = "meta"
FRAMES = 60


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta has none."""
    monkeypatch.setattr(step, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)


def _config(version: str) -> Config:
    model: dict[str, Any] = {
        "version": version,
        "inter_channels": 8,
        "hidden_channels": 8,
        "filter_channels": 16,
        "n_layers": 2,
        "upsample_initial_channel": 32,
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
        "gin_channels": 16,
        "ssl_channels": 12,
        "codebook_size": 16,
        "mrte_channels": 16,
        "style_channels": 8,
        "posterior_layers": 2,
        "flow_couplings": 2,
        "flow_layers": 1,
        "sv_channels": 20,
        "discriminator_channels": 64,
        "discriminator_periods": [2, 3],
    }
    return parse_config({"model": model, "train": {"segment_size": 3200, "batch_size": 2}})


def _batch(config: Config) -> Batch2:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    return Batch2(
        names=("a", "b"),
        ssl=empty(2, 12, FRAMES),
        spec=empty(2, config.data.spec_channels, FRAMES),
        lengths=empty(2, dtype=torch.int64),
        wave=empty(2, 1, FRAMES * 640),
        text=empty(2, 9, dtype=torch.int64),
        text_lengths=empty(2, dtype=torch.int64),
        sv=empty(2, 20) if config.model.is_pro else None,
    )


@pytest.mark.parametrize("version", ["v2", "v2Pro"])
def test_a_step_of_stage_2(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(version)
    monkeypatch.setattr(Codebook, "is_ready", lambda _: True)  # Meta has no number to answer with.
    generator = Synthesizer(config.model, config.data.spec_channels, config.segment_frames).to(DEVICE).train()
    discriminator = Discriminator(config.model.periods, config.model.discriminator_channels).to(DEVICE)
    optimizers = [AdamW(network.parameters(), foreach=False) for network in (generator, discriminator)]
    training = step.TrainStep(generator, discriminator, *optimizers, config)
    monkeypatch.setattr(training, "_step", lambda loss, norm, optimizer: optimizer.step() or True)
    result = training(_batch(config))
    assert {value.device.type for value in (*result.losses.values(), *result.grad_norms.values())} == {DEVICE}
    batch = _batch(config)
    sv = None if batch.sv is None else batch.sv[:1]
    wave = generator.eval().infer(batch.ssl[:1], batch.spec[:1], batch.lengths[:1], batch.text[:1], sv)
    assert wave.shape == (1, 1, FRAMES * 640) and wave.device.type == DEVICE


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("preference", [False, True])
def test_a_step_of_stage_1(compat: bool, preference: bool) -> None:
    model = Text2Semantic(ModelConfig(embedding_dim=16, hidden_dim=16, head=2, n_layer=2), upstream_compat=compat).to(
        DEVICE
    )
    optimizer = make_optimizer(model)
    batch = Batch1(
        phones=torch.ones(2, 7, dtype=torch.int64),
        phone_lengths=(7, 5),
        bert=torch.zeros(2, 1024, 7),
        codes=Codes(ids=torch.ones(2, 20, dtype=torch.int64), lengths=(20, 12)),
    )
    if preference:
        batch = batch.with_rejected([torch.Generator().manual_seed(0)] * 2, upstream_compat=compat)
    for _ in range(2):
        losses = model(batch.to(DEVICE))
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {value.device.type for value in vars(losses).values()} == {DEVICE}
