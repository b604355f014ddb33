"""Retention: what is wanted stays, the last good one always, and nothing goes before something newer was verified."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lastgood
from lastgood import Keep, catalog, disk, program
from lastgood.catalog import Entry
from lastgood.retain import Known, best_first, choose


@pytest.fixture(autouse=True)
def observer() -> Iterator[None]:
    yield
    disk.observer = None


def known(step: int, generation: int = 1, size: int = 10, **metrics: float) -> Known:
    name = catalog.directory_name(step, generation)
    return Known(Entry(generation, step, 0, name, Path("run")), metrics, size)


CHECKPOINTS = st.lists(
    st.tuples(
        st.integers(0, 60), st.integers(1, 3), st.integers(0, 99), st.sampled_from([None, float("nan"), 0.0, 1.0])
    ),
    min_size=1,
    max_size=15,
    unique_by=lambda item: item[:2],
).map(
    lambda items: [known(s, g, size, **({} if loss is None else {"loss": loss})) for s, g, size, loss in sorted(items)]
)
POLICIES = st.builds(
    lambda last, best, mode, every, max_bytes: Keep(
        last=last, best=best, metric="loss", mode=mode, every=every if last or best or every else 5, max_bytes=max_bytes
    ),
    st.integers(0, 5),
    st.integers(0, 3),
    st.sampled_from(["min", "max"]),
    st.none() | st.integers(1, 20),
    st.none() | st.integers(1, 500),
)


@settings(max_examples=300, deadline=None)
@given(CHECKPOINTS, POLICIES, st.data())
def test_the_choice_keeps_what_is_wanted_and_the_newest(items: list[Known], keep: Keep, data: st.DataObject) -> None:
    items = sorted(items, key=lambda k: k.entry)
    on_branch = [k for k in items[:-1] if data.draw(st.booleans())] + [items[-1]]
    branch = [k.entry.name for k in reversed(on_branch)]
    doomed = [k.entry.name for k in choose(items, branch, keep)]
    left = [k for k in items if k.entry.name not in doomed]
    names = [k.entry.name for k in left]
    assert len(set(doomed)) == len(doomed)
    assert branch[0] in names
    if keep.max_bytes is None:
        assert set(branch[: keep.last]) <= set(names)
        assert {k.entry.name for k in best_first(on_branch, keep)[: keep.best]} <= set(names)
        assert not keep.every or all(k.entry.name in names for k in on_branch if k.entry.step % keep.every == 0)
    else:
        wanted_two = set(branch[: min(2, max(keep.last, 1))])
        assert wanted_two <= set(names)
        assert sum(k.bytes for k in left) <= keep.max_bytes or set(names) <= set(branch[:2])
    if len(branch) >= keep.last and keep.last:
        assert all(name in branch for name in names), "an abandoned branch outlived a long enough new one"
    # Applied again, it wants nothing more.
    again = [name for name in branch if name in names]
    assert not choose(left, again, keep)


def test_the_best_of_equal_ones_is_the_newer_and_nan_is_never_the_best() -> None:
    items = [known(1, loss=1.0), known(2, loss=float("nan")), known(3, loss=1.0), known(4, loss=2.0), known(5)]
    for mode, order in (("min", [3, 1, 4]), ("max", [4, 3, 1])):
        keep = Keep(best=1, metric="loss", mode=mode)  # type: ignore[arg-type]
        assert [k.entry.step for k in best_first(items, keep)] == order


def steps(run: Path) -> list[int]:
    return [entry.step for entry in catalog.committed(run)]


def save(run: Path, keep: Keep, *numbers: int, back_to: int | None = None, losses: Any = None) -> None:
    with lastgood.Checkpointer(run, keep=keep, w=torch.zeros(500)) as ckpt:
        ckpt.restore(step=back_to)
        for number in numbers:
            ckpt.save(number, metrics={"loss": losses[number]} if losses else {})


def test_last_and_every_and_best(tmp_path: Path) -> None:
    save(tmp_path / "last", Keep(last=2), *range(1, 8))
    assert steps(tmp_path / "last") == [6, 7]
    save(tmp_path / "every", Keep(last=1, every=3), *range(1, 9))
    assert steps(tmp_path / "every") == [3, 6, 8]
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0, 5: 6.0, 6: 7.0}
    save(tmp_path / "best", Keep(last=1, best=2, metric="loss"), *range(1, 7), losses=losses)
    assert steps(tmp_path / "best") == [2, 4, 6]
    with lastgood.Checkpointer(tmp_path / "best", keep=Keep(best=1, metric="loss"), w=torch.zeros(500)) as ckpt:
        assert ckpt.restore(step="best") == 2


def test_the_best_needs_a_metric_and_a_checkpoint_that_has_it(tmp_path: Path) -> None:
    save(tmp_path, Keep(), 1)
    for keep, words in ((Keep(), r"needs Keep\(metric="), (Keep(metric="loss"), r"no checkpoint in .* has the metric")):
        with (
            lastgood.Checkpointer(tmp_path, keep=keep, w=torch.zeros(500)) as ckpt,
            pytest.raises(lastgood.LastGoodError, match=words),
        ):
            ckpt.restore(step="best")


def test_max_bytes_leaves_two_whatever_it_says(tmp_path: Path) -> None:
    save(tmp_path, Keep(last=10, max_bytes=1), *range(1, 6))
    assert steps(tmp_path) == [4, 5]


@pytest.mark.parametrize("last", [0, 1])
def test_max_bytes_leaves_the_newest_alone_where_the_rules_want_no_second(tmp_path: Path, last: int) -> None:
    save(tmp_path, Keep(last=last, every=2, max_bytes=1), *range(1, 6))
    assert steps(tmp_path) == [4, 5], "the one before is wanted by another rule"
    save(tmp_path, Keep(last=last, every=100, max_bytes=1), 6, 7)
    assert steps(tmp_path) == [7]


def test_every_deletion_is_in_the_event_log_with_its_reason(tmp_path: Path) -> None:
    save(tmp_path, Keep(last=2), 1, 2, 3, 4)
    events = program.read_events(tmp_path)
    gone = [(e["checkpoint"], e["why"]) for e in events if e["event"] == "delete"]
    assert gone == [("step-00000001", "the retention policy"), ("step-00000002", "the retention policy")]
    assert [e["deleted"] for e in events if e["event"] == "save"] == [[], [], ["step-00000001"], ["step-00000002"]]
    assert [e["kept"] for e in events if e["event"] == "save"] == [1, 2, 2, 2]


def test_the_log_line_of_a_save_says_what_is_kept_and_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lastgood")
    save(tmp_path / "a", Keep(last=2), 1, 2, 3)
    save(tmp_path / "b", Keep(last=20), *range(1, 9))
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("saved step")]
    assert lines[0].endswith("kept step 1") and lines[1].endswith("kept steps 1, 2")
    assert lines[2].endswith("kept steps 2, 3, deleted step-00000001") and lines[-1].endswith("kept 8 checkpoints")


def test_the_abandoned_branch_goes_only_when_the_new_one_is_long_enough(tmp_path: Path) -> None:
    save(tmp_path, Keep(last=3), 10, 20, 30)
    save(tmp_path, Keep(last=3), 11, back_to=10)
    assert steps(tmp_path) == [10, 20, 30, 11]
    save(tmp_path, Keep(last=3), 12)
    assert steps(tmp_path) == [10, 11, 12]


@pytest.mark.parametrize(
    ("file", "words"), [("00000.safetensors", "does not match its checksum"), ("manifest.json", "altered")]
)
def test_nothing_is_deleted_when_the_newest_reads_back_damaged(tmp_path: Path, file: str, words: str) -> None:
    """Its bytes rot right after the commit, before retention reads them."""
    save(tmp_path, Keep(last=2), 1, 2)

    def rot(operation: disk.Operation, moment: str) -> None:
        if operation.name == "replace" and moment == "after" and operation.path.name == "manifest.json":
            data = operation.path.parent / file
            content = bytearray(data.read_bytes())
            content[-9] ^= 1
            data.write_bytes(content)

    disk.observer = rot
    save(tmp_path, Keep(last=2), 3, 4)
    disk.observer = None
    assert steps(tmp_path) == [1, 2, 3, 4]
    whys = [e["why"] for e in program.read_events(tmp_path) if e["event"] == "retention-failed"]
    assert len(whys) == 2 and all(words in why for why in whys)
    with lastgood.Checkpointer(tmp_path, keep=Keep(last=2), w=torch.zeros(500)) as ckpt:
        assert ckpt.restore() == 2
        ckpt.save(3).result()
    assert 2 in steps(tmp_path) and [e.name for e in catalog.committed(tmp_path)][-1] == catalog.directory_name(3, 3)


def test_the_manifest_goes_first_and_durably(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    def watch(operation: disk.Operation, moment: str) -> None:
        if moment == "before" and "step-00000001" in str(operation.path):
            seen.append((operation.name, operation.path.name))

    save(tmp_path, Keep(last=1), 1)
    disk.observer = watch
    save(tmp_path, Keep(last=1), 2)
    names = [item for item in seen if item[0] in ("remove", "sync_dir", "rmdir")]
    assert names == [
        ("remove", "manifest.json"),
        ("sync_dir", "step-00000001"),
        ("remove", "00000.safetensors"),
        ("rmdir", "step-00000001"),
    ]


def test_a_deletion_that_the_disk_refuses_is_tried_again(tmp_path: Path) -> None:
    refused = 0

    def refuse(operation: disk.Operation, moment: str) -> None:
        nonlocal refused
        if (
            operation.name == "remove"
            and moment == "before"
            and operation.path.suffix == ".safetensors"
            and refused < 2
        ):
            refused += 1
            raise PermissionError(13, "open in another program", str(operation.path))

    disk.observer = refuse
    save(tmp_path, Keep(last=1), *range(1, 8))
    assert refused == 2
    assert [entry.step for entry in catalog.entries(tmp_path)] == [7]
