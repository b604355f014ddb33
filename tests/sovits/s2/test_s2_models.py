"""Generator and discriminator against upstream's values, for all versions.

Tolerances (golden README, "Tolerances"): tensors 1e-4 absolute; whole sums 1e-5 of the sum of magnitudes; codes exact.
"""

import pytest
import torch
from s2_golden import assert_close, fixed_input, read_json
from s2_reference import (
    build_discriminator,
    build_generator,
    published_config,
    reference_batch,
    reference_json,
    reference_noise,
    reference_starts,
    reference_tensors,
    symbols,
)
from torch import Tensor

from lastgood_sovits.s2.config import VERSIONS
from lastgood_sovits.s2.discriminator import Discriminator
from lastgood_sovits.s2.encoders import length_mask
from lastgood_sovits.s2.step import TrainStep
from lastgood_sovits.s2.synthesizer import Synthesizer, slice_frames

ATOL = 1e-4
TESTED = [pytest.param("v1", marks=pytest.mark.slow), "v2", "v2Pro", pytest.param("v2ProPlus", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=TESTED)
def case(request: pytest.FixtureRequest) -> tuple[str, Synthesizer]:
    return request.param, build_generator(request.param)


def assert_golden(version: str, name: str, actual: Tensor) -> None:
    expected, stats = reference_tensors(version)[name], reference_json(version)["stats"][name]
    assert list(actual.shape) == stats["shape"], name
    total = float(actual.double().sum())
    assert abs(total - stats["sum"]) <= 1e-5 * stats["abs_sum"] + ATOL, f"{name}: sum {total}, expected {stats['sum']}"
    if "stored_slice" in stats:
        assert stats["stored_slice"] == ":, :64"
        actual = actual[:, :64]
    assert_close(actual, expected, name, ATOL)


@pytest.mark.parametrize("version", VERSIONS)
def test_state_dict_has_the_published_keys_shapes_and_order(version: str) -> None:
    with torch.device("meta"):
        config = published_config(version).model
        networks = {"G": Synthesizer(config), "D": Discriminator(config.periods)}
    for letter, network in networks.items():
        reference = read_json(f"keys/{letter}_{version}.json")
        state = network.state_dict()
        assert list(state) == list(reference["keys"])
        for key, (shape, dtype) in reference["keys"].items():
            assert (list(state[key].shape), str(state[key].dtype)) == (shape, f"torch.{dtype}"), key
        assert [name for name, _ in network.named_buffers()] == reference["buffers"]


@torch.no_grad()
def test_every_part_equals_upstream(case: tuple[str, Synthesizer]) -> None:
    version, g = case
    batch = reference_batch(version)
    mask = length_mask(batch.lengths, 40)
    assert_golden(version, "ref_enc_out", g.ref_enc(batch.spec[:, : g.style_bins], mask))
    ge, ge_text = g.voice(batch.spec, mask, batch.sv)
    if batch.sv is not None:
        assert_golden(version, "sv_emb_out", g.sv_emb(batch.sv))
        assert_golden(version, "ge", ge)
        assert_golden(version, "ge512", ge_text)
    projected = g.ssl_proj(batch.ssl)
    assert_golden(version, "ssl_proj_out", projected)
    codes = g.quantizer.encode(projected)
    assert torch.equal(codes, reference_tensors(version)["codes"][0])
    assert torch.equal(g.extract_codes(batch.ssl), reference_tensors(version)["extract_latent"])
    assert_golden(version, "quantized", g.quantizer.decode(codes))
    content, commitment = g._content(batch.ssl, batch.lengths)
    assert float(commitment) == 0
    x, mean, log_std, same_mask = g.enc_p(content, mask, batch.text, batch.text_lengths, ge_text)
    for name, value in (("x", x), ("m_p", mean), ("logs_p", log_std), ("mask", same_mask)):
        assert_golden(version, f"enc_p.{name}", value)
    z, mean_q, log_std_q = g.enc_q(batch.spec, mask, ge, reference_noise())
    for name, value in (("m", mean_q), ("logs", log_std_q), ("z", z)):
        assert_golden(version, f"enc_q.{name}", value)
    assert_golden(version, "flow.forward", g.flow(z, mask, ge))
    assert_golden(version, "flow.reverse_of_m_p", g.flow(mean, mask, ge, reverse=True))
    assert_close(g.flow(g.flow(z, mask, ge), mask, ge, reverse=True), z, "flow there and back", ATOL)
    assert_golden(version, "dec.wave", g.dec(slice_frames(z, reference_starts(), 32), ge))


@torch.no_grad()
def test_forward_equals_its_parts_and_the_mels_upstreams(case: tuple[str, Synthesizer]) -> None:
    version, g = case
    b = reference_batch(version)
    made = g(b.ssl, b.spec, b.lengths, b.text, b.text_lengths, b.sv, noise=reference_noise(), starts=reference_starts())
    assert_golden(version, "dec.wave", made.wave)
    assert_golden(version, "flow.forward", made.z_p)
    step = TrainStep(g, g, None, None, published_config(version))  # type: ignore[arg-type]
    target, actual = step.mels(b.spec, made)
    assert_golden(version, "y_mel", target)
    assert_golden(version, "y_hat_mel", actual)


@pytest.mark.parametrize("version", TESTED)
@torch.no_grad()
def test_discriminators_equal_upstream(version: str) -> None:
    reference, tensors = reference_json(version), reference_tensors(version)
    real = slice_frames(reference_batch(version).wave, reference_starts() * 640, 20480)
    judgements = build_discriminator(version)(torch.cat((real, tensors["dec.wave"])))
    assert len(judgements) == len(reference["fmap"])
    for index, ((scores, features), layers) in enumerate(zip(judgements, reference["fmap"], strict=True)):
        assert_golden(version, f"D.{index}.real", scores[:2])
        assert_golden(version, f"D.{index}.gen", scores[2:])
        for feature, layer in zip(features, layers, strict=True):
            assert list(feature[:2].shape) == layer["shape"]
            for part, prefix in ((feature[:2], "real"), (feature[2:], "gen")):
                slack = 1e-5 * layer[f"{prefix}_abs_sum"]
                assert abs(float(part.double().sum()) - layer[f"{prefix}_sum"]) <= slack
                assert abs(float(part.double().abs().sum()) - layer[f"{prefix}_abs_sum"]) <= slack


def test_decode_equals_upstream(case: tuple[str, Synthesizer]) -> None:
    version, g = case
    codes = fixed_input("s2.decode.codes", (1, 1, 18), "int:1024")[0]
    text = fixed_input("s2.decode.text", (1, 12), symbols(version))
    refer = [fixed_input(f"s2.decode.refer{i}", (1, 1025, n), "pos") * 4 for i, n in ((0, 30), (1, 36))]
    vectors = [fixed_input(f"s2.decode.sv{i}", (1, 20480)) for i in (0, 1)] if g.config.is_pro else []
    waves = {
        "decode.wave_one_ref": g.decode(codes, text, refer[:1], vectors[:1], noise_scale=0),
        "decode.wave_two_refs": g.decode(codes, text, refer, vectors, noise_scale=0),
        "decode.wave_speed_1.25": g.decode(codes, text, refer[:1], vectors[:1], noise_scale=0, speed=1.25),
    }
    for name, wave in waves.items():
        assert_golden(version, name, wave)


def test_infer_equals_upstream_where_upstream_can(case: tuple[str, Synthesizer]) -> None:
    version, g = case
    b = reference_batch(version)
    sv = None if b.sv is None else b.sv[:1]
    wave = g.infer(b.ssl[:1], b.spec[:1], b.lengths[:1], b.text[:1], sv, noise_scale=0)
    assert torch.isfinite(wave).all() and wave.shape == (1, 1, 25600)
    if reference_json(version)["infer"] == "ok":
        assert_golden(version, "infer.wave", wave)
