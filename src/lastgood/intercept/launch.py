"""Start a program so that its saves are safe, wait for it, and say what was done."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from lastgood.errors import LastGoodError
from lastgood.intercept.runtime import journal
from lastgood.intercept.runtime.report import FIELDS
from lastgood.intercept.runtime.settings import VARIABLE, Settings

INJECT = Path(__file__).with_name("inject")
INJECT_VARIABLE = "LASTGOOD_INJECT"
LAST_SAVE_FAILED = 74
"""The exit code of a program that ended with 0 although its last save failed (EX_IOERR of sysexits.h)."""
PTH = "lastgood_run.pth"
_PTH_LINE = f"import os, sys; p = os.environ.get('{INJECT_VARIABLE}'); p and (sys.path.append(p), __import__('_lastgood_hook').install())\n"  # noqa: E501


@dataclass(frozen=True)
class Result:
    """How a program under `lastgood run` ended."""

    code: int
    """The exit code for our caller."""
    counts: dict[str, float]
    """Sums over all processes, by the names in `report.FIELDS`."""
    last_failed: list[str]
    """The last save of each process whose last save failed."""
    seconds: float


def environment(settings: Settings, base: dict[str, str] | None = None) -> dict[str, str]:
    """The environment that brings the safety to every Python below."""
    result = dict(os.environ if base is None else base)
    # An empty entry is the working directory; an empty variable has no entries.
    before = result.get("PYTHONPATH", "")
    others = [entry for entry in before.split(os.pathsep) if entry != str(INJECT)] if before else []
    result["PYTHONPATH"] = os.pathsep.join([str(INJECT), *others])
    result[INJECT_VARIABLE] = str(INJECT)
    result[VARIABLE] = settings.to_json()
    return result


def run(command: list[str], settings: Settings) -> Result:
    """Run a command until it ends.

    Raises:
        LastGoodError: the command could not be started.
    """
    begin = time.monotonic()
    state = tempfile.mkdtemp(prefix="lastgood-run-")
    settings = replace(settings, run=settings.run or uuid.uuid4().hex, state=state, start=os.getcwd())
    try:
        code = _run(command, environment(settings))
        counts, failed = _collect(Path(state), settings.run)
    finally:
        shutil.rmtree(state, ignore_errors=True)
    if code == 0 and failed:
        code = LAST_SAVE_FAILED
    return Result(code, counts, failed, time.monotonic() - begin)


def _run(command: list[str], variables: dict[str, str]) -> int:
    try:
        process = subprocess.Popen(command, env=variables)
    except OSError as error:
        raise LastGoodError(f"{command[0]} could not be started: {error.strerror}. Check its name and path.") from error
    with _forwarding(process):
        code = process.wait()
    return code if code >= 0 else 128 - code  # Ended by a signal: the code that a shell gives.


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Hand signals on to the program: how it ends is its own affair."""

    def forward(number: int, frame: FrameType | None) -> None:
        # A terminal sends Ctrl-C to the whole group: the program has it already, and we only wait. On Windows every
        # signal comes in that way, and there is no other way to hand one on.
        if os.name != "nt" and (number != signal.SIGINT or not sys.stdin.isatty()):
            process.send_signal(number)

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGBREAK")
    before: dict[int, Any] = {}
    for number in (getattr(signal, name, None) for name in names):
        if number is not None:
            before[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _made_good(content: dict[str, Any], run: str) -> bool:
    """Whether a process of this run saved later what the last save of another was to save: torchrun restarts ranks."""
    versions = journal.read(content["last_failed_path"])
    return any(version.run == run and version.time > content["last_failed_at"] for version in versions)


def _collect(state: Path, run: str) -> tuple[dict[str, float], list[str]]:
    counts: dict[str, float] = dict.fromkeys(FIELDS, 0)
    failed = []
    for path in state.glob("*.json"):
        try:
            content = json.loads(path.read_bytes().split(b"\n")[0])
        except ValueError:
            continue  # The process was killed while it wrote its counts.
        for name in FIELDS:
            counts[name] += content.get(name, 0)
        if content.get("last_failed") and not _made_good(content, run):
            failed.append(str(content["last_failed"]))
    return counts, failed


def summary(result: Result) -> str:
    """What was done, in one paragraph."""
    counts = result.counts
    saves = int(counts["saves"])
    text = (
        f"lastgood run: {saves} files saved, {counts['bytes'] / 1e6:.1f} MB in {counts['seconds']:.2f} s of "
        f"{result.seconds:.0f} s; {int(counts['collisions'])} collisions avoided, {int(counts['retries'])} retries, "
        f"{int(counts['failures'])} failed"
    )
    if counts["set_aside"]:
        text += f"; {int(counts['set_aside'])} incomplete checkpoints set aside"
    if counts["fallbacks"]:
        text += f"; {int(counts['fallbacks'])} damaged files replaced by earlier versions"
    if counts["refusals"]:
        text += f"; {int(counts['refusals'])} damaged files refused"
    for message in result.last_failed:
        text += f"\nlastgood run: the last save FAILED: {message}"
    return text


def blind_python(command: list[str]) -> str | None:
    """Why the Python of a command would ignore us, in a sentence; None when it does not, or is no Python."""
    if not os.path.basename(command[0]).lower().startswith("python"):
        return None
    flags = _flags(command[1:])
    probe = [command[0], *flags, "-c", "import sys; sys.exit(0 if '_lastgood_hook' in sys.modules else 93)"]
    try:
        code = subprocess.run(
            probe, env=environment(Settings()), timeout=60, stdin=subprocess.DEVNULL, capture_output=True
        ).returncode
    except (OSError, subprocess.TimeoutExpired):
        return None  # Whatever is wrong shows when the command itself starts.
    if code != 93:
        return None
    if any("S" in flag for flag in flags if flag[1:2] not in ("-", "X", "W")):
        return (
            f"{command[0]} is started with -S, which switches off every way in: its saves would NOT be made safe. "
            "Start it without."
        )
    why = "is started so that it ignores PYTHONPATH"
    if any(Path(shutil.which(command[0]) or command[0]).parent.glob("python*._pth")):
        why = "is an embeddable Python with a ._pth file, which ignores PYTHONPATH"
    return f"{command[0]} {why}: its saves would NOT be made safe. Run `lastgood run --install {command[0]}` once."


def _flags(arguments: list[str]) -> list[str]:
    """The options of Python itself in what follows its name: up to the script, -c or -m."""
    flags: list[str] = []
    rest = iter(arguments)
    for part in rest:
        if part == "-" or not part.startswith("-"):
            break
        if part.startswith("--"):
            flags += [part, *([next(rest, "")] if part == "--check-hash-based-pycs" else [])]
            continue
        # Letters may share a dash: -Ic, -uX utf8. The first of these four takes the rest of the word, or the next.
        letters = re.match(r"-[^cmXW]*", part)
        end = letters.end() if letters else 0
        taken = part[end : end + 1]
        if end > 1:
            flags.append(part[:end])
        if taken in ("c", "m"):
            break
        if taken:
            flags.append("-" + taken + (part[end + 1 :] or next(rest, "")))
    return flags


def install(python: str) -> str:
    """Put one .pth file into a Python that ignores PYTHONPATH. Returns its path.

    Raises:
        LastGoodError: the Python cannot be asked, or its directory cannot be written to.
    """
    path = _pth(python)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_PTH_LINE, encoding="utf-8")
    except OSError as error:
        raise LastGoodError(f"{path} cannot be written: {error.strerror}. Run this as its owner.") from error
    if blind_python([python]):
        path.unlink()
        raise LastGoodError(
            f"{python} does not read .pth files. Embeddable Pythons do once the line `import site` in their ._pth file "
            "is not a comment; then run this again. Nothing was changed."
        )
    return str(path)


def uninstall(python: str) -> str | None:
    """Remove what :func:`install` put there. Returns its path, or None where there was nothing."""
    path = _pth(python)
    if not path.is_file():
        return None
    path.unlink()
    return str(path)


def _pth(python: str) -> Path:
    ask = [python, "-I", "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise LastGoodError(f"{python} cannot be asked where its packages are: {error}") from error
    return Path(answer.stdout.strip()) / PTH
