"""What the Checkpointer refuses, with which words, and what it promises about steps, handles and closing."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lastgood
from lastgood import LastGoodError, catalog, commit, disk, program, saver
from roundtrip import seed


def weights(value: float) -> dict[str, Any]:
    return {"w": torch.full((3,), value)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"every": 0}, r"every=0.*whole number greater than 0"),
        ({"every": 2.5}, r"every=2\.5.*whole number"),
        ({"minutes": -1}, r"minutes=-1.*greater than 0"),
        ({"writers": 1.0}, "writers=1.0"),
        ({"deadline": float("nan")}, "deadline=nan"),
        ({"deadline": None}, "deadline=None"),
        ({"stale": "60"}, "stale='60'"),
        ({"busy": "no"}, '"wait" or "skip"'),
        ({"stop_code": 256}, "from 0 to 255"),
        ({"keep": {"last": 3}}, r"keep=\{'last': 3\}.*lastgood\.Keep"),
        ({"leave_out": "model.*"}, "leave_out='model.*'.*list of patterns"),
        ({"local": [1]}, "local=.*list of patterns"),
        ({"replicated": "x"}, "replicated='x'"),
        ({"rank": 0}, "rank= and world_size= must be given together"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"group": "no-such-group-here"}, "no group 'no-such-group-here'|a POSIX group"),
        ({"model": nn.Linear}, "model is the class Linear, not an object"),
        ({"f": lambda: None}, "f: a value of type builtins.function.*functions and classes are not state"),
        ({"all": {"opts": [torch.optim.SGD([torch.zeros(1)])]}}, r"all\.opts\[0\].*under a name of its own"),
        ({"x": {"a": [{1: object()}]}}, r"x\.a\[0\]\.1: a value of type builtins.object.*leave_out=\['x.a\[0\]\.1'\]"),
        ({"x": 1 << 9000}, "x: an integer of 9001 bits"),
    ],
)
def test_a_wrong_argument_is_refused_by_name_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(LastGoodError, match=words):
        lastgood.Checkpointer(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_a_value_that_contains_itself_is_refused(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(LastGoodError, match="nested more than 64 deep, or a value that contains itself"):
        lastgood.Checkpointer(tmp_path, x=loop)


def test_zero_redundancy_optimizer_is_refused_with_the_way_out(tmp_path: Path) -> None:
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        """Known by its name: the real one cannot be made without a process group."""

    with pytest.raises(LastGoodError, match=r"opt: ZeroRedundancyOptimizer.*collective.*FSDP2"):
        lastgood.Checkpointer(tmp_path, opt=ZeroRedundancyOptimizer([torch.zeros(1)]))


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ({"last": 0}, "would keep nothing"),
        ({"last": -1}, "cannot be negative"),
        ({"last": 2.0}, "last=2.0.*whole number"),
        ({"best": None}, "best=None.*whole number"),
        ({"best": 1}, "needs metric="),
        ({"best": 1, "metric": "x", "mode": "up"}, '"min" or "max"'),
        ({"every": 0}, "every.*at least 1"),
        ({"max_bytes": 0}, "max_bytes.*at least 1"),
    ],
)
def test_a_retention_policy_that_makes_no_sense_is_refused(keep: dict[str, Any], words: str) -> None:
    with pytest.raises(LastGoodError, match=words):
        lastgood.Keep(**keep)


@pytest.mark.parametrize("step", [-1, 1.0, "1", True, None, np.int64(3)])
def test_a_step_is_a_whole_number(tmp_path: Path, step: Any) -> None:
    with lastgood.Checkpointer(tmp_path, x=1) as ckpt, pytest.raises(LastGoodError, match="a step is a whole number"):
        ckpt.save(step)


@pytest.mark.parametrize("metrics", [0.5, {"loss": "low"}, {"loss": None}, {"loss": torch.zeros(2)}])
def test_a_metric_is_one_number(tmp_path: Path, metrics: Any) -> None:
    with lastgood.Checkpointer(tmp_path, x=1) as ckpt, pytest.raises(LastGoodError, match="metric"):
        ckpt.save(1, metrics=metrics)


def test_metrics_come_back_as_numbers(tmp_path: Path) -> None:
    metrics = {"loss": torch.tensor(0.5), "n": np.int32(3), "inf": float("inf"), "nan": float("nan")}
    with lastgood.Checkpointer(tmp_path, x=1) as ckpt:
        ckpt.save(1, metrics=metrics)
    (entry,) = catalog.committed(tmp_path)
    read = catalog.read_manifest(entry).metrics
    assert (read["loss"], read["n"], read["inf"]) == (0.5, 3.0, float("inf")) and read["nan"] != read["nan"]


def everything() -> dict[str, Any]:
    model = nn.Linear(3, 2)
    return {
        "model": model,
        "opt": torch.optim.Adam(model.parameters()),
        "array": np.arange(3.0),
        "generator": torch.Generator(),
        "values": {"a": float("nan"), "t": torch.tensor(float("nan")), "empty": torch.zeros(0)},
        "z": torch.randn(2, dtype=torch.complex64).conj(),
    }


def test_a_step_saved_twice_without_a_change_is_saved_once(tmp_path: Path) -> None:
    objects = everything()
    with lastgood.Checkpointer(tmp_path, **objects) as ckpt:
        first = ckpt.save(1)
        assert ckpt.save(1) is first
        first.result()
        assert ckpt.save(1, blocking=True) is first
    assert [entry.name for entry in catalog.committed(tmp_path)] == ["step-00000001"]


@pytest.mark.parametrize("what", ["weight", "data", "array", "generator", "value", "structure"])
def test_a_step_saved_twice_with_a_changed_state_is_an_error(tmp_path: Path, what: str) -> None:
    objects = everything()
    with lastgood.Checkpointer(tmp_path, **objects) as ckpt:
        ckpt.save(1)
        if what == "weight":
            nn.init.zeros_(objects["model"].bias)
        elif what == "data":
            objects["model"].weight.data[0, 0] += 1  # Bumps no version counter.
        elif what == "array":
            objects["array"][0] = 5
        elif what == "generator":
            torch.rand(1, generator=objects["generator"])
        elif what == "value":
            objects["values"]["a"] = 1.0
        else:
            objects["values"]["more"] = torch.zeros(1)
        with pytest.raises(LastGoodError, match=r"save\(step=1\).*already saved.*state has changed since"):
            ckpt.save(1)


def test_the_loop_saves_its_last_step_once(tmp_path: Path) -> None:
    objects = everything()
    with lastgood.Checkpointer(tmp_path, **objects) as ckpt:
        assert list(ckpt.steps(4, every=2)) == [0, 1, 2, 3]
    assert [entry.step for entry in catalog.committed(tmp_path)] == [2, 4]


def test_steps_grow(tmp_path: Path) -> None:
    with lastgood.Checkpointer(tmp_path, x=1) as ckpt:
        ckpt.save(5)
        with pytest.raises(LastGoodError, match=r"save\(step=4\).*at step 5 already.*restore\(step=4\)"):
            ckpt.save(4)


def test_saving_into_a_run_with_checkpoints_needs_a_restore_first(tmp_path: Path) -> None:
    with lastgood.Checkpointer(tmp_path, x=1) as ckpt:
        ckpt.save(5)
    with lastgood.Checkpointer(tmp_path, x=1) as ckpt:
        with pytest.raises(LastGoodError, match=r"already has checkpoints.*step-00000005.*call restore\(\)"):
            ckpt.save(6)
        assert ckpt.restore() == 5
        ckpt.save(5)  # The state may have been changed on purpose: it is a new checkpoint.
        ckpt.save(6)
    assert [entry.name for entry in catalog.committed(tmp_path)] == [
        "step-00000005",
        "step-00000005.g2",
        "step-00000006.g2",
    ]


def test_a_closed_checkpointer_says_so(tmp_path: Path) -> None:
    ckpt = lastgood.Checkpointer(tmp_path, x=1)
    ckpt.close()
    ckpt.close()
    for call in (lambda: ckpt.save(1), ckpt.restore, lambda: next(iter(ckpt.steps(3)))):
        with pytest.raises(LastGoodError, match="is closed"):
            call()


def test_a_run_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_bytes(b"precious")
    with pytest.raises(LastGoodError, match="is a file: a run is a directory"):
        lastgood.Checkpointer(path, x=1)
    with pytest.raises(LastGoodError, match="cannot be written"):
        lastgood.Checkpointer(path / "deeper" / "run", x=1)
    assert path.read_bytes() == b"precious"


def test_a_read_only_run_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(operation: disk.Operation, moment: str) -> None:
        if moment == "before" and operation.name == "create":
            raise PermissionError(30, "Read-only file system", str(operation.path))

    monkeypatch.setattr(disk, "observer", refuse)
    with pytest.raises(LastGoodError, match=r"cannot be written.*Read-only.*Choose a directory"):
        lastgood.Checkpointer(tmp_path / "run", x=1)


def test_the_same_run_again_in_the_same_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a notebook does it, under whatever name for the same directory."""
    caplog.set_level(logging.INFO, "lastgood")
    real = tmp_path / "run"
    names = [real, tmp_path / "x" / ".." / "run", tmp_path / "RUN"]
    if os.name != "nt":  # There, links take a privilege, and another case of a name is the same.
        names[2] = tmp_path / "link"
        os.symlink(real, names[2])
    first = lastgood.Checkpointer(real, w=torch.ones(2))
    handle = first.save(1)
    for number, name in enumerate(names, 2):
        again = lastgood.Checkpointer(name, w=torch.zeros(2))
        assert again.generation == number
        assert again.restore() == 1
        with pytest.raises(LastGoodError, match="is closed"):
            first.save(2)
        first = again
    assert handle.result().exists()
    assert "gives it up" in caplog.text
    first.save(2).result()
    first.close()


def test_ctrl_c_in_the_middle_of_a_save_leaves_a_checkpointer_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = weights(1)
    with lastgood.Checkpointer(tmp_path, state=state, deadline=1.0) as ckpt:
        ckpt.save(1)
        submit = ThreadPoolExecutor.submit

        def interrupt_before(*_: Any) -> Any:
            raise KeyboardInterrupt

        def interrupt_after(self: ThreadPoolExecutor, *arguments: Any) -> Any:
            submit(self, *arguments)
            time.sleep(0.2)
            raise KeyboardInterrupt

        for step, interrupt in ((2, interrupt_before), (3, interrupt_after)):
            monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupt)
            with pytest.raises(KeyboardInterrupt):
                ckpt.save(step)
            monkeypatch.undo()
            ckpt.save(step).result(timeout=10)
        ckpt.save(4).result(timeout=10)
    assert [entry.step for entry in catalog.committed(tmp_path)] == [2, 3, 4]


def test_a_save_without_a_thread_is_made_in_the_foreground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def no_more(self: threading.Thread) -> None:
        if self.name.startswith(("lastgood-save", "lastgood-snapshot")):
            raise RuntimeError("can't start new thread")
        start(self)

    with lastgood.Checkpointer(tmp_path, state=weights(1)) as ckpt:
        monkeypatch.setattr(threading.Thread, "start", no_more)
        assert ckpt.save(1).state == "committed"
        monkeypatch.undo()
        ckpt.save(2).result(timeout=10)
    assert [entry.step for entry in catalog.committed(tmp_path)] == [1, 2]


class Odd:
    """A state that raises what it is told to, at saving or at loading."""

    def __init__(self) -> None:
        self.at_save: BaseException | None = None
        self.at_load: BaseException | None = None

    def state_dict(self) -> dict[str, int]:
        if self.at_save:
            raise self.at_save
        return {"n": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if self.at_load:
            raise self.at_load


def test_errors_that_are_no_exceptions(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.api import CheckpointException

    assert not issubclass(CheckpointException, Exception)
    odd = Odd()
    with lastgood.Checkpointer(tmp_path, odd=odd) as ckpt:
        ckpt.save(1).result()
        odd.at_save = CheckpointException("no", {})
        with pytest.raises(LastGoodError, match=r"odd: .*CheckpointException"):
            ckpt.save(2)
        odd.at_save = None
        ckpt.save(2).result()
        odd.at_load = CheckpointException("no", {})
        with pytest.raises(LastGoodError, match="CheckpointException"):
            ckpt.restore()
        for stop in (KeyboardInterrupt(), SystemExit(3)):
            odd.at_load = stop
            with pytest.raises(type(stop)):
                ckpt.restore()
        odd.at_load = None
        assert ckpt.restore() == 2


def test_what_it_is_called_for_is_logged(tmp_path: Path) -> None:
    seed(1)
    with lastgood.Checkpointer(tmp_path, state=weights(1)) as ckpt:
        ckpt.save(1, metrics={"loss": 1})
        ckpt.restore()
    events = program.read_events(tmp_path)
    assert [event["event"] for event in events] == ["save", "restore"]
    assert events[0]["bytes"] > 0 and events[0]["metrics"] == {"loss": 1.0} and events[1]["step"] == 1


def test_the_manifest_names_the_versions_of_what_the_program_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lightning", "pytorch_lightning", "transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", ModuleType("accelerate"))
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.8" if name == "accelerate" else version(name))
    with lastgood.Checkpointer(tmp_path, w=torch.zeros(3)) as ckpt:
        ckpt.save(1)
    entry = catalog.newest(tmp_path)
    assert entry is not None
    found = catalog.read_manifest(entry).versions
    assert found["numpy"] == np.__version__ and found["safetensors"] == version("safetensors")
    assert found["accelerate"] == "9.8"
    assert set(found) == {"lastgood", "torch", "python", "system", "safetensors", "numpy", "accelerate"}


@pytest.mark.parametrize("enabled", [True, False])
def test_a_save_of_many_tensors_sets_off_few_garbage_collections(tmp_path: Path, enabled: bool) -> None:
    """Each may take half a second in a program with millions of objects."""
    began: list[str] = []
    me = threading.get_ident()

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and threading.get_ident() == me:
            began.append(str(info["generation"]))

    gc.callbacks.append(note)
    before = gc.isenabled(), gc.get_threshold()
    try:
        with lastgood.Checkpointer(tmp_path, model=nn.ModuleList(nn.Linear(2, 2) for _ in range(300))) as ckpt:
            ckpt.save(1)
            ckpt.wait()
            gc.set_threshold(100)
            (gc.enable if enabled else gc.disable)()
            began.clear()
            ckpt.save(2)
            seen = len(began)
            assert gc.isenabled() == enabled
        assert seen <= 3
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*before[1])
        (gc.enable if before[0] else gc.disable)()


def test_the_hurry_of_the_training_is_not_forgotten_before_the_turn_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows the save before may take seconds, and the training may want the next one meanwhile."""
    go, seen = threading.Event(), []
    after, save = saver.Saver._after, commit.Root._save

    def slow(self: Any, *arguments: Any) -> None:
        assert go.wait(30)
        after(self, *arguments)

    def look(self: Any, *arguments: Any) -> Any:
        seen.append(self.hurried)
        return save(self, *arguments)

    monkeypatch.setattr(saver.Saver, "_after", slow)
    monkeypatch.setattr(commit.Root, "_save", look)
    with lastgood.Checkpointer(tmp_path, w=torch.zeros(3)) as ckpt:
        ckpt.save(1).result()
        second = ckpt.save(2)
        ckpt._saver.hurry()
        go.set()
        second.result()
    assert seen == [False, True]
