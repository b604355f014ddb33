"""A checkpoint is of one moment although training goes on while it is copied."""

from __future__ import annotations

import copy
import ctypes
import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lastgood
from lastgood import shard, snapshot
from lastgood.errors import SaveError

WIDTH = 384
# A weight of this size is larger than what is copied at once.


def build(seed: int = 0, layers: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))])


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    model(torch.randn(8, WIDTH)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def clone(**objects: Any) -> dict[str, Any]:
    return {name: copy.deepcopy(value.state_dict()) for name, value in objects.items()}


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def slow_copies(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Hold every background copy at its beginning until the returned event is set."""
    go = threading.Event()
    real = snapshot.ctypes.memmove

    def memmove(target: int, source: int, size: int) -> Any:
        assert go.wait(30)
        return real(target, source, size)

    monkeypatch.setattr(snapshot.ctypes, "memmove", memmove)
    return go


def let_go_later(go: threading.Event, seconds: float = 0.1) -> None:
    timer = threading.Timer(seconds, go.set)
    timer.daemon = True
    timer.start()


def begin(tmp_path: Path, **objects: Any) -> lastgood.Checkpointer:
    return lastgood.Checkpointer(tmp_path / "run", keep=lastgood.Keep(last=99), **objects)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "loop": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=2, history_size=2),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_checkpoint_is_of_the_moment_of_its_save(tmp_path: Path, kind: str) -> None:
    model = build()
    optimizer = OPTIMIZERS[kind](model.parameters())

    def train() -> None:
        inputs = torch.randn(8, WIDTH)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(inputs).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    wanted = {}
    with begin(tmp_path, model=model, optimizer=optimizer) as ckpt:
        for number in range(1, 9):
            train()
            wanted[number] = clone(model=model, optimizer=optimizer)
            ckpt.save(number)
            train()
        assert ckpt._snapshot.overlap
    model = build(seed=1)
    optimizer = OPTIMIZERS[kind](model.parameters())
    with begin(tmp_path, model=model, optimizer=optimizer) as ckpt:
        for number in reversed(wanted):
            ckpt.restore(number)
            assert same(clone(model=model, optimizer=optimizer), wanted[number]), number


def test_a_step_waits_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    with begin(tmp_path, model=model, optimizer=optimizer) as ckpt:
        step(model, optimizer)
        wanted = clone(model=model, optimizer=optimizer)
        go = slow_copies(monkeypatch)
        handle = ckpt.save(1)
        assert not go.is_set()  # save() came back although nothing large is copied yet.
        let_go_later(go)
        step(model, optimizer)
        assert go.is_set()
        handle.result()
        ckpt.restore(1)
        assert same(clone(model=model, optimizer=optimizer), wanted)


def test_load_state_dict_of_an_optimizer_waits_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with begin(tmp_path, model=model, optimizer=optimizer) as ckpt:
        step(model, optimizer)
        early = copy.deepcopy(optimizer.state_dict())
        step(model, optimizer)
        wanted = clone(model=model, optimizer=optimizer)
        go = slow_copies(monkeypatch)
        handle = ckpt.save(2)
        let_go_later(go)
        optimizer.load_state_dict(early)
        assert go.is_set()
        handle.result()
        ckpt.restore(2)
        assert same(clone(model=model, optimizer=optimizer), wanted)


def test_wait_snapshot_makes_changes_by_hand_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with begin(tmp_path, model=model, optimizer=optimizer) as ckpt:
        step(model, optimizer)
        wanted = clone(model=model, optimizer=optimizer)
        go = slow_copies(monkeypatch)
        handle = ckpt.save(1)
        let_go_later(go)
        ckpt.wait_snapshot()
        for parameter in model.parameters():
            parameter.data.zero_()
        handle.result()
        assert ckpt._snapshot.overlap
        ckpt.restore(1)
        assert same(clone(model=model, optimizer=optimizer), wanted)


def by_version(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters())[0, 1] += 1


def by_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def by_foreach(model: nn.Module) -> None:
    torch._foreach_add_([parameter.detach() for parameter in model.parameters()], 1.0)


def by_load(model: nn.Module) -> None:
    model.load_state_dict(build(seed=5).state_dict())


def by_another_optimizer(model: nn.Module) -> None:
    step(model, torch.optim.SGD(model.parameters(), lr=1.0))


def by_another_fused_optimizer(model: nn.Module) -> None:
    step(model, torch.optim.AdamW(model.parameters(), lr=1.0, fused=True))


@pytest.mark.parametrize(
    "change", [by_version, by_data, by_foreach, by_load, by_another_optimizer, by_another_fused_optimizer]
)
@pytest.mark.parametrize("when", ["before", "between"])
def test_a_change_that_no_hook_announces_fails_the_save_and_ends_the_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module], None], when: str
) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    go, reached = threading.Event(), threading.Event()
    real = snapshot.ctypes.memmove
    count = 0

    def memmove(target: int, source: int, size: int) -> Any:
        nonlocal count
        count += 1
        if count == (1 if when == "before" else 3):
            reached.set()
            assert go.wait(30)
        return real(target, source, size)

    with begin(tmp_path, model=model, optimizer=optimizer) as ckpt:
        step(model, optimizer)
        ckpt.save(1, blocking=True).result()
        step(model, optimizer)
        monkeypatch.setattr(snapshot.ctypes, "memmove", memmove)
        handle = ckpt.save(2)
        assert reached.wait(30)
        change(model)
        go.set()
        with pytest.raises(SaveError, match="changed while it was being copied"):
            handle.result()
        # From now on everything is copied at once: the same change does no harm.
        step(model, optimizer)
        wanted = clone(model=model, optimizer=optimizer)
        count = 99
        handle = ckpt.save(3)
        change(model)
        handle.result()
        ckpt.restore(3)
        assert same(clone(model=model, optimizer=optimizer), wanted)
        assert [entry.step for entry in lastgood.catalog.committed(tmp_path / "run")] == [1, 3]


def test_an_operation_under_way_at_the_end_of_the_copy_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An in-place operation raises the version of a tensor only when it is done: one look per tensor is too early."""
    model = build(layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with begin(tmp_path, model=model, optimizer=optimizer) as ckpt:
        step(model, optimizer)
        real, first, second = ctypes.memmove, model[0].weight, model[2].weight
        changed = False

        def memmove(target: int, source: int, size: int) -> Any:
            # When the second tensor is being copied, the first has been looked at.
            nonlocal changed
            if not changed and source == second.data_ptr():
                changed = True
                torch._foreach_add_([first.detach()], 1.0)
            return real(target, source, size)

        monkeypatch.setattr(ctypes, "memmove", memmove)
        with pytest.raises(SaveError, match="changed while it was being copied"):
            ckpt.save(1, blocking=True).result()
        assert changed


def test_two_optimizers_that_step_in_turn(tmp_path: Path) -> None:
    generator, discriminator = build(0), build(1)
    opt_g = torch.optim.AdamW(generator.parameters(), lr=0.1, fused=True)
    opt_d = torch.optim.AdamW(discriminator.parameters(), lr=0.1, foreach=True)
    objects = {"g": generator, "d": discriminator, "opt_g": opt_g, "opt_d": opt_d}
    wanted = {}
    with begin(tmp_path, **objects) as ckpt:
        for number in range(1, 7):
            step(discriminator, opt_d)
            if number % 3:
                step(generator, opt_g)  # In some rounds only one of the two steps.
            wanted[number] = clone(**objects)
            ckpt.save(number)
            step(discriminator, opt_d)
        assert ckpt._snapshot.overlap
        ckpt.wait()
        for number in reversed(wanted):
            ckpt.restore(number)
            assert same(clone(**objects), wanted[number]), number


def test_an_average_of_the_weights_is_of_the_same_moment(tmp_path: Path) -> None:
    model = build()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    objects = {"model": model, "average": average, "optimizer": optimizer}
    wanted = {}
    with begin(tmp_path, **objects) as ckpt:
        for number in range(1, 5):
            step(model, optimizer)
            wanted[number] = clone(**objects)
            ckpt.save(number)
            average.update_parameters(model)
            step(model, optimizer)
        ckpt.wait()
        for number in reversed(wanted):
            ckpt.restore(number)
            assert same(clone(**objects), wanted[number]), number


def test_the_memory_is_used_again_and_given_back(tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ckpt = begin(tmp_path, model=model, optimizer=optimizer)
    addresses = set()
    for number in range(1, 6):
        step(model, optimizer)
        ckpt.save(number)
        addresses.add(ckpt._snapshot.view.obj and ckpt._snapshot._storage.data_ptr())
        if number == 1:
            addresses.clear()  # The first save came before the optimizer had its full state.
    assert len(addresses) == 1
    state = sum(t.nbytes for t in [*model.state_dict().values()]) * 3
    assert ckpt._snapshot.size <= state + (1 << 20)
    held = weakref.ref(ckpt._snapshot)
    ckpt.close()
    assert ckpt._snapshot.size == 0
    step(model, optimizer)  # The optimizer lives on, without us.
    del ckpt
    gc.collect()
    assert held() is None


def test_a_state_that_shrinks_gives_memory_back(tmp_path: Path) -> None:
    large: dict[str, torch.Tensor] = {"a": torch.zeros(8 << 20, dtype=torch.uint8), "b": torch.ones(4)}
    with begin(tmp_path, data=large) as ckpt:
        ckpt.save(1, blocking=True).result()
        assert ckpt._snapshot.size > 8 << 20
        del large["a"]
        ckpt.save(2, blocking=True).result()
        assert ckpt._snapshot.size < 1 << 20


def test_who_waits_for_the_copy_takes_part_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    real, threads = ctypes.memmove, []

    def slow(target: int, source: int, size: int) -> None:
        threads.append(threading.get_ident())
        time.sleep(0.005)
        real(target, source, size)

    with begin(tmp_path, model=model, optimizer=optimizer) as ckpt:
        step(model, optimizer)
        monkeypatch.setattr(ctypes, "memmove", slow)
        handle = ckpt.save(1)
        ckpt.wait_snapshot()
        wanted = copy.deepcopy(model.state_dict())
        step(model, optimizer)
        handle.result()
        assert threading.get_ident() in threads and len(set(threads)) == 2
        monkeypatch.undo()
        ckpt.restore(1)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_the_cores_are_for_the_copy_while_training_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    began: list[int] = []
    real = shard.checksum
    monkeypatch.setattr(
        shard, "checksum", lambda data: (began.append(len(ckpt._snapshot._filling._todo)), real(data))[1]
    )
    with begin(tmp_path, model=model, optimizer=optimizer) as ckpt:
        step(model, optimizer)
        ckpt.save(1, blocking=True)
        step(model, optimizer)
        began.clear()
        real_copy = snapshot.ctypes.memmove

        def slowly(*arguments: int) -> Any:
            time.sleep(0.02)
            return real_copy(*arguments)

        monkeypatch.setattr(snapshot.ctypes, "memmove", slowly)
        handle = ckpt.save(2)
        ckpt.wait_snapshot()
        handle.result()
    # A few may begin before the training waits.
    assert len(began) > 12 and len(began) - began.count(0) <= 3, "checksums waited, although their bytes were there"


@pytest.mark.parametrize("where", ["before the step", "in save"])
def test_a_signal_while_training_helps_to_copy_costs_neither_the_save_nor_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Ctrl-C mostly comes in the middle of a copy, which is where the time goes."""
    model = build(layers=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    real, me, interrupted = ctypes.memmove, threading.get_ident(), threading.Event()

    def memmove(target: int, source: int, size: int) -> None:
        if threading.get_ident() == me and not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt
        assert interrupted.wait(30)
        real(target, source, size)

    def submit(task: Any, *arguments: Any) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    with begin(tmp_path, model=model, optimizer=optimizer, deadline=30) as ckpt:
        step(model, optimizer)
        wanted = copy.deepcopy(model.state_dict())
        monkeypatch.setattr(ctypes, "memmove", memmove)
        if where == "in save":
            first = ckpt._snapshot.begin

            def after_us() -> None:
                assert threading.get_ident() == me or interrupted.wait(30)
                first()

            monkeypatch.setattr(ckpt._snapshot, "begin", after_us)
            monkeypatch.setattr(ckpt._snapshot._filling._background, "submit", submit)
            with pytest.raises(KeyboardInterrupt):
                ckpt.save(1)
        else:
            ckpt.save(1)
            with pytest.raises(KeyboardInterrupt):
                step(model, optimizer)  # Its hook waits for the copy.
        monkeypatch.undo()
        handle = ckpt._handle
        assert handle is not None and interrupted.is_set()
        handle.wait(20)
        assert handle.state == "committed", handle.error
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        ckpt.restore(1)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_a_thread_that_cannot_be_started_does_not_make_a_copy_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool queues a task before it starts a thread for it."""
    model = build(layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with begin(tmp_path, model=model, optimizer=optimizer) as ckpt:
        step(model, optimizer)
        ckpt.save(1).result()
        ckpt._finish_save()
        queued, real = [], ckpt._snapshot._filling._background.submit

        def submit(task: Any, *arguments: Any) -> None:
            queued.append((task, arguments))
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(ckpt._snapshot._filling._background, "submit", submit)
        step(model, optimizer)
        handle = ckpt.save(2)
        monkeypatch.undo()
        handle.result()
        assert queued
        step(model, optimizer)
        ckpt.wait_snapshot()
        for task, arguments in queued:
            real(task, *arguments).result(20)  # Now there is a thread again, and it comes to what was queued.
        assert ckpt._snapshot.overlap
        ckpt.save(3).result()
