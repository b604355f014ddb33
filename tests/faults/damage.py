"""Flipped bits and lost sectors: always noticed by the full check, never loaded, and the job falls back.

The quick check compares names and sizes only, so it notices damage of a manifest, and none of a shard's bytes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import torch

from lastgood import Checkpointer, DamagedError, Keep, catalog
from lastgood.loading import Loading
from lastgood.manifest import parse
from lastgood.world import World
from tests.faults import job as jobs
from tests.faults.job import Job
from tests.faults.powerloss import quiet
from tests.faults.processes import scratch
from tests.faults.report import Result

SECTOR = 512
_RESTORES = 20
"""For so many of the damaged places a whole job is started, which must fall back."""


def train(run: Path, until: int) -> None:
    job = Job.build(0, "replicated")
    job.objects["more"] = {"table": torch.arange(50_000.0)}
    with Checkpointer(run, keep=Keep(last=10), rank=0, world_size=1, **job.options, **job.objects) as ckpt:
        for step in range(ckpt.restore() + 1, until + 1):
            job.train(step)
            ckpt.save(step, blocking=True).result()


def restored(run: Path) -> int:
    job = Job.build(0, "replicated")
    job.objects["more"] = {"table": torch.zeros(50_000)}
    with Checkpointer(run, keep=Keep(last=10), rank=0, world_size=1, **job.objects) as ckpt:
        step = ckpt.restore()
        assert (ckpt["more"]["table"] == torch.arange(50_000.0)).all(), "other values were restored"
        return step


def bits(size: int, count: int, draw: random.Random) -> Iterator[tuple[int, int, bytes | None]]:
    """Where one bit is flipped: place, the bit, nothing to write."""
    for _ in range(count):
        yield draw.randrange(size), 1 << draw.randrange(8), None


def sectors(size: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Every sector, to be filled with zeros, and then with the noise of another file."""
    for at in range(0, size, SECTOR):
        yield at, 0, bytes(min(SECTOR, size - at))
        yield at, 0, random.Random(at).randbytes(min(SECTOR, size - at))


def alter_shard(entry: catalog.Entry, places: Iterator[tuple[int, int, bytes | None]], run: Path) -> Iterator[str]:
    """Damage the shard at each place in turn. Yields "" for damage that was noticed, or what is wrong."""
    manifest = catalog.read_manifest(entry)
    job = Job.build(0, "replicated")
    job.objects["more"] = {"table": torch.zeros(50_000)}
    with (entry.path / manifest.shards[0].file).open("r+b") as file:
        for number, (at, bit, data) in enumerate(places):
            old = os.pread(file.fileno(), len(data) if data else 1, at)
            new = data if data is not None else bytes([old[0] ^ bit])
            if new == old:
                continue
            os.pwrite(file.fileno(), new, at)
            problem = ""
            try:
                catalog.check_full(entry)
                problem = f"damage at byte {at} is not noticed"
            except DamagedError:
                pass
            try:
                loading = Loading(entry, manifest, job.objects, World(0, 1, True), strict=True)
                loading.prepare()
                loading.run()
                problem = f"damage at byte {at} is loaded"
            except DamagedError:
                pass
            catalog.check_quick(entry)  # Of a shard it compares the size only, as the documents say.
            if number % 500 == 0 and restored(run) != entry.step - 1:
                problem = f"with damage at byte {at} the job does not fall back"
            os.pwrite(file.fileno(), old, at)
            yield problem


def alter_manifest(entry: catalog.Entry, run: Path) -> Iterator[str]:
    """Every bit of every byte of the manifest, and every length that it may be cut to."""
    path = entry.path / "manifest.json"
    data = path.read_bytes()

    def refused(altered: bytes) -> bool:
        try:
            parse(altered, "altered")
        except DamagedError:
            return True
        return False

    for length in range(len(data)):
        yield "" if refused(data[:length]) else f"a manifest of {length} bytes is believed"
    altered = bytearray(data)
    for at in range(len(data)):
        for bit in range(8):
            altered[at] ^= 1 << bit
            problem = "" if refused(bytes(altered)) else f"bit {bit} of byte {at} of the manifest is not noticed"
            if at % (len(data) // _RESTORES) == 0 and bit == at % 8:
                path.write_bytes(bytes(altered))
                if restored(run) != entry.step - 1:
                    problem = f"with byte {at} of the manifest altered the job does not fall back"
            altered[at] ^= 1 << bit
            yield problem
    path.write_bytes(data)


def run(*, positions: int) -> Result:
    """Every byte of the manifest, so many bits of a shard, and every sector of it."""
    jobs.limit_threads()
    quiet()
    result = Result("Flipped bits and lost sectors")
    with result.timed(), scratch() as directory:
        run = directory / "run"
        train(run, 4)
        newest = catalog.committed(run)[-1]
        size = (newest.path / catalog.read_manifest(newest).shards[0].file).stat().st_size
        for what, found in (
            ("manifest: cut at every length, and every bit flipped", alter_manifest(newest, run)),
            ("shard: a bit flipped", alter_shard(newest, bits(size, positions, random.Random(11)), run)),
            ("shard: a sector zeroed or overwritten", alter_shard(newest, sectors(size), run)),
        ):
            for problem in found:
                result.tried[what] += 1
                result.failed += [problem] if problem else []
        if restored(run) != newest.step:
            result.failed.append("the whole checkpoint is not restored")
    result.notes.append(
        "The full check noticed all of it, and so did loading, which checks every byte that it reads. The quick check "
        "(names and sizes) notices damage of a manifest, and no altered byte of a shard: that is its limit."
    )
    return result
