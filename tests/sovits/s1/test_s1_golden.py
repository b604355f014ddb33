"""Stage 1 gives upstream's numbers: losses, gradients, logits, accuracy, preference loss, decoding.

The tolerances are those of golden/README.md; each is stated where it is used.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lastgood_sovits.s1 import Codes, Text2Semantic, generate
from lastgood_sovits.s1.config import ModelConfig

SIZES = ["small", pytest.param("default", marks=pytest.mark.slow)]
LOGITS = {"small": 1e-4, "default": 1e-4}  # absolute
LOSS = 1e-5  # relative
NORM = {"small": 1e-4, "default": 1e-3}  # relative, of a parameter's gradient
LARGEST = {"small": 1e-4, "default": 2e-3}  # relative to the largest element
ALPHA = {"small": 1e-3, "default": 2e-2}  # absolute: a sum that cancels


@pytest.fixture(scope="module")
def models(golden: Any) -> Any:
    made: dict[str, Text2Semantic] = {}
    return lambda size: made.setdefault(size, golden.model(size))


def check_gradients(model: Text2Semantic, expected: dict[str, Any], norm: float, largest: float, alpha: float) -> None:
    parameters = dict(model.named_parameters())
    assert expected
    for name, values in expected.items():
        grad = parameters[name].grad
        assert grad is not None, name
        if name.endswith("alpha"):
            assert grad.item() == pytest.approx(values["first8"][0], abs=alpha), name
            continue
        assert grad.norm().item() == pytest.approx(values["norm"], rel=norm), name
        top = values["largest8"]
        got = grad.flatten()[top["flat_index"]].tolist()
        assert got == pytest.approx(top["value"], abs=largest * max(map(abs, top["value"]))), name


@pytest.mark.parametrize("keys", ["s1_v1_small", "s1_v2_small", "s1_v1", "s1_v2"])
def test_parameters_have_upstreams_names_shapes_and_order(golden: Any, keys: str) -> None:
    expected = golden.json(f"keys/{keys}")
    config = golden.json("s1_small" if "small" in keys else "s1_default")["config"]
    rows = expected["keys"]["model.ar_text_embedding.word_embeddings.weight"][0][0]
    wanted = {k: config[k] for k in ("embedding_dim", "hidden_dim", "head", "n_layer")}
    with torch.device("meta"):
        model = Text2Semantic(ModelConfig(phoneme_vocab_size=rows, **wanted))
    found = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in model.state_dict().items()}
    assert list(found.items()) == list(expected["keys"].items())
    assert [name for name, _ in model.named_parameters()] == list(expected["keys"])
    assert not list(model.buffers())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("case", "batch", "compat"), [("b1", "b1", False), ("b1", "b1", True), ("b3_upstream", "b3", True)]
)
def test_loss_accuracy_and_gradients(golden: Any, models: Any, size: str, case: str, batch: str, compat: bool) -> None:
    expected = golden.json(f"s1_{size}")["cases"][case]
    model = models(size)
    model.upstream_compat = compat
    model.zero_grad()
    losses = model(golden.batch(batch))
    losses.total.backward()
    assert losses.total.item() == pytest.approx(expected["loss"], rel=LOSS)
    assert losses.preference.item() == 0
    assert losses.top3_accuracy() == pytest.approx(expected["top3_acc"], abs=1e-6)
    check_gradients(model, expected["grads"], NORM[size], LARGEST[size], ALPHA[size])


@pytest.mark.parametrize("size", SIZES)
def test_a_clip_in_a_padded_batch_has_the_loss_it_has_alone(golden: Any, models: Any, size: str) -> None:
    expected = golden.json(f"s1_{size}")["cases"]["b3_each_alone"]
    model = models(size)
    model.upstream_compat = False
    model.zero_grad()
    batch = golden.batch("b3")
    scores = model.score(batch)
    assert list(scores.counts) == [s["n_targets"] for s in expected["samples"]]
    assert scores.per_clip().tolist() == pytest.approx([s["loss"] for s in expected["samples"]], rel=LOSS)
    losses = model(batch)
    losses.total.backward()
    assert losses.total.item() == pytest.approx(expected["loss_sum"], rel=LOSS)
    check_gradients(model, expected["grads_of_loss_sum"], NORM[size], LARGEST[size], ALPHA[size])
    stored = golden.tensors(f"s1_{size}")
    for b, logits in enumerate(scores.logits[:, :64].split(scores.counts)):
        torch.testing.assert_close(logits, stored[f"b3.single{b}.logits"][0], atol=LOGITS[size], rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_logits_hidden_and_log_probabilities(golden: Any, models: Any, size: str) -> None:
    stored, model = golden.tensors(f"s1_{size}"), models(size)
    model.upstream_compat = False
    scores = model.score(golden.batch("b1"))
    torch.testing.assert_close(scores.logits[None, :, :64], stored["b1.logits"], atol=LOGITS[size], rtol=0)
    torch.testing.assert_close(scores.hidden[None, :, :16], stored["b1.hidden"], atol=LOGITS[size], rtol=0)
    log_probs = -scores.negative_log_probs()[None].double()
    torch.testing.assert_close(log_probs, stored["b1.token_logp"].double(), atol=LOGITS[size], rtol=0)
    model.upstream_compat = True
    padded = model.score(golden.batch("b3")).logits.view(3, 21, -1)[..., :64]
    torch.testing.assert_close(padded, stored["b3.logits_upstream"], atol=LOGITS[size], rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_top3_hits_of_every_token(golden: Any, models: Any, size: str) -> None:
    expected = golden.json(f"s1_{size}")["cases"]["b1_acc"]
    codes = golden.tensors(f"s1_{size}")["acc.codes"]
    batch = replace(golden.batch("b1"), codes=Codes(ids=codes, lengths=(codes.shape[1],)))
    model = models(size)
    model.upstream_compat = False
    losses = model(batch)
    assert losses.total.item() == pytest.approx(expected["loss"], rel=LOSS)
    assert losses.top3_accuracy() == pytest.approx(expected["top3_acc"], abs=1e-6)
    assert model.score(batch).top3()[:-1].int().tolist() == expected["top3_hits_per_token"]  # exact; the last is EOS


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["b1", "b3"])
def test_preference_loss(golden: Any, models: Any, size: str, case: str) -> None:
    expected = golden.json(f"s1_{size}")["cases"][f"dpo_{case}"]
    stored = golden.tensors(f"s1_{size}")
    model = models(size)
    model.upstream_compat = case == "b3"
    model.zero_grad()
    rejected = Codes(
        ids=stored[f"dpo.{case}.reject_codes"], lengths=tuple(stored[f"dpo.{case}.reject_len"].flatten().tolist())
    )
    batch = replace(golden.batch(case), rejected=rejected)
    assert (-model.score(batch, [rejected]).per_clip()).tolist() == pytest.approx(expected["logp_rejected"], rel=LOSS)
    losses = model(batch)
    losses.total.backward()
    assert losses.total.item() == pytest.approx(expected["loss_total"], rel=LOSS)
    # A difference of sums near 200, so absolute; the term itself may be as small as 1e-6.
    assert losses.preference.item() == pytest.approx(expected["dpo_term"], abs=1e-4)
    assert losses.top3_accuracy() == pytest.approx(expected["top3_acc"], abs=1e-6)
    check_gradients(model, expected["grads"], NORM[size], LARGEST[size], ALPHA[size])


@pytest.mark.parametrize("case", ["b1", "b3"])
def test_corrupted_codes_are_upstreams_for_the_same_draws(golden: Any, case: str) -> None:
    stored = golden.tensors("s1_small")
    batch = golden.batch(case)
    rejected = batch.with_rejected([torch.Generator().manual_seed(7)] * len(batch), upstream_compat=True).rejected
    assert torch.equal(rejected.ids, stored[f"dpo.{case}.reject_codes"])
    assert list(rejected.lengths) == stored[f"dpo.{case}.reject_len"].flatten().tolist()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("penalty", [1.0, 1.35])
def test_greedy_decoding_of_one_text(golden: Any, models: Any, size: str, penalty: float) -> None:
    expected = golden.json(f"s1_{size}")["greedy"][f"repetition_penalty={penalty}"]["tokens_with_prompt"]
    batch = golden.batch("b1")
    prompt = golden.tensors(f"s1_{size}")["decode.prompt"]
    codes = generate(
        models(size).model,
        list(batch.phones),
        list(batch.bert),
        prompt,
        max_codes=21,
        top_k=1,
        repetition_penalty=penalty,
    )
    assert codes[0].tolist() == expected  # exact


@pytest.mark.parametrize("size", SIZES)
def test_greedy_decoding_of_three_texts(golden: Any, models: Any, size: str) -> None:
    expected = golden.json(f"s1_{size}")["greedy"]["batch_infer_b3(penalty 1.35)"]["tokens_with_prompt"]
    batch = golden.batch("b3")
    phones = [row[:n] for row, n in zip(batch.phones, batch.phone_lengths, strict=True)]
    bert = [row[:, :n] for row, n in zip(batch.bert, batch.phone_lengths, strict=True)]
    prompt = golden.tensors(f"s1_{size}")["decode.prompt"].expand(3, -1)
    codes = generate(models(size).model, phones, bert, prompt, max_codes=20, top_k=1, repetition_penalty=1.35)
    assert [row.tolist() for row in codes] == expected  # exact


@pytest.mark.parametrize("size", SIZES)
def test_float64_agrees_far_more_tightly(golden: Any, models: Any, size: str) -> None:
    """1e-7 relative for losses, 1e-6 for gradients: the position table is float32 on both sides, and the last bits of
    a sine may differ between math libraries (measured: 4e-9 of the loss)."""
    expected = golden.json("float64")[f"s1_{size}"]
    model = golden.model(size).double()
    for case, batch, compat, total, gradients in (
        ("b1", "b1", False, "loss", "grads"),
        ("b3_upstream", "b3", True, "loss", "grads"),
        ("b3_each_alone", "b3", False, "loss_sum", "grads"),
    ):
        model.upstream_compat = compat
        model.zero_grad()
        data = golden.batch(batch)
        losses = model(replace(data, bert=data.bert.double()))
        losses.total.backward()
        assert losses.total.item() == pytest.approx(expected[case][total], rel=1e-7), case
        check_gradients(model, expected[case][gradients], 1e-6, 1e-6, 1e-4)
