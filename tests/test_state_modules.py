"""Modules continue bit for bit, wrapped or not, whatever their state_dict hands out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lastgood
from lastgood import catalog
from roundtrip import Objects, bits, hook_state_dict, round_trip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.body(features)


def eager(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def nested() -> nn.Module:
    model = Net()
    model.body[0] = eager(model.body[0])
    model.body = eager(model.body)
    return model


def with_opt(model: Any) -> Objects:
    return {"model": model, "opt": torch.optim.Adam(model.parameters(), lr=0.1)}


def train(objects: Objects) -> torch.Tensor:
    objects["opt"].zero_grad()
    loss = objects["model"](torch.randn(5, 3)).square().mean()
    loss.backward()
    objects["opt"].step()
    return loss.detach()


WRAPPINGS: dict[str, Callable[[], Any]] = {
    "bare": Net,
    "compiled": lambda: eager(Net()),
    "submodules compiled": nested,
    "compiled twice": lambda: eager(nested()),
    "DataParallel": lambda: nn.DataParallel(Net()),
    "compiled DataParallel": lambda: eager(nn.DataParallel(Net())),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_wrapped_module_is_saved_as_the_bare_one(tmp_path: Path, wrapping: str) -> None:
    wrapped = WRAPPINGS[wrapping]
    round_trip(tmp_path / "own", lambda: with_opt(wrapped()), train)
    seen = {}
    for name, make in (("bare", Net), ("wrapped", wrapped)):
        objects = with_opt(make())
        train(objects)
        with lastgood.Checkpointer(tmp_path / name, **objects) as ckpt:
            ckpt.save(1)
        (entry,) = catalog.committed(tmp_path / name)
        manifest = catalog.check_full(entry)
        seen[name] = (set(manifest.tensors), set(manifest.objects["opt"]["state"]))
    assert seen["bare"] == seen["wrapped"]
    bare, other = with_opt(Net()), with_opt(wrapped())
    with lastgood.Checkpointer(tmp_path / "bare", **other) as ckpt:
        ckpt.restore()
    with lastgood.Checkpointer(tmp_path / "bare", **bare) as ckpt:
        ckpt.restore()
    for one, two in zip(bare["model"].parameters(), other["model"].parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(bare["opt"].state[one]["exp_avg"], other["opt"].state[two]["exp_avg"])


class Forwarding(nn.Module):
    """A wrapper of somebody else's, which passes on every attribute that it does not have."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.rand(1))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.inner(features) * self.scale


def test_a_wrapper_that_forwards_attributes_keeps_its_own_parameters(tmp_path: Path) -> None:
    round_trip(tmp_path, lambda: with_opt(Forwarding(eager(Net()))), train)
    (entry,) = catalog.committed(tmp_path)
    assert "model.scale" in catalog.read_manifest(entry).tensors


class Extra(nn.Module):
    """Extra state of whatever kind."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.value = value

    def get_extra_state(self) -> Any:
        return copy.deepcopy(self.value)

    def set_extra_state(self, state: Any) -> None:
        self.value = state


@pytest.mark.parametrize(
    ("saved", "fresh"),
    [
        ({"calls": 3, 7: (1, None)}, {}),
        (torch.arange(5, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)),
        (torch.arange(5, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)),
        (torch.arange(5, dtype=torch.uint8), None),
        (None, torch.zeros(2)),
        ({"scale": torch.rand(3)}, {"scale": torch.zeros(9)}),
        ([torch.rand(3), "x"], []),
    ],
)
def test_extra_state_of_any_kind_and_size(tmp_path: Path, saved: Any, fresh: Any) -> None:
    round_trip(tmp_path, lambda: {"m": nn.Sequential(Extra(saved))}, rebuild=lambda: {"m": nn.Sequential(Extra(fresh))})


class Hooked(nn.Module):
    """Its state_dict hands out computed tensors, under other names, and it undoes that when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))
        self.bias = nn.Parameter(torch.randn(3))
        hook_state_dict(self, self._saving)
        # Its name begins without the underscore since torch 2.5.
        self._register_load_state_dict_pre_hook(self._loading, with_module=True)

    @staticmethod
    def _saving(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[prefix + "doubled"] = state.pop(prefix + "weight") * 2
        state[prefix + "turned"] = state.pop(prefix + "bias").reshape(3, 1)
        state[prefix + "remark"] = "from a hook"

    @staticmethod
    def _loading(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        assert state.pop(prefix + "remark") == "from a hook"
        state[prefix + "weight"] = state.pop(prefix + "doubled") / 2
        state[prefix + "bias"] = state.pop(prefix + "turned").reshape(3)


def test_computed_tensors_of_state_dict_hooks(tmp_path: Path) -> None:
    first, second = round_trip(tmp_path, lambda: {"m": nn.Sequential(Hooked(), nn.Linear(3, 2))})
    assert bits(first["m"][0].weight) == bits(second["m"][0].weight)
    assert bits(first["m"][0].bias) == bits(second["m"][0].bias)


class Older(nn.Module):
    """A module that overrides how it is loaded hears of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.total = 0.0

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.total = float(state_dict[prefix + "weight"].detach().sum())


def test_a_module_that_overrides_loading_hears_of_it(tmp_path: Path) -> None:
    _, second = round_trip(tmp_path, lambda: {"m": nn.Sequential(Older())})
    assert second["m"][0].total == float(second["m"][0].weight.detach().sum())


def test_parametrized_and_normalised_layers(tmp_path: Path) -> None:
    def make() -> Objects:
        model = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
            nn.utils.spectral_norm(nn.Linear(4, 4)),
            nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
        )
        return with_opt(model)

    round_trip(tmp_path, make, train)


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def test_tied_weights_stay_tied_and_are_saved_once(tmp_path: Path) -> None:
    def step(objects: Objects) -> None:
        model = objects["model"]
        objects["opt"].zero_grad()
        model.head(model.embedding(torch.randint(4, (6,)))).square().sum().backward()
        objects["opt"].step()

    _, second = round_trip(tmp_path, lambda: with_opt(Tied()), step)
    assert second["model"].head.weight is second["model"].embedding.weight
    (entry,) = catalog.committed(tmp_path)
    assert len([n for n in catalog.read_manifest(entry).tensors if n.startswith("model.")]) == 1


def test_tied_at_saving_and_apart_at_restoring_both_get_the_value(tmp_path: Path) -> None:
    round_trip(tmp_path, lambda: {"m": Tied()}, rebuild=lambda: {"m": Tied(False)})


@pytest.mark.parametrize("across", [False, True])
def test_apart_at_saving_and_tied_at_restoring_is_refused(tmp_path: Path, across: bool) -> None:
    def make(tied: bool) -> Objects:
        model = Tied(tied)
        return {"a": model.embedding, "b": model.head} if across else {"m": model}

    with lastgood.Checkpointer(tmp_path, **make(False)) as ckpt:
        ckpt.save(1)
    with (
        lastgood.Checkpointer(tmp_path, **make(True)) as ckpt,
        pytest.raises(lastgood.MismatchError, match="one tensor here, and were saved with different values"),
    ):
        ckpt.restore()


class Views(nn.Module):
    """Buffers that share memory with each other in every way."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(4, 6)
        self.register_buffer("base", base)
        self.register_buffer("first_row", base[0])
        self.register_buffer("middle", base[1:3, 2:4])
        self.register_buffer("turned", base.t())
        self.register_buffer("flat", base.view(-1))
        self.register_buffer("as_int", base.view(torch.int32))
        self.register_buffer("spread", torch.randn(3, 1).expand(3, 4))
        z = torch.randn(3, dtype=torch.complex64)
        self.register_buffer("z", z)
        self.register_buffer("z_conj", z.conj())
        self.register_buffer("z_imag_negated", z.conj().imag)
        self.register_buffer("z_imag", z.imag)


def test_overlapping_views_keep_their_values_and_their_memory(tmp_path: Path) -> None:
    _, second = round_trip(tmp_path, lambda: {"m": Views()})
    model = second["m"]
    model.base.zero_()
    assert not model.turned.any() and not model.middle.any() and not model.flat.any()


def test_a_spread_out_buffer_takes_no_differing_values(tmp_path: Path) -> None:
    def make(spread: bool) -> Objects:
        model = nn.Module()
        model.register_buffer("b", torch.zeros(1, 2).expand(3, 2) if spread else torch.randn(3, 2))
        return {"m": model}

    with lastgood.Checkpointer(tmp_path, **make(False)) as ckpt:
        ckpt.save(1)
    with (
        lastgood.Checkpointer(tmp_path, **make(True)) as ckpt,
        pytest.raises(lastgood.MismatchError, match=r"m\.b.*expand"),
    ):
        ckpt.restore()


def test_memory_formats(tmp_path: Path) -> None:
    def make() -> Objects:
        model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        model.weight2 = nn.Parameter(torch.randn(4, 6)[:, ::2].t())
        return {"m": model}

    _, second = round_trip(tmp_path, make)
    assert second["m"].weight.is_contiguous(memory_format=torch.channels_last)


def test_parameters_made_in_inference_mode(tmp_path: Path) -> None:
    def make() -> Objects:
        with torch.inference_mode():
            return {"m": nn.Linear(2, 2), "shadow": {"w": torch.rand(3)}}

    round_trip(tmp_path, make, rebuild=lambda: {"m": nn.Linear(2, 2), "shadow": {}})
    round_trip(tmp_path / "both", make)


def test_a_lazy_module_is_refused_until_it_has_a_shape(tmp_path: Path) -> None:
    model = nn.LazyLinear(3)
    with pytest.raises(lastgood.LastGoodError, match=r"m\.weight is a lazy parameter.*one forward pass"):
        lastgood.Checkpointer(tmp_path, m=model)
    model(torch.zeros(1, 2))
    with lastgood.Checkpointer(tmp_path, m=model) as ckpt:
        ckpt.save(1)


def test_a_gan_is_of_one_step(tmp_path: Path) -> None:
    def make() -> Objects:
        g, d = nn.Linear(3, 3), eager(nn.Linear(3, 1))
        opt_g = torch.optim.Adam(g.parameters(), lr=0.1)
        return {"g": g, "d": d, "opt_g": opt_g, "opt_d": torch.optim.RMSprop(d.parameters(), lr=0.1)}

    def step(objects: Objects) -> None:
        fake = objects["g"](torch.randn(4, 3))
        (objects["d"](fake.detach()).mean() - objects["d"](torch.randn(4, 3)).mean()).backward()
        objects["opt_d"].step()
        objects["d"].zero_grad()
        (-objects["d"](fake).mean()).backward()
        objects["opt_g"].step()
        objects["g"].zero_grad()
        objects["d"].zero_grad()

    round_trip(tmp_path, make, step)


def test_a_gan_changed_while_it_is_written_is_still_of_one_step(tmp_path: Path) -> None:
    g, d = nn.Linear(50, 50), nn.Linear(50, 50)
    with lastgood.Checkpointer(tmp_path, g=g, d=d, keep=lastgood.Keep(last=9)) as ckpt:
        for step in range(1, 6):
            with torch.no_grad():
                for parameter in [*g.parameters(), *d.parameters()]:
                    parameter.fill_(step)
            ckpt.save(step)
    with lastgood.Checkpointer(tmp_path, g=g, d=d, keep=lastgood.Keep(last=9)) as ckpt:
        for step in (3, 5, 1):
            assert ckpt.restore(step=step) == step
            assert {v for p in [*g.parameters(), *d.parameters()] for v in p.reshape(-1).tolist()} == {float(step)}
