"""Power cuts on real file systems: a loop device is copied at one point in time while a job saves to it.

The file system under test lies in a file on xfs, behind a loop device with direct I/O, so that what was not synced is
not in the file. A reflink copy of the file is the cut: atomic, in milliseconds. The copy is mounted, which replays the
journal as after a reboot, and the job is restored from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lastgood import catalog, disk
from lastgood.errors import LastGoodError
from tests.faults import job as jobs
from tests.faults.job import Job, Notes, Unbroken
from tests.faults.powerloss import quiet
from tests.faults.processes import LIMIT_SECONDS, Ranks, scratch
from tests.faults.report import Result

_OUTER_BYTES = 4 << 30
_DISK_BYTES = 512 << 20
_WORLDS = (2, 1)
_FOREVER = 10**6


@dataclass(frozen=True)
class System:
    """How a file system is made and mounted."""

    make: tuple[str, ...]
    mount: tuple[str, ...] = ("mount",)
    device: bool = True
    """Whether it is mounted from a loop device, or from the file itself."""


_PLAIN = System(("true",))
SYSTEMS = {
    "ext4": System(("mkfs.ext4", "-q")),
    "ext4-writeback": System(("mkfs.ext4", "-q"), ("mount", "-o", "data=writeback")),
    "xfs": System(("mkfs.xfs", "-q"), ("mount", "-o", "nouuid")),  # The copy has the id of the original.
    "btrfs": System(("mkfs.btrfs", "-q")),
    "fat": System(("mkfs.vfat", "-F", "32"), ("mount", "-t", "vfat")),
    # By programs: the kernel is not built with these everywhere. The first does not know fsync: what it writes goes
    # straight into the image, so that a cut finds all writes up to a moment.
    "fat-fuse": System(("mkfs.vfat", "-F", "32"), ("fusefat", "-o", "rw+"), device=False),
    "exfat-fuse": System(("mkfs.exfat",), ("mount.exfat-fuse",)),
    "ntfs-3g": System(("mkfs.ntfs", "-q", "-F", "--fast"), ("mount.ntfs-3g",)),
}


class NotHereError(Exception):
    """Loop devices cannot be mounted on this machine."""


def _do(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(str(part) for part in command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _patiently(*command: str | Path) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            _do(*command)
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@contextmanager
def mounted(image: Path, at: Path, system: System = _PLAIN, *, direct: bool = False) -> Iterator[Path]:
    """The file system in a file, mounted."""
    at.mkdir(exist_ok=True)
    if not system.device:
        _do(*system.mount, image, at)
        try:
            yield at
        finally:
            _patiently("umount", at)
        return
    device = _do("losetup", f"--direct-io={'on' if direct else 'off'}", "--show", "-f", image)
    try:
        _do(*system.mount, device, at)
        try:
            yield at
        finally:
            _patiently("umount", at)
    finally:
        _patiently("losetup", "-d", device)


def make_image(path: Path, size: int, make: Sequence[str]) -> Path:
    """A file with an empty file system."""
    with path.open("wb") as file:
        file.truncate(size)
    _do(*make, path)
    return path


@contextmanager
def outer_disk(directory: Path) -> Iterator[Path]:
    """A place where files can be copied in an instant. Raises NotHereError."""
    try:
        image = make_image(directory / "outer.img", _OUTER_BYTES, ("mkfs.xfs", "-q"))
        outer = mounted(image, directory / "outer")
        place = outer.__enter__()
    except OSError as error:
        raise NotHereError(f"no loop device with xfs can be mounted here: {error}") from error
    try:
        yield place
    finally:
        outer.__exit__(None, None, None)


def _reported(notes: Path) -> int:
    """The newest step that a rank was told is saved."""
    newest = 0
    for path in notes.glob("*.jsonl"):
        with path.open("rb") as file:  # Its end will do: it is looked at all the time.
            file.seek(max(0, path.stat().st_size - 2000))
            lines = file.read().splitlines()[-10:]
        found = [json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"}")]
        newest = max([newest, *(note["step"] for note in found if note["what"] == "committed")])
    return newest


def _train(run: Path, notes: Path, world: int, synced: bool) -> Ranks:
    def action(rank: int) -> Callable[[], int]:
        def body() -> int:
            quiet()
            if not synced:
                disk._sync_descriptor = lambda descriptor: None
            return jobs.live(run, Notes(notes, rank), rank=rank, world=world, kind="replicated", until=_FOREVER, keep=2)

        return body

    return Ranks([action(rank) for rank in range(world)], notes)


def judge(run: Path, reported: int, unbroken: Unbroken) -> str | None:
    """What is wrong with a run that was found after the cut."""
    there = catalog.committed(run)
    newest = there[-1].step if there else 0
    if newest < reported:
        return f"step {reported} had been reported as saved; the newest there is {newest}"
    for entry in there:
        try:
            catalog.check_full(entry)
        except LastGoodError as error:
            return f"a manifest without its data: {error}"
    job = Job.build(0, "replicated")
    try:
        with jobs.lastgood.Checkpointer(run, stale=0.001, rank=0, world_size=1, **job.objects) as ckpt:
            step = ckpt.restore()
    except LastGoodError as error:
        return f"{type(error).__name__}: {error}"
    if step != newest:
        return f"restored step {step}; the newest was {newest}"
    if job.digest() != unbroken.digest(step):
        return f"step {step} was restored with other bits than it had"
    return None


def try_system(name: str, outer: Path, cuts: int, *, world: int, synced: bool = True) -> list[str]:
    """Cut the power `cuts` times while a job saves. Returns what is wrong.

    Args:
        world: number of ranks of the job.
        synced: False leaves out every fsync, to see that it is noticed.
    """
    system, wrong = SYSTEMS[name], []
    image = make_image(outer / f"{name}.img", _DISK_BYTES, system.make)
    notes, draw = outer.parent / f"notes-{name}-{world}-{synced}", random.Random(5)
    unbroken = Unbroken("replicated", 0)
    with mounted(image, outer.parent / "disk", system, direct=True) as here:
        ranks = _train(here / "runs" / "voice", notes, world, synced)
        try:
            for number in range(cuts):
                _await_progress(ranks, notes)
                time.sleep(draw.random() * 0.1)  # Any moment of a save is as good as another.
                reported = _reported(notes)
                cut = outer / "cut.img"
                _do("cp", "--reflink=always", image, cut)
                with mounted(cut, outer.parent / "cut", system) as found:
                    problem = judge(found / "runs" / "voice", reported, unbroken)
                cut.unlink()
                if problem is not None:
                    wrong.append(f"{name}, {world} rank(s), cut {number}: {problem}")
        finally:
            ranks.kill()
            with contextlib.suppress(TimeoutError):
                ranks.wait()
    image.unlink()
    return wrong


def _await_progress(ranks: Ranks, notes: Path) -> None:
    """Wait until one more step was reported as saved."""
    before, end = _reported(notes), time.monotonic() + LIMIT_SECONDS
    while _reported(notes) <= before:
        if time.monotonic() > end:
            raise TimeoutError(f"the job saves nothing any more:\n{ranks.log()}")
        time.sleep(0.01)


def run(*, cuts: int, systems: Sequence[str] = tuple(SYSTEMS)) -> Result:
    """So many cuts on each file system, half of them with one rank."""
    jobs.limit_threads()
    quiet()
    result = Result("Power cuts on real file systems")
    if os.getuid() != 0:
        raise NotHereError("only root may mount file systems")
    with result.timed(), scratch() as directory, outer_disk(directory) as outer:
        for name in systems:
            reason = _why_not(name, outer)
            if reason is not None:
                result.notes.append(f"{name} could not be tried: {reason}")
                continue
            for number, world in enumerate(_WORLDS):
                share = (cuts + len(_WORLDS) - 1 - number) // len(_WORLDS)
                result.failed += try_system(name, outer, share, world=world)
                result.tried[f"{name}, {world} rank(s)"] = share
    return result


def _why_not(name: str, outer: Path) -> str | None:
    """Why a file system cannot be made or mounted here."""
    system, image = SYSTEMS[name], outer / "probe.img"
    try:
        with mounted(make_image(image, _DISK_BYTES, system.make), outer.parent / "probe", system):
            return None
    except OSError as error:
        return str(error)
    finally:
        image.unlink(missing_ok=True)
