"""What the others lose: kills at every system call that changes the disk, flipped bits, and full disks, for each peer.

A forked child saves; strace kills it when it enters a system call. So nothing of the peer is touched, and what its
C++ or Rust code does counts too.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.faults import job as jobs
from tests.faults.failing import small_disk
from tests.faults.job import Notes, read_notes
from tests.faults.peers import PEERS, Peer, silent
from tests.faults.processes import fork, scratch
from tests.faults.report import Result

CALLS = (
    "openat,creat,write,pwrite64,writev,pwritev,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,"
    "ftruncate,fsync,fdatasync,link,linkat,symlink,symlinkat,copy_file_range,sendfile"
)
BEFORE, LAST = 3, 5
"""Steps 1 to 3 are there; the child that is killed would save 4 and 5."""
_LINE = re.compile(r"^(?:\[pid +)?(\d+)\]? +(\w+)\((.*)$")


def in_child(action: Callable[[], object], place: Path, seconds: float = 200.0) -> int:
    """Run it in a child. Returns the exit code; -9 too where it takes longer."""
    child = fork(lambda: int(bool(action())), place / "log")
    return _end(child, seconds)


def _end(child: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            end += 1e9
        time.sleep(0.002)


def save(peer: Peer, directory: Path, begin: int, end: int, place: Path, *, traced: Sequence[str] = ()) -> int:
    """Save in a child, under strace with these options where there are any. The steps that it reports are noted."""

    def body() -> int:
        out = Notes(place, 0)
        if traced:
            os.kill(os.getpid(), signal.SIGSTOP)
        with silent():
            peer.save(directory, begin, end, lambda step: out.write("saved", step=step))
        return 0

    if not traced:
        return in_child(body, place)
    child = fork(body, place / "log")
    os.waitpid(child, os.WUNTRACED)
    tracer = subprocess.Popen(["strace", "-f", "-p", str(child), *traced], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    if "attached" not in tracer.stderr.readline():
        os.kill(child, signal.SIGKILL)
        raise OSError("strace cannot attach")
    os.kill(child, signal.SIGCONT)
    try:
        return _end(child, 200.0)
    finally:
        tracer.stderr.close()
        tracer.wait()


def load(peer: Peer, directory: Path, place: Path) -> tuple[str, int | None]:
    """What resuming gives: "step" and the step, "wrong bits", or "error". It is tried in a copy: some write."""
    copy = place / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(directory, copy)

    def body() -> int:
        with silent():
            try:
                step = peer.load(copy)
            except BaseException as error:
                Notes(place, 1).write("load", outcome="error", step=None, text=f"{type(error).__name__}: {error}"[:300])
            else:
                outcome = "wrong bits" if step is None else "step"
                Notes(place, 1).write("load", outcome=outcome, step=step)
        return 0

    (place / "1.jsonl").unlink(missing_ok=True)
    in_child(body, place)
    found = read_notes(place, 1)
    return (found[0]["outcome"], found[0]["step"]) if found else ("error", None)


def points(log: Path, directory: Path) -> list[tuple[str, int]]:
    """The system calls on files below a directory: name, and the how many-th of its thread."""
    counts: Counter[tuple[str, str]] = Counter()
    found: dict[tuple[str, int], None] = {}
    for line in log.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        thread, name, rest = match.groups()
        counts[thread, name] += 1
        reads = name == "openat" and "O_CREAT" not in rest and "O_TRUNC" not in rest
        if str(directory) in rest and not reads:
            found[name, counts[thread, name]] = None
    return list(found)


def killed(peer: Peer, template: Path, place: Path, limit: int) -> Iterator[str]:
    """Kill at every system call, or at `limit` of them. Yields what each came to."""
    work, log = place / "work", place / "strace"
    shutil.copytree(template, work)
    save(peer, work, BEFORE + 1, LAST, place, traced=["-y", "-o", str(log), "-e", f"trace={CALLS}"])
    found = points(log, work)
    step = max(1, -(-len(found) // limit))
    for name, number in found[::step]:
        shutil.rmtree(work)
        shutil.copytree(template, work)
        (place / "0.jsonl").unlink(missing_ok=True)
        inject = ["-o", "/dev/null", "-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={number}"]
        if save(peer, work, BEFORE + 1, LAST, place, traced=inject) != -signal.SIGKILL:
            continue  # The order of its threads was another one this time.
        reported = max([BEFORE, *(note["step"] for note in read_notes(place, 0))])
        outcome, loaded = load(peer, work, place)
        if outcome == "step" and loaded is not None:
            yield "newest" if loaded >= reported else "older"
        else:
            yield outcome


def flipped(peer: Peer, template: Path, place: Path, count: int) -> Iterator[str]:
    """Flip single bits anywhere in the files. Yields what each came to."""
    work, draw = place / "work", random.Random(peer.name)
    files = [path for path in sorted(template.rglob("*")) if path.is_file()]
    sizes = [path.stat().st_size for path in files]
    for _ in range(count):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(template, work)
        path = work / draw.choices(files, sizes)[0].relative_to(template)
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        outcome, loaded = load(peer, work, place)
        yield outcome if outcome != "step" else "newest" if loaded == BEFORE else "older"


def full(peer: Peer, template: Path, place: Path) -> tuple[str, str]:
    """A disk with too little room for the next save: whether that is reported, and what can be resumed then."""
    with small_disk(place / "disk", 8 << 20) as disk:
        work = disk / "work"
        shutil.copytree(template, work)
        room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "ballast").write_bytes(bytes(room))
        (place / "0.jsonl").unlink(missing_ok=True)
        code = save(peer, work, BEFORE + 1, BEFORE + 1, place)
        told = any(note["step"] > BEFORE for note in read_notes(place, 0))
        (disk / "ballast").unlink()
        outcome, step = load(peer, work, place)
    report = "reported" if code and not told else "no room needed" if step == BEFORE + 1 else "not reported"
    return report, f"step {step}" if outcome == "step" else outcome


def row(peer: Peer, directory: Path, kills: int, flips: int, result: Result) -> str:
    """All faults of one peer, as a line of the table."""
    place, template = directory / "place", directory / "template"
    for path in (place, template):
        path.mkdir()
    with silent():
        peer.prepare()
    code = save(peer, template, 1, BEFORE, place)
    if code or load(peer, template, place) != ("step", BEFORE):
        return f"| {peer.name} | could not be tried: {(place / 'log').read_text()[-200:].splitlines()[-1:]} |"
    died, rotten = Counter(killed(peer, template, place, kills)), Counter(flipped(peer, template, place, flips))
    try:
        reported, left = full(peer, template, place)
    except OSError as error:
        reported, left = "not tried", str(error)[:60]
    for path in (place, template):
        shutil.rmtree(path)
    result.tried[f"{peer.name}: killed"] = died.total()
    result.tried[f"{peer.name}: bits flipped"] = rotten.total()
    if peer.name == "lastgood":
        bad = died["older"] + died["wrong bits"] + died["error"] + rotten["wrong bits"] + rotten["error"]
        bad += (reported, left) != ("reported", f"step {BEFORE}")
        result.failed += [f"lastgood: killed {dict(died)}, flipped {dict(rotten)}, full {reported} {left}"] * bool(bad)
    cells = [died.total(), died["newest"], died["older"], died["error"], died["wrong bits"]]
    cells += [rotten.total(), rotten["newest"], rotten["older"], rotten["error"], rotten["wrong bits"], reported, left]
    return f"| {peer.name} | " + " | ".join(map(str, cells)) + " |"


_COLUMNS = (
    "", "kills", "newest resumed", "older resumed", "error, nothing resumed", "wrong bits", "flips", "no effect",
    "older resumed", "error, nothing resumed", "wrong bits loaded", "full disk", "then resumes",
)  # fmt: skip
HEAD = f"| {' | '.join(_COLUMNS)} |\n|---|{'---:|' * 10}---|---|"


def run(*, kills: int, flips: int, names: Sequence[str] = ()) -> Result:
    """The table. Only failures of lastgood count as failures."""
    jobs.limit_threads()
    result = Result("What is lost: lastgood and its peers")
    if shutil.which("strace") is None:
        result.notes.append("strace is not installed: nothing was tried")
        return result
    lines = [HEAD]
    with result.timed(), scratch() as directory:
        for peer in PEERS:
            if names and not any(name in peer.name for name in names):
                continue
            lines.append(
                row(peer, directory, kills, flips, result) if peer.here else f"| {peer.name} | not installed |"
            )
    result.tables.append("\n".join(lines))
    result.notes.append(
        "Each saves small tensors three times, and then twice more while it is killed by strace when it enters a "
        f"system call that changes its files (spread over at most {kills} of them). Newest: the last step that had "
        "been reported, or a later one. Each is used in its usual way with two checkpoints kept, where it keeps any; "
        "torch.save and save_file replace one file. An error means that a person has to find and remove what is broken."
    )
    return result
