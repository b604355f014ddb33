"""Weight-normalised convolutions against torch's own, and weights held constant."""

import warnings

import pytest
import torch
from torch import nn

from lastgood_sovits.s2.attention import _skew, _unskew
from lastgood_sovits.s2.convolution import Conv1d, Conv2d, ConvTranspose1d, WeightNorm, frozen_weights

CASES = [
    (Conv1d(4, 6, 3, padding=2, dilation=2, groups=2), nn.Conv1d(4, 6, 3, padding=2, dilation=2, groups=2), (2, 4, 11)),
    (Conv2d(2, 3, (5, 1), stride=(3, 1), padding=(2, 0)), nn.Conv2d(2, 3, (5, 1), (3, 1), (2, 0)), (2, 2, 9, 3)),
    (ConvTranspose1d(4, 2, 8, stride=2, padding=3), nn.ConvTranspose1d(4, 2, 8, 2, 3), (2, 4, 7)),
]


@pytest.mark.parametrize(("ours", "plain", "shape"), CASES)
def test_equals_torchs_weight_norm_with_its_keys_and_gradients(
    ours: WeightNorm, plain: nn.Module, shape: tuple[int, ...]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the form that the published weights have
        theirs = nn.utils.weight_norm(plain)
    theirs.load_state_dict(ours.state_dict())
    assert list(theirs.state_dict()) == list(ours.state_dict())
    x = torch.randn(shape)
    assert torch.equal(ours(x), theirs(x))
    for module in (ours, theirs):
        module.zero_grad()
        module(x).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def test_a_fresh_layer_has_the_weights_that_torch_would_start_with() -> None:
    torch.manual_seed(0)
    plain = nn.Conv1d(3, 5, 7)
    torch.manual_seed(0)
    assert torch.allclose(Conv1d(3, 5, 7).weight, plain.weight, atol=1e-7)


def test_no_warning_is_given() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Conv1d(2, 2, 3)(torch.zeros(1, 2, 5))


def test_frozen_weights_pass_gradients_to_the_input_only_and_are_released() -> None:
    net = nn.Sequential(Conv1d(2, 2, 3), nn.Conv1d(2, 1, 1))
    net[1].weight.requires_grad_(False)
    x = torch.randn(1, 2, 9, requires_grad=True)
    expected = torch.autograd.grad(net(x).sum(), x)[0]
    with pytest.raises(ZeroDivisionError), frozen_weights(net):
        net(x).sum().backward()
        raise ZeroDivisionError
    assert x.grad is not None and torch.equal(x.grad, expected)
    assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == [True, True, True, False, True]
    with torch.no_grad():
        net[0].weight_g.mul_(2)
    assert not torch.equal(torch.autograd.grad(net(x).sum(), x)[0], expected), "the held weight must be gone"


@pytest.mark.parametrize("length", [1, 2, 4, 5, 12])
def test_bands_and_matrices_convert_into_each_other(length: int) -> None:
    reach = 4
    band = torch.randn(2, 3, length, 2 * reach + 1)
    matrix = _skew(band, length)
    for i in range(length):
        for j in range(length):
            near = abs(i - j) <= reach
            expected = band[:, :, i, j - i + reach] if near else torch.zeros(2, 3)
            assert torch.equal(matrix[:, :, i, j], expected)
    collected = _unskew(matrix, reach)
    for i in range(length):
        for r in range(2 * reach + 1):
            inside = 0 <= i + r - reach < length
            assert torch.equal(collected[:, :, i, r], band[:, :, i, r] if inside else torch.zeros(2, 3))
