"""A second place for checkpoints: complete, never in the way, and the rescue when the run is gone or damaged."""

from __future__ import annotations

import errno
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import Rank, World, checkpoints, events, run_ranks, wait_until

from lastgood import DamagedError, Keep, LastGoodError, Mirror, catalog, disk
from lastgood import mirror as mirror_module


def state(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((600, 50), value), "b": torch.full((7,), value)}


def save(rank: Rank, steps: list[int], **options: Any) -> list[str]:
    values = state()
    told = []
    options = {"mirror": rank.run.with_name("mirror"), "keep": Keep(last=20), **options}
    with rank.checkpointer(state=values, replicated=["*"], **options) as ckpt:
        ckpt.restore()
        for step in steps:
            for tensor in values.values():
                tensor.fill_(step)
            told.append(ckpt.save(step, blocking=True).state)
    return told


def restore(rank: Rank, **options: Any) -> tuple[int, int]:
    values = state()
    options = {"mirror": rank.run.with_name("mirror"), "keep": Keep(last=20), **options}
    with rank.checkpointer(state=values, replicated=["*"], **options) as ckpt:
        step = ckpt.restore()
        assert all(torch.equal(values[name], tensor) for name, tensor in state(float(step)).items())
        return step, ckpt.generation


def run(tmp_path: Path, name: str, main: Any, size: int = 2) -> list[Any]:
    return run_ranks(size, main, tmp_path / name, run=tmp_path / "run")


def test_every_committed_checkpoint_arrives(tmp_path: Path) -> None:
    for e in run(tmp_path, "1", lambda rank: save(rank, [1, 2, 3, 4, 5])):
        e.ok()
    assert checkpoints(tmp_path / "mirror") == checkpoints(tmp_path / "run") == [f"step-{n:08d}" for n in range(1, 6)]
    for entry in catalog.committed(tmp_path / "mirror"):
        catalog.check_full(entry)
    assert sorted(e["checkpoint"] for e in events(tmp_path / "run", "mirror")) == checkpoints(tmp_path / "run")


def test_when_the_run_is_gone_the_mirror_restores_and_numbers_stay_above(tmp_path: Path) -> None:
    for life, steps in enumerate(([1, 2], [3, 4])):
        for e in run(tmp_path, f"life-{life}", lambda rank, steps=steps: save(rank, steps)):
            e.ok()
    shutil.rmtree(tmp_path / "run")
    assert [e.ok() for e in run(tmp_path, "again", restore)] == [(4, 3)] * 2
    for e in run(tmp_path, "on", lambda rank: save(rank, [5])):
        e.ok()
    assert checkpoints(tmp_path / "run") == ["step-00000005.g4"]
    assert checkpoints(tmp_path / "mirror")[-1] == "step-00000005.g4"
    shutil.rmtree(tmp_path / "run")
    assert run(tmp_path, "last", restore)[0].ok()[0] == 5


@pytest.mark.parametrize("shard", ["00000.safetensors", "00001.safetensors", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damaged_in_the_run_and_intact_in_the_mirror(tmp_path: Path, shard: str, harm: str) -> None:
    for e in run(tmp_path, "1", lambda rank: save(rank, [1, 2])):
        e.ok()
    path = tmp_path / "run" / "step-00000002" / shard
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.unlink() if harm == "remove" else path.write_bytes(data if harm == "flip" else data[:-50])
    ended = run(tmp_path, "2", restore)
    assert [e.ok()[0] for e in ended] == [2, 2]
    if (shard, harm) != ("manifest.json", "remove"):
        assert ended[0].logged("skipped step-00000002")


def test_damaged_in_both_falls_back(tmp_path: Path) -> None:
    for e in run(tmp_path, "1", lambda rank: save(rank, [1, 2])):
        e.ok()
    for place in ("run", "mirror"):
        (tmp_path / place / "step-00000002" / "00001.safetensors").write_bytes(b"")
    assert [e.ok()[0] for e in run(tmp_path, "2", restore)] == [1, 1]
    for place in ("run", "mirror"):
        (tmp_path / place / "step-00000001" / "00000.safetensors").write_bytes(b"")
    for e in run(tmp_path, "3", restore):
        assert isinstance(e.error, LastGoodError) and "none that can be restored" in str(e.error)


@pytest.mark.parametrize("failure", ["a file in its place", "errors"])
def test_a_mirror_that_is_away_is_caught_up_and_training_goes_on(tmp_path: Path, failure: str) -> None:
    mirror = tmp_path / "mirror"

    def main(rank: Rank) -> list[str]:
        values, told, broken = state(), [], [True]

        def observe(op: disk.Operation, when: str) -> None:
            if broken and when == "before" and mirror in op.path.parents:
                raise OSError(errno.EHOSTDOWN, "the share is away", str(op.path))

        with rank.checkpointer(state=values, replicated=["*"], mirror=mirror, keep=Keep(last=9)) as ckpt:
            if failure == "errors":
                disk.observer = observe
            elif rank.rank == 0:
                mirror.rename(tmp_path / "away") if mirror.exists() else None
                mirror.write_text("not mounted")
            for step in range(1, 4):
                for tensor in values.values():
                    tensor.fill_(step)
                told.append(ckpt.save(step, blocking=True).state)
            if rank.rank == 0:
                wait_until(lambda: any(events(rank.run, "mirror-behind")), "the mirror to be missed")
                broken.clear()
                if failure != "errors":
                    mirror.unlink()
                wait_until(lambda: len(checkpoints(mirror)) == 3, "the mirror to be caught up, by itself")
        return told

    ended = run(tmp_path, "1", main)
    assert [e.ok() for e in ended] == [["committed"] * 3] * 2
    assert len(ended[0].logged("is behind")) == 1, "said once"
    assert ended[0].logged("is back and up to date")
    for entry in catalog.committed(mirror):
        catalog.check_full(entry)


def test_a_mirror_that_stays_away_does_not_fail_the_job(tmp_path: Path) -> None:
    (tmp_path / "mirror").write_text("not a directory")
    (tmp_path / "run").mkdir()
    for e in run(tmp_path, "0", lambda rank: save(rank, [1], mirror=None)):
        e.ok()
    ended = run(tmp_path, "1", lambda rank: save(rank, [2, 3], deadline=20))
    assert [e.ok() for e in ended] == [["committed"] * 2] * 2
    assert ended[0].logged("not up to date")


def test_an_unreachable_mirror_beside_an_empty_run_is_no_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "mirror").write_text("not mounted")
    ended = run(tmp_path, "1", lambda rank: restore(rank, deadline=1.5))
    assert isinstance(ended[0].error, LastGoodError) and "nothing is started anew" in str(ended[0].error)
    assert isinstance(ended[1].error, LastGoodError)


def test_an_unreadable_mirror_beside_a_run_with_checkpoints_is_left_out(tmp_path: Path) -> None:
    def main(rank: Rank) -> tuple[int, int]:
        listing = disk.names

        def names(path: Path) -> list[str]:
            if path.name == "mirror":
                raise OSError(errno.ESTALE, "Stale file handle", str(path))
            return listing(path)

        disk.names = names
        return restore(rank, deadline=20)

    for e in run(tmp_path, "1", lambda rank: save(rank, [1, 2])):
        e.ok()
    ended = run(tmp_path, "2", main)
    assert [e.ok() for e in ended] == [(2, 2)] * 2
    assert ended[0].logged("restoring from the run alone")


def test_which_checkpoints_are_copied_and_which_copies_stay(tmp_path: Path) -> None:
    def main(rank: Rank) -> None:
        mirror = Mirror(path=rank.run.with_name("mirror"), every=2, keep=Keep(last=2))
        values = state()
        with rank.checkpointer(state=values, replicated=["*"], mirror=mirror, keep=Keep(last=20)) as ckpt:
            for step in range(1, 8):
                ckpt.save(step, blocking=True).result()
                if rank.rank == 0 and step % 2 == 0:
                    name = f"step-{step:08d}"
                    wait_until(lambda name=name: name in checkpoints(rank.run.with_name("mirror")), name)  # type: ignore[misc]

    for e in run(tmp_path, "1", main):
        e.ok()
    assert len(checkpoints(tmp_path / "run")) == 7
    assert checkpoints(tmp_path / "mirror") == ["step-00000006", "step-00000007"], "the newest comes at the end"


def test_a_copy_that_was_broken_off_is_no_checkpoint_and_is_made_again(tmp_path: Path) -> None:
    def main(rank: Rank) -> None:
        def observe(op: disk.Operation, when: str) -> None:
            if "mirror" in str(op.path) and op.name == "sync" and op.path.suffix == ".safetensors":
                rank.mark("copying")
                time.sleep(100)

        disk.observer = observe
        ckpt = rank.checkpointer(state=state(1), replicated=["*"], mirror=rank.run.with_name("mirror"))
        ckpt.save(1, blocking=True).result()
        time.sleep(100)

    world = World(1, main, tmp_path / "1", run=tmp_path / "run")
    wait_until(lambda: (tmp_path / "1" / "mark-copying").exists(), "the copy to be under way")
    world.kill(0)
    world.wait([])
    assert (tmp_path / "mirror" / "step-00000001").exists() and checkpoints(tmp_path / "mirror") == []
    for e in run(tmp_path, "2", lambda rank: save(rank, [2])):
        e.ok()
    assert checkpoints(tmp_path / "mirror") == ["step-00000001", "step-00000002.g2"]
    catalog.check_full(catalog.committed(tmp_path / "mirror")[0])


def test_a_damaged_checkpoint_is_not_mirrored(tmp_path: Path) -> None:
    for e in run(tmp_path, "1", lambda rank: save(rank, [1, 2], mirror=None)):
        e.ok()
    path = tmp_path / "run" / "step-00000001" / "00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    for e in run(tmp_path, "2", lambda rank: save(rank, [3])):
        e.ok()
    assert "step-00000001" not in checkpoints(tmp_path / "mirror")
    assert {"step-00000002", "step-00000003.g2"} <= set(checkpoints(tmp_path / "mirror")), "the others arrive"
    with pytest.raises(DamagedError):
        catalog.check_full(catalog.committed(tmp_path / "run")[0])


def test_one_damaged_checkpoint_does_not_keep_the_others_from_the_mirror(tmp_path: Path) -> None:
    """Neither older ones nor the notes nor retention; it is said once, and not read again with every save."""

    def first(rank: Rank) -> None:
        save(rank, [1, 2, 3], mirror=None)

    def second(rank: Rank) -> None:
        options = {"mirror": rank.run.with_name("mirror"), "keep": Keep(last=20)}
        with rank.checkpointer(state=state(), **options) as ckpt:
            ckpt.restore(step=3)
            for step in (4, 5):
                ckpt.save(step, blocking=True).result()
                wait_until(lambda step=step: f"step-{step:08d}.g2" in checkpoints(tmp_path / "mirror"), "the copy")  # type: ignore[misc]
            wait_until(lambda: (tmp_path / "mirror/generations/00000002.base").exists(), "the note")

    run(tmp_path, "1", first, size=1)[0].ok()
    path = tmp_path / "run" / "step-00000002" / "00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    (ended,) = run(tmp_path, "2", second, size=1)
    ended.ok()
    names = ["step-00000001", "step-00000003", "step-00000004.g2", "step-00000005.g2"]
    assert checkpoints(tmp_path / "mirror") == names
    assert len(ended.logged("step-00000002")) == 1 and ended.logged("is not copied to the mirror")
    assert not ended.logged("is behind") and not ended.logged("not up to date")
    assert not (tmp_path / "mirror" / "step-00000002").exists()
    told = [e["checkpoint"] for e in events(tmp_path / "run", "skip")]
    assert told == ["step-00000002"]


def test_a_copy_whose_source_retention_deletes_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    def main(rank: Rank) -> None:
        def observe(op: disk.Operation, when: str) -> None:
            if (
                op.name == "sync"
                and when == "before"
                and "mirror" in op.path.parts
                and "step-00000001" in op.path.parts
            ):
                shutil.rmtree(rank.run / "step-00000001")

        disk.observer = observe
        with rank.checkpointer(state=state(), mirror=rank.run.with_name("mirror"), keep=Keep(last=20)) as ckpt:
            ckpt.save(1, blocking=True).result()
            wait_until(lambda: not (rank.run / "step-00000001").exists(), "the deletion")
            ckpt.save(2, blocking=True).result()

    (ended,) = run(tmp_path, "1", main, size=1)
    ended.ok()
    assert catalog.entries(tmp_path / "mirror") == catalog.committed(tmp_path / "mirror")
    assert checkpoints(tmp_path / "mirror") == ["step-00000002"]
    assert not ended.logged("is behind") and not ended.logged("damaged")


def test_what_a_killed_job_had_half_copied_goes_when_its_source_is_gone(tmp_path: Path) -> None:
    run(tmp_path, "1", lambda rank: save(rank, [1]), size=1)[0].ok()
    half = tmp_path / "mirror" / "step-00000000"
    half.mkdir()
    (half / "00000.safetensors").write_bytes(b"half a")
    run(tmp_path, "2", lambda rank: save(rank, [2]), size=1)[0].ok()
    assert not half.exists()
    assert checkpoints(tmp_path / "mirror") == ["step-00000001", "step-00000002.g2"]


def test_deletions_in_the_mirror_are_logged(tmp_path: Path) -> None:
    mirror = Mirror(path=tmp_path / "mirror", keep=Keep(last=1))
    (ended,) = run(tmp_path, "1", lambda rank: save(rank, [1, 2, 3], mirror=mirror), size=1)
    ended.ok()
    gone = {e["checkpoint"]: e["why"] for e in events(tmp_path / "run", "delete")}
    copied = {e["checkpoint"] for e in events(tmp_path / "run", "mirror")}
    assert set(gone) == copied - {"step-00000003"} and gone
    assert all("mirror" in why for why in gone.values())
    assert all(ended.logged(f"deleted {name}") for name in gone)


@pytest.mark.parametrize("moment", ["half copied", "copied"])
def test_a_replaced_job_that_wakes_up_deletes_nothing_in_the_mirror(tmp_path: Path, moment: str) -> None:
    """It looked before it stood still: what the job after it has put there since is not its own to delete."""
    target = tmp_path / "mirror" / "step-00000001"

    def main(rank: Rank) -> bool:
        copy, replaced = mirror_module.Copier._copy, []

        def woken(copier: mirror_module.Copier, entry: catalog.Entry) -> None:
            # The job after this one takes the run and copies.
            if moment == "copied":
                shutil.copytree(entry.path, target)
                (rank.run / "generations" / "00000002.json").write_text("{}")
            else:
                target.mkdir()
                (target / "half").touch()
                (rank.run / "generations" / "00000002.json").write_text("{}")
            replaced.append(True)
            copy(copier, entry)

        mirror_module.Copier._copy = woken  # type: ignore[method-assign]
        ckpt = rank.checkpointer(state=state(), mirror=rank.run.with_name("mirror"))
        ckpt.save(1, blocking=True).result()
        ckpt.close()
        return bool(replaced)

    (ended,) = run(tmp_path, "1", main, size=1)
    assert ended.ok()
    assert target.is_dir() and ended.logged("taken over by generation 2")
    assert moment == "copied" or (target / "half").exists()
    if moment == "copied":
        catalog.check_full(catalog.committed(tmp_path / "mirror")[0])


def test_what_another_job_has_copied_meanwhile_stays(tmp_path: Path) -> None:
    """Two lives of one job, and the second has caught up when the first looks again: nothing to do."""
    target = tmp_path / "mirror" / "step-00000001"

    def main(rank: Rank) -> None:
        copy = mirror_module.Copier._copy

        def late(copier: mirror_module.Copier, entry: catalog.Entry) -> None:
            if not target.exists():
                shutil.copytree(entry.path, target)
            (target / "mark").touch()
            copy(copier, entry)

        mirror_module.Copier._copy = late  # type: ignore[method-assign]
        with rank.checkpointer(state=state(), mirror=rank.run.with_name("mirror")) as ckpt:
            ckpt.save(1, blocking=True).result()

    (ended,) = run(tmp_path, "1", main, size=1)
    ended.ok()
    assert (target / "mark").exists() and not ended.logged("WARNING")


def test_a_mirror_that_is_up_to_date_before_it_is_closed_is_not_waited_for(tmp_path: Path) -> None:
    """The last save's wake-up and the closing may come together."""

    def main(rank: Rank) -> float:
        ckpt = rank.checkpointer(state=state(), mirror=rank.run.with_name("mirror"), deadline=30)
        ckpt.save(1, blocking=True).result()
        ckpt._finish_save()
        copier = ckpt._saver._copier
        copier._closing = True
        copier.notify()
        copier._thread.join(20)
        began = time.monotonic()
        ckpt.close()
        return time.monotonic() - began

    (ended,) = run(tmp_path, "1", main, size=1)
    assert ended.ok() < 20 and not ended.logged("not up to date")
    assert checkpoints(tmp_path / "mirror") == ["step-00000001"]
