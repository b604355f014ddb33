"""What a manifest says about the program that made it, and the run's event log."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import platform
import sys
import threading
import time
from pathlib import Path

from lastgood import disk
from lastgood.catalog import Entry
from lastgood.values import Json

_log = logging.getLogger("lastgood")
EVENTS = "events.jsonl"
_LATE_LINES = 1000


_PACKAGES = ("safetensors", "numpy")
_INTEGRATIONS = ("lightning", "pytorch_lightning", "transformers", "accelerate")


def lastgood_version() -> str:
    return _version("lastgood") or "not installed"


def _version(package: str) -> str | None:
    """Of an installed package; it is not imported."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """The versions that a restored run may want to know of; of integrations, those that the program has imported."""
    import torch  # Only here: the event log and the command line do without it.

    packages = [*_PACKAGES, *(name for name in _INTEGRATIONS if sys.modules.get(name) is not None)]
    found = {name: version for name in packages if (version := _version(name)) is not None}
    return {
        "lastgood": lastgood_version(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.platform(),
        **found,
    }


def describe() -> dict[str, Json]:
    """The command line of this program, and the git commit of the directory that its script lies in."""
    script = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path()
    return {"command": list(sys.argv), "git_commit": git_commit(script.absolute().parent)}


def git_commit(directory: Path) -> str | None:
    """The commit that is checked out in `directory` or above it. Reads git's files: no process is started."""
    for here in (directory, *directory.parents):
        git = here / ".git"
        try:
            if disk.exists(git):
                return _head(git)
        except (OSError, ValueError):
            return None
    return None


def _head(git: Path) -> str | None:
    def text(path: Path) -> str:
        return disk.read_bytes(path, limit=1 << 24).decode()

    if not git.is_dir():
        # A worktree: the file names the directory that holds its HEAD.
        git = (git.parent / text(git).removeprefix("gitdir:").strip()).resolve()
    head = text(git / "HEAD").strip()
    if not head.startswith("ref: "):
        return head
    ref = head.removeprefix("ref: ")
    common = (git / text(git / "commondir").strip()).resolve() if disk.exists(git / "commondir") else git
    if disk.exists(common / ref):
        return text(common / ref).strip()
    for line in text(common / "packed-refs").splitlines():
        if line.endswith(" " + ref):
            return line.split(" ")[0]
    return None


class Events:
    """The event log of a run: one JSON object a line, written by rank 0 of the job that holds it."""

    def __init__(self, run: Path, generation: int, group: int | None = None) -> None:
        self._path = run / EVENTS
        self._group = group
        self.generation = generation
        self._lock = threading.Lock()  # The mirror's thread writes events too.
        self._late: list[str] = []
        """Lines that the disk did not take: they go before the next one."""

    def write(self, event: str, **fields: Json) -> None:
        """Add a line. The log is for people: when the disk does not take it, training goes on."""
        line = {"time": time.time(), "generation": self.generation, "event": event, **fields}
        text = json.dumps(_finite(line), ensure_ascii=False, allow_nan=False)
        with self._lock:
            self._late = [*self._late[-_LATE_LINES:], text]
            try:
                disk.append_line(self._path, "\n".join(self._late))
                self._late = []
                if self._group is not None:
                    disk.give_to_group(self._path, self._group)
            except OSError as error:
                _log.warning("%s could not be written: %s. It is tried again with the next event.", self._path, error)

    def report(self, event: str, entry: Entry, why: str) -> None:
        """A checkpoint was skipped or deleted."""
        self.write(event, checkpoint=entry.name, step=entry.step, why=why)
        level = logging.WARNING if event == "skip" else logging.INFO
        _log.log(level, "%s %s: %s", {"skip": "skipped", "delete": "deleted"}.get(event, event), entry.name, why)


def _finite(value: Json) -> Json:
    """`value` with inf and nan as the manifest writes them: JSON has no form for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"$": "float", "v": repr(value)}
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value


def read_events(run: Path) -> list[dict[str, Json]]:
    """The event log, oldest first. A line that was cut off by a crash is left out."""
    try:
        data = disk.read_bytes(run / EVENTS, limit=1 << 30)
    except (OSError, ValueError):
        return []
    found = []
    for line in data.splitlines():
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(item, dict):
            found.append(item)
    return found
