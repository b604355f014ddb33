"""Two training steps against upstream's, in its order of operations, and the same in float64.

Tolerances (golden README, "Tolerances"): step 0: losses 1e-4 relative, gradient norms 1e-3, their largest elements 5e-3
relative to the largest, parameters 1e-6 absolute where the gradient is largest. The norm of a parameter gets 2e-5:
AdamW moves an element by the sign of its gradient, and for a gradient of almost 0 the sign is noise. Step 1: losses
1e-3, gradient norms 5e-2, elements not compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from s2_golden import read_json
from s2_reference import (
    build_discriminator,
    build_generator,
    published_config,
    reference_batch,
    reference_json,
    reference_noise,
    reference_starts,
)
from torch import Tensor, nn

from lastgood_sovits.s2.convolution import frozen_weights
from lastgood_sovits.s2.discriminator import split_judgements
from lastgood_sovits.s2.losses import adversarial_loss, discriminator_loss, feature_loss, kl_loss
from lastgood_sovits.s2.optimization import build_optimizers
from lastgood_sovits.s2.step import StepResult, TrainStep
from lastgood_sovits.s2.synthesizer import slice_frames

TESTED = [pytest.param("v1", marks=pytest.mark.slow), "v2", "v2Pro", pytest.param("v2ProPlus", marks=pytest.mark.slow)]


@dataclass
class Trained:
    """The two steps of one version, with what was left behind after each."""

    results: list[StepResult]
    gradients: list[dict[str, Tensor]]
    parameters: list[dict[str, Tensor]]
    without_gradient: list[str]


def _gradients_and_parameters(networks: dict[str, nn.Module], wanted: dict[str, list[str]]) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = [{}, {}]
    for part, names in wanted.items():
        parameters = dict(networks[part].named_parameters())
        for name in names:
            gradient = parameters[name].grad
            if gradient is not None:
                found[0][name] = gradient.clone()
            found[1][name] = parameters[name].detach().clone()
    return found


@pytest.fixture(scope="module", params=TESTED)
def trained(request: pytest.FixtureRequest) -> Iterator[tuple[dict[str, Any], Trained]]:
    version = request.param
    reference = reference_json(version)
    g, d = build_generator(version), build_discriminator(version)
    config = published_config(version)
    optimizers = build_optimizers(g, d, config.train)
    for optimizer in optimizers:  # the reference was taken before any decay
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = 1e-4 * (0.4 if index else 1.0)
    step = TrainStep(g, d, *optimizers, config)
    out = Trained([], [], [], [])
    for entry in reference["train_steps"]:
        out.results.append(step(reference_batch(version), noise=reference_noise(), starts=reference_starts()))
        wanted = {"g": list(entry["grads_g"]), "d": list(entry["grads_d"])}
        gradients, parameters = _gradients_and_parameters({"g": g, "d": d}, wanted)
        out.gradients.append(gradients)
        out.parameters.append(parameters)
    out.without_gradient = [name for name, parameter in g.named_parameters() if parameter.grad is None]
    yield reference, out


LOSSES = {
    "loss_disc": "discriminator",
    "loss_gen": "adversarial",
    "loss_fm": "feature",
    "loss_mel": "mel",
    "loss_kl": "kl",
    "kl_ssl": "commitment",
    "loss_gen_all": "generator",
}


@pytest.mark.parametrize(("index", "tolerance"), [(0, 1e-4), (1, 1e-3)])
def test_losses_equal_upstream(trained: tuple[dict[str, Any], Trained], index: int, tolerance: float) -> None:
    reference, out = trained
    for theirs, ours in LOSSES.items():
        expected = reference["train_steps"][index][theirs]
        assert float(out.results[index].losses[ours]) == pytest.approx(expected, rel=tolerance), ours


@pytest.mark.parametrize(("index", "tolerance"), [(0, 1e-3), (1, 5e-2)])
def test_gradient_norms_equal_upstream(trained: tuple[dict[str, Any], Trained], index: int, tolerance: float) -> None:
    reference, out = trained
    entry = reference["train_steps"][index]
    for theirs, ours in (("grad_norm_d", "discriminator"), ("grad_norm_g", "generator")):
        assert float(out.results[index].grad_norms[ours]) == pytest.approx(entry[theirs], rel=tolerance), ours
    for name, expected in (entry["grads_g"] | entry["grads_d"]).items():
        if expected is None:
            assert name not in out.gradients[index], f"{name} has a gradient"
        else:
            norm = float(out.gradients[index][name].double().norm())
            # A single element, which golden's README says not to check after a step: a sum that nearly cancels, 2.2 in
            # the first step of v2ProPlus and 0.0002 in the second. It is compared on the scale of its terms.
            slack = 1e-4 if name.endswith("conv_post.bias") else 0.0
            assert norm == pytest.approx(expected["norm"], rel=tolerance, abs=slack), name
    assert out.without_gradient == reference["train_steps"][0]["params_without_grad"]


def test_largest_gradients_of_the_first_step_equal_upstream(trained: tuple[dict[str, Any], Trained]) -> None:
    reference, out = trained
    entry = reference["train_steps"][0]
    for name, expected in (entry["grads_g"] | entry["grads_d"]).items():
        if expected is not None:
            values = torch.tensor(expected["largest8"]["value"])
            actual = out.gradients[0][name].flatten()[expected["largest8"]["flat_index"]]
            assert float((actual - values).abs().max()) <= 5e-3 * float(values.abs().max()), name


def test_parameters_after_the_first_step_equal_upstream(trained: tuple[dict[str, Any], Trained]) -> None:
    reference, out = trained
    entry = reference["train_steps"][0]
    gradients = entry["grads_g"] | entry["grads_d"]
    for name, expected in entry["params_after_step"].items():
        value = out.parameters[0][name].flatten()
        assert float(value.double().norm()) == pytest.approx(expected["norm"], rel=2e-5), name
        if gradients[name] is None:
            continue
        if name in entry["grads_d"]:
            # The stored positions are those of gradients to which upstream's generator step had added its own.
            difference = value[: len(expected["first8"])] - torch.tensor(expected["first8"])
        else:
            largest = gradients[name]["largest8"]["flat_index"]
            difference = value[largest] - torch.tensor(expected["at_largest8_gradients"])
        assert float(difference.abs().max()) <= 1e-6, f"{name}: {difference}"


@pytest.fixture(scope="module")
def pass_in_float64() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, nn.Module]]:
    """The losses of v2 with all layers in float64, and the original discriminator for all of them."""
    b = reference_batch("v2")
    b = replace(b, ssl=b.ssl.double(), spec=b.spec.double(), wave=b.wave.double())
    g, d = build_generator("v2").double(), build_discriminator("v2").double()
    noise, starts = reference_noise().double(), reference_starts()
    made = g(b.ssl, b.spec, b.lengths, b.text, b.text_lengths, noise=noise, starts=starts)
    real = slice_frames(b.wave, starts * 640, 20480)
    with frozen_weights(d):
        judged_real, judged_made = d(real), d(made.wave)
    target, actual = TrainStep(g, d, None, None, published_config("v2")).mels(b.spec, made)  # type: ignore[arg-type]
    losses = {
        "loss_disc": discriminator_loss(*split_judgements(d(torch.cat((real, made.wave.detach()))), 2)),
        "loss_mel": nn.functional.l1_loss(target, actual) * 45,
        "loss_kl": kl_loss(made.z_p, made.logs_q, made.m_p, made.logs_p, made.mask),
        "loss_fm": feature_loss(judged_real, judged_made),
        "loss_gen": adversarial_loss(judged_made),
    }
    return read_json("float64.json")["s2_v2"], losses, {"g": g, "d": d}


def test_losses_and_gradients_in_float64_equal_upstreams(
    pass_in_float64: tuple[dict[str, Any], dict[str, Tensor], dict[str, nn.Module]],
) -> None:
    """Tolerance: losses 1e-6, gradient norms 1e-4 relative: the losses themselves are float32, as upstream's are."""
    reference, losses, networks = pass_in_float64
    for name, loss in losses.items():
        assert float(loss.detach()) == pytest.approx(reference[name], rel=1e-6), name
        key, network = ("grads_d", "d") if name == "loss_disc" else (f"grads_of_{name}", "g")
        parameters = dict(networks[network].named_parameters())
        for parameter in parameters.values():
            parameter.grad = None
        loss.backward(retain_graph=True)
        for parameter_name, expected in reference[key].items():
            gradient = parameters[parameter_name].grad
            norm = 0.0 if gradient is None else float(gradient.norm())
            expected_norm = 0.0 if expected is None else expected["norm"]
            assert norm == pytest.approx(expected_norm, rel=1e-4, abs=1e-9), f"{name}: {parameter_name}"
