"""Decoding beyond the reference values: the end code, several texts at once, sampling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lastgood_sovits.s1 import Text2Semantic, generate
from lastgood_sovits.s1.config import ModelConfig
from lastgood_sovits.s1.decode import _sample
from lastgood_sovits.s1.model import Decoder


@pytest.fixture
def decoder(small_config: ModelConfig) -> Decoder:
    torch.manual_seed(0)
    return Text2Semantic(small_config).eval().model


def text(*lengths: int) -> tuple[list[Tensor], list[Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return (
        [torch.randint(0, 40, (n,), generator=draw) for n in lengths],
        [torch.randn(1024, n, generator=draw) for n in lengths],
    )


PROMPT = torch.tensor([[3, 1, 4]])


def test_the_end_is_barred_from_the_first_codes_and_not_returned(decoder: Decoder) -> None:
    normal = decoder.ar_predict_layer.forward
    decoder.ar_predict_layer.forward = lambda x: normal(x) + 100 * torch.eye(1025)[1024]  # type: ignore[method-assign]
    codes = generate(decoder, *text(6), PROMPT, max_codes=40, top_k=1)
    assert len(codes[0]) == 3 + 11 and 1024 not in codes[0].tolist()


def test_a_text_that_ends_early_does_not_disturb_the_others(decoder: Decoder) -> None:
    phones, bert = text(6, 9, 4)
    prompt = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5]])
    normal = decoder.ar_predict_layer.forward
    calls = 0

    def end_second_at_step_12(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        logits = normal(x)
        if calls == 13 and len(x) == 3:
            logits[1, 1024] = 100.0
        return logits

    decoder.ar_predict_layer.forward = end_second_at_step_12  # type: ignore[method-assign]
    together = generate(decoder, phones, bert, prompt, max_codes=20, top_k=1)
    decoder.ar_predict_layer.forward = normal  # type: ignore[method-assign]
    alone = [
        generate(decoder, [p], [b], row[None], max_codes=20, top_k=1)[0]
        for p, b, row in zip(phones, bert, prompt, strict=True)
    ]
    assert together[0].tolist() == alone[0].tolist() and together[2].tolist() == alone[2].tolist()
    assert together[1].tolist() == alone[1].tolist()[: 3 + 12]


def test_sampling_is_decided_by_the_generator(decoder: Decoder) -> None:
    def run(seed: int) -> list[int]:
        draw = torch.Generator().manual_seed(seed)
        return generate(decoder, *text(6), PROMPT, max_codes=15, generator=draw)[0].tolist()

    assert run(1) == run(1) != run(2)


def test_top_k_top_p_and_temperature_limit_the_choice() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).repeat(400, 1)
    draw = torch.Generator().manual_seed(0)
    assert set(_sample(logits, 2, 1.0, 1.0, draw).tolist()) == {0, 1}
    assert set(_sample(logits, None, 0.8, 1.0, draw).tolist()) == {0}  # 0.64, then 0.87
    assert set(_sample(logits, None, 0.9, 1.0, draw).tolist()) == {0, 1}
    assert set(_sample(logits, None, 0.1, 1.0, draw).tolist()) == {0}
    assert set(_sample(logits, None, 1.0, 0.01, draw).tolist()) == {0}
    assert set(_sample(logits, None, 1.0, 10.0, draw).tolist()) == {0, 1, 2, 3, 4}
