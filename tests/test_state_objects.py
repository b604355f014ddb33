"""Schedulers, scalers, averages, samplers, generators and plain values continue bit for bit."""

from __future__ import annotations

import collections
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import lastgood
from roundtrip import Objects, difference, round_trip

Opt = torch.optim.Optimizer


def train(objects: Objects) -> tuple[torch.Tensor, list[float]]:
    model, opt = objects["model"], objects["opt"]
    opt.zero_grad()
    loss = model(torch.randn(5, 3)).square().mean()
    loss.backward()
    opt.step()
    scheduler = objects.get("sched")
    if isinstance(scheduler, schedulers.ReduceLROnPlateau):
        scheduler.step(float(loss.detach()))
    elif scheduler is not None:
        scheduler.step()
    return loss.detach(), [float(group["lr"]) for group in opt.param_groups]


class Schedule:
    """A callable object: torch saves its attributes."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return 0.9**epoch


SCHEDULERS: dict[str, Callable[[Opt], Any]] = {
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 4, 4, 5]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=5),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 7),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2, T_mult=2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2, mode="exp_range", gamma=0.9),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.3, total_steps=9),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, cooldown=1),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR_object": lambda o: schedulers.LambdaLR(o, Schedule()),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.95),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 4), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=5),
}


def scheduled(name: str, lr: Any = 0.1) -> Objects:
    model = nn.Linear(3, 2)
    opt = torch.optim.Adam(model.parameters(), lr=lr)
    return {"model": model, "opt": opt, "sched": SCHEDULERS[name](opt)}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_continues(tmp_path: Path, name: str) -> None:
    if any(map(callable, scheduled(name)["sched"].state_dict().values())):
        pytest.skip("this torch keeps a function in the scheduler's state")
    round_trip(tmp_path, lambda: scheduled(name), train)


@pytest.mark.parametrize("name", ["OneCycleLR", "SequentialLR", "LambdaLR", "CosineAnnealingLR"])
def test_schedulers_of_a_learning_rate_that_is_a_tensor(tmp_path: Path, name: str) -> None:
    """Whatever the order of registration."""
    if name == "SequentialLR" and torch.__version__ < "2.7":
        pytest.skip("this torch changes the base learning rate of a first scheduler with the learning rate")
    round_trip(
        tmp_path,
        lambda: scheduled(name, torch.tensor(0.1)),
        train,
        rebuild=lambda: dict(reversed(scheduled(name, torch.tensor(0.1)).items())),
    )


def test_a_scheduler_of_every_kind_in_torch_is_tried() -> None:
    there = {n for n, k in vars(schedulers).items() if isinstance(k, type) and issubclass(k, schedulers.LRScheduler)}
    assert there <= {name.split("_")[0] for name in SCHEDULERS} | {"LRScheduler", "_LRScheduler"}


@pytest.mark.parametrize("enabled", [True, False])
def test_the_gradient_scaler(tmp_path: Path, enabled: bool) -> None:
    def make() -> Objects:
        model = nn.Linear(3, 2)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2, enabled=enabled)
        return {"model": model, "opt": torch.optim.SGD(model.parameters(), lr=0.1), "scaler": scaler}

    def step(objects: Objects) -> float:
        scaler = objects["scaler"]
        loss = objects["model"](torch.randn(5, 3)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(objects["opt"])
        scaler.update()
        objects["opt"].zero_grad()
        return scaler.get_scale()

    round_trip(tmp_path, make, step)


def test_averaged_models_and_a_shadow_by_hand(tmp_path: Path) -> None:
    def make() -> Objects:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        shadow = {name: value.detach().clone() for name, value in model.named_parameters()}
        return {
            "model": model,
            "opt": torch.optim.Adam(model.parameters(), lr=0.1),
            "swa": AveragedModel(model),
            "ema": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
            "shadow": shadow,
        }

    def step(objects: Objects) -> Any:
        result = train(objects)
        objects["swa"].update_parameters(objects["model"])
        objects["ema"].update_parameters(objects["model"])
        with torch.no_grad():
            for name, parameter in objects["model"].named_parameters():
                objects["shadow"][name].lerp_(parameter, 0.1)
        return result

    round_trip(tmp_path, make, step)


def test_a_shadow_that_is_the_model_itself_stays_it(tmp_path: Path) -> None:
    def make() -> Objects:
        model = nn.Linear(2, 2)
        return {"shadow": dict(model.state_dict()), "model": model}

    _, second = round_trip(tmp_path, make)
    with torch.no_grad():
        second["model"].weight.fill_(7)
    assert (second["shadow"]["weight"] == 7).all()


class Sampler:
    """As torchdata's stateful loaders and samplers do it: nested state, None, bytes, tensors, numbers as keys."""

    def __init__(self) -> None:
        self.order = torch.randperm(10)
        self.at = 0
        self.generator = torch.Generator().manual_seed(random.randrange(1000))
        self.workers: dict[Any, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "order": self.order, "g": self.generator.get_state(), "_snapshot": self.workers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.order, self.workers = state["at"], state["order"], state["_snapshot"]
        self.generator.set_state(state["g"])

    def take(self, _: Objects) -> tuple[int, float]:
        self.at = (self.at + 1) % 10
        self.workers = {0: {"raw": b"\x00", "worker": None}, "steps": collections.Counter({1: self.at})}
        return int(self.order[self.at]), float(torch.rand((), generator=self.generator))


def test_samplers_and_loaders_with_state(tmp_path: Path) -> None:
    round_trip(tmp_path, lambda: {"sampler": Sampler()}, lambda o: o["sampler"].take(o))


def test_generators(tmp_path: Path) -> None:
    def make() -> Objects:
        return {"g": torch.Generator().manual_seed(random.randrange(1000))}

    round_trip(tmp_path, make, lambda o: torch.rand(3, generator=o["g"]))


GENERATORS: dict[str, tuple[Callable[[int], Any], Callable[[Any], Any]]] = {
    "python": (random.Random, lambda g: (g.random(), g.gauss(0, 1))),
    "python's subclass": (type("Mine", (random.Random,), {}), lambda g: g.sample(range(9), 3)),
    "numpy": (np.random.default_rng, lambda g: (g.random(), g.permutation(9), g.integers(9, dtype=np.int32))),
    "numpy, MT19937": (lambda seed: np.random.Generator(np.random.MT19937(seed)), lambda g: g.standard_normal(3)),
    "numpy, Philox": (lambda seed: np.random.Generator(np.random.Philox(seed)), lambda g: g.standard_normal(3)),
    "numpy's older": (np.random.RandomState, lambda g: (g.randn(), g.permutation(9))),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_that_are_not_torchs(tmp_path: Path, kind: str) -> None:
    build, draw = GENERATORS[kind]
    round_trip(tmp_path, lambda: {"g": build(random.randrange(1000))}, lambda o: draw(o["g"]))
    (tensor,) = json.loads((tmp_path / "step-00000003/manifest.json").read_bytes())["manifest"]["tensors"].values()
    assert tensor[1][0] % 4096 == 0  # The same at every save, however many digits the numbers have.


def test_a_generator_of_another_class_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    with lastgood.Checkpointer(tmp_path, g=random.Random(1), n=[1]) as ckpt:
        ckpt.save(1)
    other, numbers = np.random.default_rng(2), [2]
    before = other.bit_generator.state
    with lastgood.Checkpointer(tmp_path, g=other, n=numbers) as ckpt:
        with pytest.raises(lastgood.MismatchError, match=r"g is a random\.Random in .* and a numpy.*PCG64 here"):
            ckpt.restore()
        assert other.bit_generator.state == before and numbers == [2]
    with lastgood.Checkpointer(tmp_path, g=other, n=numbers) as ckpt:
        assert ckpt.restore(strict=False) == 1
        assert other.bit_generator.state == before and numbers == [1]


def test_a_generator_without_a_state_or_inside_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lastgood.LastGoodError, match=r"SystemRandom cannot be saved"):
        lastgood.Checkpointer(tmp_path, g=random.SystemRandom())
    with pytest.raises(lastgood.LastGoodError, match=r"s\.g: .*Generator cannot be saved as a part of another value"):
        lastgood.Checkpointer(tmp_path, s={"g": np.random.default_rng(1)})


VALUES: dict[str, Any] = {
    "nothing": None,
    "yes": True,
    "count": 3,
    "huge": -(2**300),
    "loss": 0.1 + 0.2,
    "bad": float("inf"),
    "worse": float("nan"),
    "minus_zero": -0.0,
    "text": "ä\x00\n\ud800 語",
    "raw": b"\x00\xff",
    "array": bytearray(b"12"),
    "pair": (1, (2, [3])),
    "by_number": {1: "a", 2: {3: None}, (4, 5): "tuple", None: 0, 1.5: 2, False: 1},
    "reserved": {"$": "tensor", "v": "x"},
    "counter": collections.Counter("abba"),
    "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
    "default": collections.defaultdict(list, {"a": [1]}),
    "recent": collections.deque([1, 2], maxlen=2),
    "seen": {1, 2, 3},
    "frozen": frozenset({("a", 1)}),
    "range": range(1, 9, 2),
    "dtype": torch.float16,
    "size": torch.Size([2, 3]),
    "device": torch.device("cpu"),
    "complex": complex(float("-inf"), -0.0),
    "np_float": np.float64(0.1),
    "np_small": np.float16(0.1),
    "np_int": np.uint64(2**64 - 1),
    "np_bool": np.bool_(True),
    "np_complex": np.complex128(1 + 2j),
    "np_array": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "np_int_array": np.array([1, -2], dtype=np.int8),
    "np_empty": np.zeros((0, 3)),
    "np_zero_d": np.array(3.0),
    "np_bools": np.array([True, False]),
    "tensor": torch.arange(3.0),
    "tensor_0d": torch.tensor(7),
    "tensors": {"a": [torch.ones(2), (torch.zeros(0, 3), None)]},
    "path": Path("a/b"),
}


def test_plain_values_of_all_kinds(tmp_path: Path) -> None:
    round_trip(tmp_path, lambda: dict(VALUES), rebuild=lambda: dict.fromkeys(VALUES))


def test_containers_are_restored_in_place(tmp_path: Path) -> None:
    """Whoever holds the object before the restore sees the restored values in it."""
    kinds = (dict, list, collections.OrderedDict, collections.Counter, collections.defaultdict, set, bytearray)
    saved = {name: value for name, value in VALUES.items() if type(value) in (*kinds, torch.Tensor, collections.deque)}
    saved["np_array"] = VALUES["np_array"]
    saved["inner"] = {"best": {"loss": 1.0}, "list": [[1], [2]]}
    with lastgood.Checkpointer(tmp_path, **saved) as ckpt:
        ckpt.save(1)
    mine: dict[str, Any] = {name: collections.deque(maxlen=2) for name in saved if name == "recent"}
    mine |= {"np_array": np.zeros((3, 2), dtype=np.float32), "inner": {"best": {"x": 2}, "list": [[], [9]]}}
    mine |= {
        n: torch.zeros_like(v) if isinstance(v, torch.Tensor) else type(v)() for n, v in saved.items() if n not in mine
    }
    mine["default"] = collections.defaultdict(list)
    best, first = mine["inner"]["best"], mine["inner"]["list"][0]
    with lastgood.Checkpointer(tmp_path, **mine) as ckpt:
        ckpt.restore()
        assert all(ckpt[name] is value for name, value in mine.items())
    assert difference({n: saved[n] for n in mine}, mine) is None
    assert best == {"loss": 1.0} and first == [1]


def test_a_plain_tensor_of_another_shape_is_replaced_not_broadcast(tmp_path: Path) -> None:
    with lastgood.Checkpointer(tmp_path, a=torch.tensor([5.0]), b=torch.arange(3), c=torch.tensor(1.5)) as ckpt:
        ckpt.save(1)
    with lastgood.Checkpointer(
        tmp_path, a=torch.zeros(4), b=torch.zeros(1, 1), c=torch.zeros((), dtype=torch.int64)
    ) as ckpt:
        ckpt.restore()
        assert ckpt["a"].tolist() == [5.0] and ckpt["b"].tolist() == [0, 1, 2] and ckpt["c"].item() == 1.5


def test_values_without_any_tensor(tmp_path: Path) -> None:
    round_trip(tmp_path / "values", lambda: {"epoch": 3, "best": {"loss": 0.5}})
    round_trip(tmp_path / "nothing", dict)


def test_values_are_those_of_the_moment_of_the_save(tmp_path: Path) -> None:
    state: dict[str, Any] = {"list": [1], "tensor": torch.zeros(3), "array": np.zeros(2)}
    with lastgood.Checkpointer(tmp_path, state=state) as ckpt:
        handle = ckpt.save(1)
        state["list"].append(2)
        state["tensor"] += 1
        state["array"] += 1
        handle.result()
        ckpt.restore()
    assert state["list"] == [1] and not state["tensor"].any() and not state["array"].any()


def test_a_changed_plain_value_is_what_is_saved(tmp_path: Path) -> None:
    with lastgood.Checkpointer(tmp_path, epoch=0) as ckpt:
        ckpt["epoch"] = 7
        ckpt.save(1)
    with lastgood.Checkpointer(tmp_path, epoch=0) as ckpt:
        ckpt.restore()
        assert ckpt["epoch"] == 7


def test_one_object_in_two_places_that_were_two_when_saved(tmp_path: Path) -> None:
    with lastgood.Checkpointer(
        tmp_path, a={"x": [1], "y": [2], "s": torch.zeros(2), "t": torch.ones(2)}, b=torch.zeros(3), c=torch.ones(3)
    ) as ckpt:
        ckpt.save(1)
    shared, memory, plain = [0], torch.full((2,), 9.0), torch.full((3,), 9.0)
    with lastgood.Checkpointer(
        tmp_path, a={"x": shared, "y": shared, "s": memory, "t": memory}, b=plain, c=plain
    ) as ckpt:
        ckpt.restore()
        a, b, c = ckpt["a"], ckpt["b"], ckpt["c"]
    assert a["x"] == [1] and a["y"] == [2] and a["s"].tolist() == [0, 0] and a["t"].tolist() == [1, 1]
    assert b.tolist() == [0, 0, 0] and c.tolist() == [1, 1, 1]


def test_an_expanded_tensor_is_replaced(tmp_path: Path) -> None:
    round_trip(tmp_path, lambda: {"v": torch.randn(1).expand(4), "d": {"v": torch.randn(2, 1).expand(2, 3)}})
