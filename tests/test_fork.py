"""Forked children (data loaders' workers) inherit everything, and must act as if they had not."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import lastgood
from lastgood import LastGoodError, RunHeldError, catalog, disk
from lastgood.filling import Filling

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def fork(action: Callable[[], Any]) -> int:
    """The pid of a child that runs `action` and ends with 0, or with 1 after an error."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return child


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Numbers(Dataset[torch.Tensor]):
    """Hands out numbers, and what the Checkpointer says in the worker."""

    def __init__(self, ckpt: lastgood.Checkpointer) -> None:
        self.ckpt = ckpt

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        refused = 0
        for call in (lambda: self.ckpt.save(1000), self.ckpt.restore):
            try:
                call()
            except LastGoodError as error:
                refused += "this process was forked from the one that made the Checkpointer" in str(error)
        self.ckpt.close()  # Harmless.
        return torch.tensor([os.getpid(), refused])


def test_workers_of_a_data_loader_neither_save_nor_disturb(tmp_path: Path) -> None:
    with lastgood.Checkpointer(tmp_path, w=torch.zeros(10), keep=lastgood.Keep(last=50)) as ckpt:
        ckpt.restore()
        loader = DataLoader(Numbers(ckpt), batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=60)
        pids = set()
        for step, batch in enumerate(loader, 1):
            assert (batch[:, 1] == 2).all()
            pids |= set(batch[:, 0].tolist())
            ckpt.save(step)
        assert len(pids) == 2 and os.getpid() not in pids
        ckpt.wait()
    assert [entry.step for entry in catalog.committed(tmp_path)] == list(range(1, 11))


def test_a_worker_does_not_hold_the_lock(tmp_path: Path) -> None:
    def take() -> None:
        assert lastgood.Checkpointer(tmp_path, w=torch.zeros(10), stale=0.2).restore() == 1

    def held() -> None:
        with pytest.raises(RunHeldError, match=f"held by process {os.getppid()}"):
            lastgood.Checkpointer(tmp_path, w=torch.zeros(10), stale=0.2)

    ckpt = lastgood.Checkpointer(tmp_path, w=torch.zeros(10))
    worker = fork(lambda: time.sleep(60))
    try:
        ckpt.save(1)
        assert code_of(fork(held)) == 0
        ckpt.close()
        assert code_of(fork(take)) == 0
    finally:
        os.kill(worker, signal.SIGKILL)
        code_of(worker)


def test_after_sigkill_the_run_can_be_taken_at_once_though_workers_live(tmp_path: Path) -> None:
    reader, writer = os.pipe()

    def train() -> None:
        ckpt = lastgood.Checkpointer(tmp_path, w=torch.zeros(10))
        ckpt.save(1).result()
        worker = fork(lambda: time.sleep(60))
        os.write(writer, worker.to_bytes(8, "little"))
        time.sleep(60)

    parent = fork(train)
    worker = int.from_bytes(os.read(reader, 8), "little")
    try:
        os.kill(parent, signal.SIGKILL)
        assert code_of(parent) == -signal.SIGKILL
        began = time.monotonic()
        with lastgood.Checkpointer(tmp_path, w=torch.zeros(10)) as ckpt:
            assert ckpt.restore() == 1
            assert ckpt.generation == 2
        assert time.monotonic() - began < 20  # Not the minute for which another machine's job is watched.
        os.kill(worker, 0)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reader)
        os.close(writer)


def test_a_worker_that_is_terminated_dies_and_the_training_goes_on(tmp_path: Path) -> None:
    done = []
    reader, writer = os.pipe()
    with lastgood.Checkpointer(tmp_path, w=torch.zeros(10)) as ckpt:
        for step in ckpt.steps(5):
            done.append(step)
            if step == 1:
                # Ready before the signal comes: python drops what arrives in the middle of a fork.
                worker = fork(lambda: (os.write(writer, b"x"), time.sleep(60)))
                os.read(reader, 1)
                os.kill(worker, signal.SIGTERM)
                assert code_of(worker) == -signal.SIGTERM
    assert done == [0, 1, 2, 3, 4]
    assert [entry.step for entry in catalog.committed(tmp_path)] == [5]


def test_a_fork_in_the_middle_of_a_save_blocks_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(operation: disk.Operation, moment: str) -> None:
        if operation.name in ("write", "sync") and moment == "before":
            time.sleep(0.1)

    def child() -> None:
        with pytest.raises(LastGoodError, match="forked"):
            ckpt.save(2)
        with lastgood.Checkpointer(tmp_path / "own", w=torch.ones(10)) as own:
            own.save(1).result()

    monkeypatch.setattr(disk, "observer", slow)
    with lastgood.Checkpointer(tmp_path / "run", w=torch.zeros(10)) as ckpt:
        handle = ckpt.save(1)
        assert code_of(fork(child)) == 0
        handle.result()
        ckpt.save(2)
    assert [entry.step for entry in catalog.committed(tmp_path / "run")] == [1, 2]


def test_a_child_that_trains_does_not_wait_for_its_parents_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that copies does not exist in the child, whose own weights nobody copies."""
    copying, goes_on = threading.Event(), threading.Event()
    copy = Filling._copy

    def held(filling: Filling, watch: Any) -> None:
        copying.set()
        goes_on.wait(60)
        copy(filling, watch)

    def child() -> None:
        signal.alarm(20)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        ckpt.wait_snapshot()
        with pytest.raises(LastGoodError, match="forked"):
            ckpt.wait()

    monkeypatch.setattr(Filling, "_copy", held)
    model = torch.nn.Linear(1000, 1000)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.ones(1000)).sum().backward()
    with lastgood.Checkpointer(tmp_path, model=model, optimizer=optimizer) as ckpt:
        optimizer.step()
        handle = ckpt.save(1)
        try:
            assert copying.wait(20)
            assert code_of(fork(child)) == 0
        finally:
            goes_on.set()
        handle.result()
        before = optimizer.param_groups[0]["params"][0].clone()
        optimizer.step()
        assert not torch.equal(before, model.weight)


def test_a_child_that_outlives_its_parents_save_does_not_remove_anything(tmp_path: Path) -> None:
    ckpt = lastgood.Checkpointer(tmp_path, w=torch.zeros(10))
    ckpt.save(1)
    ckpt._finish_save()
    before = sorted(tmp_path.rglob("*"))
    assert code_of(fork(ckpt.close)) == 0
    assert code_of(fork(lambda: ckpt.__exit__(None, None, None))) == 0
    assert sorted(tmp_path.rglob("*")) == before
    ckpt.save(2).result()
    ckpt.close()
