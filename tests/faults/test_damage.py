"""Damaged checkpoints are noticed and skipped along the branch; abandoned branches stay abandoned."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lastgood import Checkpointer, DamagedError, Keep, catalog
from lastgood.loading import Loading
from lastgood.manifest import parse
from lastgood.world import World
from tests.faults import damage
from tests.faults import job as jobs
from tests.faults.job import Job, Notes, read_notes
from tests.faults.killer import Killer
from tests.faults.processes import Ranks
from tests.faults.test_crash import campaign

fork = pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL; Windows has its own campaign")

pwrite = pytest.mark.skipif(os.name == "nt", reason="needs POSIX: pwrite")


def open_run(run: Path, job: Job) -> Checkpointer:
    return Checkpointer(run, keep=Keep(last=10), rank=0, world_size=1, **job.options, **job.objects)


def train(run: Path, until: int, back_to: int | None = None) -> Job:
    """One life: restore, train to a step, saving each."""
    job = Job.build(0, "replicated")
    with open_run(run, job) as ckpt:
        for step in range(ckpt.restore(back_to) + 1, until + 1):
            job.train(step)
            ckpt.save(step, blocking=True).result()
    return job


def restored(run: Path) -> tuple[int, Job]:
    job = Job.build(0, "replicated")
    with open_run(run, job) as ckpt:
        return ckpt.restore(), job


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    jobs.limit_threads()
    run = tmp_path_factory.mktemp("template") / "run"
    train(run, 4)
    return run


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "run")
    return tmp_path / "run"


def entry(run: Path, step: int) -> catalog.Entry:
    return next(e for e in reversed(catalog.committed(run)) if e.step == step)


def flip(path: Path, at: int = -1, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def cut_manifest(entry: catalog.Entry) -> None:
    path = entry.path / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])


def cut_shard(entry: catalog.Entry) -> None:
    path = entry.path / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lose_shard(entry: catalog.Entry) -> None:
    (entry.path / "00000.safetensors").unlink()


def rot_shard(entry: catalog.Entry) -> None:
    flip(entry.path / "00000.safetensors")


def rot_header(entry: catalog.Entry) -> None:
    flip(entry.path / "00000.safetensors", at=20)


def swap_manifests(entry: catalog.Entry) -> None:
    shutil.copy(entry.path.with_name("step-00000001") / "manifest.json", entry.path)


DAMAGE: list[Callable[[catalog.Entry], None]] = [
    cut_manifest,
    cut_shard,
    lose_shard,
    rot_shard,
    rot_header,
    swap_manifests,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_falls_back_to_the_one_before(run: Path, damage: Callable[[catalog.Entry], None]) -> None:
    damage(entry(run, 4))
    step, job = restored(run)
    assert step == 3
    assert job.digest() == jobs.reference("replicated", 0, 3)[3]


@pytest.mark.parametrize("damage", [d for d in DAMAGE if d is not swap_manifests])
def test_where_all_are_damaged_it_raises_and_starts_nothing_anew(
    run: Path, damage: Callable[[catalog.Entry], None]
) -> None:
    for found in catalog.committed(run):
        damage(found)
    before = sorted(str(path) for path in run.glob("step-*/*"))
    for _ in range(2):
        with pytest.raises(DamagedError, match="none that can be restored"):
            restored(run)
    assert sorted(str(path) for path in run.glob("step-*/*")) == before


def test_a_damaged_step_is_saved_again_beside_it(run: Path) -> None:
    rot_shard(entry(run, 4))
    job = train(run, 4)
    again = entry(run, 4)
    assert again.generation > 1
    assert (run / "step-00000004").is_dir(), "the damaged one was deleted"
    catalog.check_full(again)
    step, loaded = restored(run)
    assert (step, loaded.digest()) == (4, job.digest())
    rot_shard(again)
    assert restored(run)[0] == 3, "the damaged first attempt must not be tried before its parent, and it is damaged"


@fork
def test_an_abandoned_branch_never_comes_back(run: Path, tmp_path: Path) -> None:
    """Rolled back to step 2, trained to another 4 and killed in the save of 5; then everything after 2 is damaged."""

    def life() -> int:
        from lastgood import disk

        killer = Killer()
        disk.observer = killer
        notes = Notes(tmp_path / "notes", 0)
        job = Job.build(0, "replicated")
        ckpt = open_run(run, job)
        start = ckpt.restore(2)
        for step in range(start + 1, 6):
            job.train(step)
            if step == 5:
                disk.observer = Killer(3, "after")
            handle = ckpt.save(step, blocking=True)
            notes.write(handle.state, step=step)
        return 0

    codes = Ranks([life], tmp_path / "life").wait()
    assert codes == {0: -9}
    assert [note["step"] for note in read_notes(tmp_path / "notes", 0)] == [3, 4]
    new = [e for e in catalog.committed(run) if e.generation > 1]
    assert [e.step for e in new] == [3, 4]
    for lives in range(20):  # Each life adds a generation; the branch must be known after many.
        step = restored(run)[0]
        assert step == 4, f"after {lives} lives"
    assert entry(run, 4) == new[1]
    rot_shard(new[1])
    assert restored(run)[0] == 3
    rot_shard(new[0])
    step, job = restored(run)
    assert step == 2, "the old steps 3 and 4 are whole, and abandoned"
    assert job.digest() == jobs.reference("replicated", 0, 2)[2]


def test_a_roll_back_counts_only_when_it_has_saved(run: Path) -> None:
    job = Job.build(0, "replicated")
    with open_run(run, job) as ckpt:
        assert ckpt.restore(2) == 2
    assert restored(run)[0] == 4


def test_a_run_copied_without_its_generations_goes_on(run: Path, tmp_path: Path) -> None:
    train(run, 5)
    train(run, 6)
    shutil.rmtree(run / "generations")
    job = train(run, 7)
    newest = catalog.newest(run)
    assert newest is not None and newest.step == 7
    assert restored(run)[1].digest() == job.digest()


def test_a_manifest_that_is_cut_or_altered_anywhere_is_refused(run: Path) -> None:
    data = (entry(run, 4).path / "manifest.json").read_bytes()
    parse(data, "whole")
    for length in range(len(data)):
        with pytest.raises(DamagedError):
            parse(data[:length], "cut")
    altered = bytearray(data)
    for at in range(len(data)):
        for bits in (0x01, 0xFF):
            altered[at] ^= bits
            with pytest.raises(DamagedError):
                parse(bytes(altered), "altered")
            altered[at] ^= bits


def places(size: int, count: int) -> Iterator[tuple[int, int]]:
    draw = random.Random(11)
    for _ in range(count):
        yield draw.randrange(size), 1 << draw.randrange(8)


@pwrite
def test_a_flipped_bit_in_a_shard_is_always_noticed_and_never_loaded(run: Path) -> None:
    found = entry(run, 4)
    manifest = catalog.read_manifest(found)
    path = found.path / "00000.safetensors"
    job = Job.build(0, "replicated")
    noticed = 0
    with path.open("r+b") as file:
        for at, bit in places(path.stat().st_size, 2000):
            byte = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte[0] ^ bit]), at)
            with pytest.raises(DamagedError):
                catalog.check_full(found)
            loading = Loading(found, manifest, job.objects, World(0, 1, True), strict=True)
            loading.prepare()
            with pytest.raises(DamagedError):
                loading.run()
            os.pwrite(file.fileno(), byte, at)
            noticed += 1
    assert noticed == 2000
    assert restored(run)[0] == 4


@fork
def test_flipped_bits_and_lost_sectors() -> None:
    assert "0 failed" in campaign("damage", "--count", "300")


@pwrite
def test_damage_that_is_not_noticed_fails_the_campaign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(catalog, "check_full", lambda entry: None)
    damage.train(tmp_path / "run", 2)
    found = damage.alter_shard(entry(tmp_path / "run", 2), iter([(5000, 1, None)]), tmp_path / "run")
    assert "not noticed" in next(found)
