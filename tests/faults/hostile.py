"""Hostile files: thousands of altered manifests, logs, generation files, shards, weights files and run directories.

Each is read in a child with little memory and little time. The reader must answer with the package's own error, or with
a correct result. A child that crashes, hangs, takes too much, or touches what is not its business, is a failure.
"""

from __future__ import annotations

import collections
import io
import logging
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import lastgood
from lastgood.errors import LastGoodError
from tests.faults import job as jobs
from tests.faults import mutations, readers
from tests.faults.job import Job, Notes, read_notes
from tests.faults.processes import fork, scratch
from tests.faults.readers import Outcome
from tests.faults.report import Result

MEMORY_BYTES = 1 << 30
"""What a reader may take beyond what the process has; the files have less than a megabyte."""
CPU_SECONDS = 4
BATCH = 250
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "exec", "compile",
    "socket.connect", "socket.bind", "os.symlink", "os.link", "os.chown", "pty.spawn", "ctypes.dlopen",
    "builtins.input",
)  # fmt: skip
"""Events of Python that no reader of files has a reason for, once everything is imported."""


@dataclass(frozen=True)
class Target:
    """A kind of file, how it is altered, and how it is read."""

    name: str
    original: bytes
    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[bytes, Path], Outcome]
    """Raises LastGoodError, or says whether what was read is what was written."""
    exact: bool
    """Whether the format has checksums that cover everything: then another result is a failure."""
    writes: bool = False
    """Whether reading is part of a job, which takes the run: it opens sockets and writes files."""


def make_template(run: Path) -> None:
    """A run with four checkpoints and a job that has ended."""
    job = Job.build(0, "replicated")
    with jobs.Checkpointer(run, keep=lastgood.Keep(last=10), rank=0, world_size=1, **job.objects) as ckpt:
        for step in range(ckpt.restore() + 1, 5):
            job.train(step)
            ckpt.save(step, metrics={"loss": 1 / step}, blocking=True).result()


def targets(template: Path) -> list[Target]:
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save(readers.content(), zipped)
    torch.save(readers.content(), legacy, _use_new_zipfile_serialization=False)
    flat = save(readers.tensors(), {"format": "pt"})
    newest = template / "step-00000004"
    manifest = (newest / "manifest.json").read_bytes()
    shard = (newest / "00000.safetensors").read_bytes()
    log = (template / "events.jsonl").read_bytes()
    scramble, weights = mutations.scramble, readers.read_weights(readers.digest(readers.content()), ".pth")
    plain = readers.read_weights(readers.digest(readers.tensors()), ".safetensors")
    return [
        Target("manifest, altered", manifest, scramble, readers.read_manifest(template), True),
        Target(
            "manifest, right checksum", manifest, mutations.hostile_manifest, readers.read_manifest(template), False
        ),
        Target("shard", shard, scramble, readers.read_shard(template), True),
        Target("event log", log, scramble, readers.read_log(log), False),
        Target(
            "run directory",
            b"events.jsonl\0" + log,
            readers.alter_run(template),
            readers.read_run(template),
            False,
            writes=True,
        ),
        Target("torch zip, altered", zipped.getvalue(), scramble, weights, True),
        Target("torch zip, right checksums", zipped.getvalue(), mutations.hostile_zip, weights, False),
        Target("torch legacy, altered", legacy.getvalue(), scramble, weights, False),
        Target("torch legacy, other pickle", legacy.getvalue(), mutations.hostile_pickle, weights, False),
        Target("safetensors, altered", flat, scramble, plain, False),
        Target("safetensors, hostile header", flat, mutations.hostile_safetensors, plain, False),
    ]


def draw_for(target: Target, number: int) -> random.Random:
    return random.Random(f"{target.name} {number}")


def try_one(target: Target, number: int, place: Path) -> tuple[str, str | None]:
    """What came of one altered file, and what is wrong with that."""
    data = target.mutate(target.original, draw_for(target, number))
    try:
        outcome: str = target.read(data, place)
    except LastGoodError:
        return "refused", None
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error)[:300]
        return "failed", f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {text}"
    if outcome == "other" and target.exact and data != target.original:
        return "failed", "other bits than were written are read"
    return outcome, None


def _guard(target: Target, place: Path, problems: list[str]) -> None:
    """Limits of this process, and a watch over what it does."""
    size = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line)
    resource.setrlimit(resource.RLIMIT_AS, ((size << 10) + MEMORY_BYTES, resource.RLIM_INFINITY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    mine = (
        str(place),
        "/proc/",
        "/dev/null",
        "/sys/",
        sys.prefix,
        sys.base_prefix,
        str(Path(lastgood.__file__).parent),
    )

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            name = os.path.abspath(os.fsdecode(arguments[0]))
            if not name.startswith(mine) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                problems.append(f"it opened {name}")
        elif event in _FORBIDDEN and not target.writes and not _is_import(event, arguments):
            problems.append(f"it caused the event {event} {str(arguments)[:200]}")

    sys.addaudithook(watch)


def _is_import(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether it is a module of the libraries that is imported late, such as a codec."""
    code = arguments[0] if arguments else None
    return event == "exec" and getattr(code, "co_filename", "").startswith((sys.prefix, sys.base_prefix, "<frozen "))


def _batch(target: Target, begin: int, end: int, place: Path, at: mmap.mmap) -> int:
    """The child: reads the altered files `begin` to `end`."""
    logging.getLogger("lastgood").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    place.mkdir(exist_ok=True)
    notes, problems, counts = Notes(place.parent, begin), list[str](), collections.Counter[str]()
    target.read(target.original, place)  # Imports what is imported lazily, and must succeed.
    _guard(target, place, problems)
    for number in range(begin, end):
        at[:8] = number.to_bytes(8, "little")
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 15 * CPU_SECONDS)  # Asleep, and not busy.
        outcome, problem = try_one(target, number, place)
        counts[outcome] += 1
        if problem is not None or problems:
            notes.write("problem", number=number, problem="; ".join([*problems[:2], *([problem] if problem else [])]))
        problems.clear()
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    notes.write("counts", counts=counts)
    return 0


def run_target(target: Target, count: int, directory: Path, result: Result) -> None:
    """Read so many altered files of one kind."""
    begin, at = 0, mmap.mmap(-1, 8)
    place = directory / "hostile"
    while begin < count:
        end = min(begin + BATCH, count)
        place.mkdir()
        child = fork(lambda begin=begin, end=end: _batch(target, begin, end, place / "here", at), place / "log")
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        tried = end - begin
        for note in read_notes(place, begin):
            if note["what"] == "problem":
                result.failed.append(f"{target.name}, number {note['number']}: {note['problem']}")
        if code:
            number = int.from_bytes(at[:8], "little")
            tail = (place / "log").read_text(errors="replace")[-500:].replace("\n", " | ")
            result.failed.append(f"{target.name}, number {number}: the reader ended with {code} {tail}")
            tried = number + 1 - begin
        result.tried[target.name] += tried
        begin += max(tried, 1)
        shutil.rmtree(place)


def run(*, count: int, only: Sequence[str] = ()) -> Result:
    """So many altered files of each kind; of whole runs a tenth, since a job takes each."""
    jobs.limit_threads()
    result = Result("Hostile files")
    with result.timed(), scratch() as directory:
        make_template(directory / "template")
        for target in targets(directory / "template"):
            if not only or any(word in target.name for word in only):
                run_target(target, count // 10 if target.writes else count, directory, result)
    result.notes.append(
        f"Each is read in at most {CPU_SECONDS} s of processor time and {MEMORY_BYTES >> 20} MiB more memory; an audit "
        "hook sees that nothing is run, and nothing outside the directory written. Seeds: the kind and the number."
    )
    return result
