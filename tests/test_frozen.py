"""What does not change is written twice and then shared, and no single bad sector takes two checkpoints."""

from __future__ import annotations

import errno
import itertools
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lastgood
from lastgood import catalog, commit, direct_io, disk, filling, shard
from lastgood.errors import SaveError
from lastgood.retain import Keep
from lastgood.shard import FROZEN

WIDTH = 384


def build(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two frozen layers under a small one that is trained."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8))
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def begin(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **keep: Any) -> lastgood.Checkpointer:
    return lastgood.Checkpointer(path, model=model, optimizer=optimizer, keep=Keep(**(keep or {"last": 3})))


def save(ckpt: lastgood.Checkpointer, number: int, **arguments: Any) -> Path:
    path = ckpt.save(number, blocking=True, **arguments).result()
    ckpt._finish_save()
    return path


def copies(run: Path) -> dict[str, set[tuple[int, int]]]:
    """By content, the physical copies among the committed checkpoints that have it."""
    found: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for entry in catalog.committed(run):
        if (entry.path / FROZEN).exists():
            found[(entry.path / FROZEN).read_bytes().hex()[:4096]].add(disk.identity(entry.path / FROZEN))
    return found


def test_from_the_third_save_on_only_what_changes_is_written(tmp_path: Path) -> None:
    model, optimizer = build()
    written: list[list[int]] = [[]]
    weights = {}
    disk.observer = lambda operation, when: (
        written[-1].append(len(operation.data or b"")) if when == "before" and operation.name == "write" else None
    )
    try:
        with begin(tmp_path, model, optimizer) as ckpt:
            for number in range(1, 9):
                step(model, optimizer)
                weights[number] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                written.append([])
                save(ckpt, number)
    finally:
        disk.observer = None
    sizes = [sum(sizes) for sizes in written[1:]]
    assert max(sizes[2:]) < 0.1 * min(sizes[:2])
    for entry in catalog.committed(tmp_path):
        manifest = catalog.check_full(entry)  # Complete by itself, and a plain safetensors file among others.
        assert FROZEN in [record.file for record in manifest.shards]
    for number in (8, 7, 6):
        model, optimizer = build(seed=9)
        with begin(tmp_path, model, optimizer) as ckpt:
            ckpt.restore(number)
        assert all(torch.equal(tensor, weights[number][name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "keep", [{"last": 1}, {"last": 2}, {"last": 3}, {"last": 1, "best": 1, "metric": "loss"}, {"last": 2, "every": 2}]
)
def test_what_two_checkpoints_share_exists_twice(tmp_path: Path, keep: dict[str, Any]) -> None:
    model, optimizer = build()
    losses = [5.0, 1.0, 4.0, 3.0, 2.0, 6.0, 0.5, 7.0, 8.0, 9.0, 10.0, 11.0]
    with begin(tmp_path, model, optimizer, **keep) as ckpt:
        for number, loss in enumerate(losses, 1):
            step(model, optimizer)
            save(ckpt, number, metrics={"loss": loss})
            kept = catalog.committed(tmp_path)
            if len(kept) > 1:
                assert all(len(found) > 1 for found in copies(tmp_path).values()), (number, kept)
            wanted = keep["last"] + keep.get("best", 0) + (number // keep["every"] if "every" in keep else 0)
            assert len(kept) <= wanted + 1  # One more may stay for its copy.


def test_what_will_only_be_linked_needs_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build()
    with begin(tmp_path, model, optimizer) as ckpt:
        for number in (1, 2):
            step(model, optimizer)
            save(ckpt, number)
        # Enough for the trained layer, not for the frozen ones.
        monkeypatch.setattr(disk, "free_bytes", lambda path: commit._MARGIN + (1 << 18))
        for number in (3, 4):
            step(model, optimizer)
            save(ckpt, number)
        assert [entry.step for entry in catalog.committed(tmp_path)] == [2, 3, 4]
        with torch.no_grad():
            model[0].weight.add_(1)
        with pytest.raises(SaveError, match="the save needs"):
            save(ckpt, 5)
        # It would have had to write all: old checkpoints gave what they had, and the last two stay.
        assert [entry.step for entry in catalog.entries(tmp_path)] == [3, 4]


def test_what_could_not_be_linked_after_all_is_not_written_into_too_little_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EMLINK, "Too many links")

    model, optimizer = build()
    with begin(tmp_path, model, optimizer) as ckpt:
        for number in (1, 2, 3):
            step(model, optimizer)
            save(ckpt, number)
        with monkeypatch.context() as patched:
            patched.setattr(disk, "free_bytes", lambda path: commit._MARGIN + (1 << 18))
            patched.setattr(disk, "link", refuse)
            step(model, optimizer)
            with pytest.raises(SaveError, match="the save needs"):
                save(ckpt, 4)
        assert [entry.step for entry in catalog.entries(tmp_path)] == [1, 2, 3]
        save(ckpt, 5)


def test_neighbours_never_share_a_file(tmp_path: Path) -> None:
    model, optimizer = build()
    with begin(tmp_path, model, optimizer, last=9) as ckpt:
        for number in range(1, 8):
            step(model, optimizer)
            save(ckpt, number)
    found = [disk.identity(entry.path / FROZEN) for entry in catalog.committed(tmp_path)]
    assert len(set(found)) == 2
    assert all(one != two for one, two in itertools.pairwise(found))


def test_a_rotten_source_is_not_linked_on(tmp_path: Path) -> None:
    model, optimizer = build()
    with begin(tmp_path, model, optimizer, last=9) as ckpt:
        for number in range(1, 4):
            step(model, optimizer)
            save(ckpt, number)
        source = catalog.committed(tmp_path)[1].path / FROZEN
        data = bytearray(source.read_bytes())
        data[-100] ^= 1
        source.write_bytes(data)
        step(model, optimizer)
        path = save(ckpt, 4)
        assert disk.identity(path / FROZEN) not in {
            disk.identity(entry.path / FROZEN) for entry in catalog.committed(tmp_path)[:3]
        }
        for number in range(5, 8):
            step(model, optimizer)
            catalog.check_full(catalog.Entry(1, number, 0, save(ckpt, number).name, tmp_path))


def test_to_read_one_tensor_back_does_not_read_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(4))
    with lastgood.Checkpointer(tmp_path, model=model) as ckpt:
        path = save(ckpt, 1)
    manifest = catalog.read_manifest(catalog.committed(tmp_path)[-1])
    chunks = sorted(((name, t.chunks[0]) for name, t in manifest.tensors.items()), key=lambda item: item[1].begin)
    record = manifest.shards[0]
    ranges: list[tuple[int, int]] = []
    fill = direct_io.Reader._fill

    def watched(reader: direct_io.Reader, begin: int, ahead: int) -> None:
        fill(reader, begin, ahead)
        ranges.append((reader._start, reader._start + reader._filled))

    monkeypatch.setattr(direct_io.Reader, "_fill", watched)
    first, second = chunks[1][1], chunks[2][1]
    shard.check_full(path / record.file, record, [chunks[2]])
    assert ranges == [(0, record.header_size), (second.begin, second.end)]
    ranges.clear()
    shard.check_full(path / record.file, record, chunks[1:3])
    assert ranges == [(0, record.header_size), (first.begin, second.end)], "neighbours are read together"
    ranges.clear()
    shard.check_full(path / record.file, record, chunks)
    assert ranges == [(0, record.size)]


@pytest.mark.parametrize("error", [errno.EMLINK, errno.EPERM, errno.EXDEV, errno.ENOTSUP])
def test_where_links_are_refused_the_bytes_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(error, "no links here")

    monkeypatch.setattr(disk, "link", refuse)
    model, optimizer = build()
    with begin(tmp_path, model, optimizer) as ckpt:
        for number in range(1, 6):
            step(model, optimizer)
            save(ckpt, number)
    for entry in catalog.committed(tmp_path):
        catalog.check_full(entry)
    assert len(next(iter(copies(tmp_path).values()))) == 3


def test_weights_that_begin_to_change_are_saved_as_they_are(tmp_path: Path) -> None:
    model, optimizer = build()
    weights = {}
    with begin(tmp_path, model, optimizer, last=99) as ckpt:
        for number in range(1, 16):
            if number == 5:  # By hand, and seen by its version.
                with torch.no_grad():
                    model[0].weight += 1
            if number == 7:  # By hand, seen by a sample.
                model[1].weight.data.mul_(2)
            if number == 9:  # By training.
                model[0].requires_grad_(True)
                optimizer.add_param_group({"params": list(model[0].parameters())})
            step(model, optimizer)
            weights[number] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            ckpt.save(number)
            step(model, optimizer)
        ckpt._finish_save()
    assert [entry.step for entry in catalog.committed(tmp_path)] == list(range(1, 16))
    model, optimizer = build(seed=3)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    with begin(tmp_path, model, optimizer, last=99) as ckpt:
        for number in range(15, 8, -1):
            ckpt.restore(number)
            assert all(torch.equal(tensor, weights[number][name]) for name, tensor in model.state_dict().items())


def test_a_change_that_no_sign_shows_is_never_saved_as_the_old_value(tmp_path: Path) -> None:
    """One word in the middle, written behind the version counter and between the samples: only the checksum sees it."""
    model, optimizer = build()
    with begin(tmp_path, model, optimizer, last=99) as ckpt:
        for number in range(1, 4):
            step(model, optimizer)
            save(ckpt, number)
        model[0].weight.data.view(-1)[777] += 1
        with pytest.raises(SaveError, match="changed"):
            save(ckpt, 4)
        wanted = model[0].weight.detach().clone()
        save(ckpt, 5)
        with torch.no_grad():
            model[0].weight.zero_()
        ckpt.restore(5)
        assert torch.equal(model[0].weight, wanted)


def test_the_writing_does_not_wait_for_the_comparison_and_the_commit_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build()
    with begin(tmp_path, model, optimizer) as ckpt:
        for number in range(1, 4):
            step(model, optimizer)
            save(ckpt, number)
        go = threading.Event()
        real = filling.checksum

        def checksum(data: memoryview) -> str:
            assert go.wait(30)
            return real(data)

        monkeypatch.setattr(filling, "checksum", checksum)
        handle = ckpt.save(4)
        while not (tmp_path / "step-00000004" / "manifest.json.tmp").exists():
            assert not handle.wait(0.01)
        assert not handle.wait(0.2)
        threading.Timer(0.2, go.set).start()
        step(model, optimizer)
        assert go.is_set()
        handle.result()


def test_an_average_that_always_changes_does_not_stop_the_sharing(tmp_path: Path) -> None:
    model, optimizer = build()
    average = torch.zeros(WIDTH, WIDTH)
    run = tmp_path / "run"
    with lastgood.Checkpointer(run, model=model, optimizer=optimizer, average=average) as ckpt:
        for number in range(1, 9):
            step(model, optimizer)
            average += number
            save(ckpt, number)
    found = [disk.identity(entry.path / FROZEN) for entry in catalog.committed(run)]
    assert len(found) == 3 and len(set(found)) == 2


def test_a_restored_state_is_copied_anew(tmp_path: Path) -> None:
    model, optimizer = build()
    with begin(tmp_path, model, optimizer, last=99) as ckpt:
        for number in range(1, 4):
            step(model, optimizer)
            save(ckpt, number)
        model[0].weight.data.view(-1)[777] += 1
        ckpt.restore(2)
        step(model, optimizer)
        entry = catalog.entry_of(tmp_path, save(ckpt, 3).name)
        assert entry is not None
        catalog.check_full(entry)


@pytest.mark.parametrize("name", ["link", "replace", "sync_dir"])
def test_a_save_that_fails_around_the_link_leaves_everything_whole(tmp_path: Path, name: str) -> None:
    model, optimizer = build()
    armed = threading.Event()

    def observe(operation: disk.Operation, when: str) -> None:
        if armed.is_set() and when == "before" and operation.name == name:
            armed.clear()
            raise OSError(errno.EIO, "the disk failed")

    with begin(tmp_path, model, optimizer, last=2) as ckpt:
        for number in range(1, 5):
            step(model, optimizer)
            save(ckpt, number)
        disk.observer = observe
        try:
            armed.set()
            step(model, optimizer)
            if name == "link":
                save(ckpt, 5)
            else:
                with pytest.raises(SaveError):
                    save(ckpt, 5)
            for number in range(6, 10):
                step(model, optimizer)
                save(ckpt, number)
        finally:
            disk.observer = None
    for entry in catalog.committed(tmp_path):
        catalog.check_full(entry)
    assert len(next(iter(copies(tmp_path).values()))) == 2
