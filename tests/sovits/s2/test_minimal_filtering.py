"""Convolutions by minimal filtering against the exact ones, in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lastgood_sovits.s2 import minimal_filtering
from lastgood_sovits.s2.convolution import Conv1d, Conv2d, frozen_weights

TOLERANCE = 5e-6
"""Of the length of the whole result; the plain convolution in float32 is 2e-7 to 8e-7 from the exact one."""


def assert_near(actual: Tensor, exact: Tensor) -> None:
    assert actual.shape == exact.shape
    assert float((actual.double() - exact).detach().norm() / exact.detach().norm()) < TOLERANCE


@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("width", [None, 1, 3])
def test_result_and_gradients_are_those_of_the_plain_convolution(height: int, width: int | None) -> None:
    generator = torch.Generator().manual_seed(height)
    tail = () if width is None else (width,)
    x = torch.randn(2, 6, height, *tail, generator=generator)
    weight = torch.randn(7, 6, 5, *(1 for _ in tail), generator=generator)
    bias = torch.randn(7, generator=generator)
    grad = torch.randn(2, 7, height, *tail, generator=generator)
    ours = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    made = minimal_filtering.convolve(ours[0], minimal_filtering.factors(ours[1]), ours[2])
    plain = F.conv1d(*exact, padding=2) if width is None else F.conv2d(*exact, padding=(2, 0))
    assert_near(made, plain)
    made.backward(grad)
    plain.backward(grad.double())
    for tensor, reference in zip(ours, exact, strict=True):
        assert tensor.grad is not None and reference.grad is not None
        assert_near(tensor.grad, reference.grad)


@pytest.mark.parametrize("layer", [Conv1d(128, 128, 5, padding=2), Conv2d(128, 128, (5, 1), padding=(2, 0))])
def test_wide_layers_use_it_and_frozen_weights_are_mapped_once(
    layer: Conv1d | Conv2d, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = []
    real = minimal_filtering.factors
    monkeypatch.setattr(minimal_filtering, "factors", lambda weight: mapped.append(1) or real(weight))
    x = torch.randn(2, 128, 9, *([3] if isinstance(layer, Conv2d) else []), requires_grad=True)
    with frozen_weights(layer):
        (layer(x) + layer(x)).sum().backward()
    assert len(mapped) == 1 and layer.weight_v.grad is None and x.grad is not None
    with torch.no_grad():
        layer.weight_g.mul_(2)
    layer(x).sum().backward()
    assert len(mapped) == 2 and layer.weight_v.grad is not None


def test_it_is_for_wide_float32_layers_on_the_processor_only() -> None:
    wide = torch.zeros(128, 128, 5)
    assert minimal_filtering.fits(torch.zeros(1, 128, 9), wide)
    assert not minimal_filtering.fits(torch.zeros(1, 128, 9, device="meta"), wide)
    assert not minimal_filtering.fits(torch.zeros(1, 128, 9, dtype=torch.bfloat16), wide)
    assert not minimal_filtering.fits(torch.zeros(1, 128, 9), wide[:, :64])
    assert not minimal_filtering.fits(torch.zeros(1, 128, 9), wide[..., :3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not minimal_filtering.fits(torch.zeros(1, 128, 9), wide)


def test_other_strides_dilations_and_groups_keep_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minimal_filtering, "convolve", None)
    x = torch.randn(1, 256, 20)
    Conv1d(256, 256, 5, padding=2, stride=2)(x)
    Conv1d(256, 256, 5, padding=4, dilation=2)(x)
    Conv1d(256, 256, 5, padding=2, groups=2)(x)
    Conv1d(256, 256, 5, padding=1)(x)
    Conv2d(256, 256, (5, 1), stride=(3, 1), padding=(2, 0))(x.unsqueeze(-1))
