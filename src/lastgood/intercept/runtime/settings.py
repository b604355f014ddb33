"""What `lastgood run` was asked for, as every process below it reads it from its environment."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field

VARIABLE = "LASTGOOD_RUN"
PRIVATE = ".lastgood"
"""The directory beside the saved files that holds the journal, temporary files and earlier versions."""
SIDE_FILES = (".json", ".txt", ".npy", ".npz", ".yaml", ".yml", ".pkl", ".pickle", ".model", ".metadata")
"""Written safely in a directory of checkpoints only: elsewhere they are data, by the hundred thousand."""


@dataclass(frozen=True)
class Settings:
    """The options of one `lastgood run`; docs/run.md explains each."""

    run: str = ""
    """Unique for each start of `lastgood run`."""
    state: str = ""
    """A directory where the processes leave their counts for the summary; empty: nowhere."""
    save_on: str = "auto"
    """"auto" or "rank0"."""
    history: int = 1
    """Earlier versions to keep of a file that is overwritten."""
    fallback: bool = False
    """Load the newest intact version in place of a damaged one."""
    complete: list[str] = field(default_factory=list)
    """Patterns of directories, or comma-separated patterns of files, that are one checkpoint."""
    match: list[str] = field(default_factory=list)
    """Patterns of further file names that count as checkpoints."""
    mirror: str = ""
    """A directory for copies; empty: none."""
    patience: float = 10.0
    """Seconds to try again while another program holds a file open."""
    start: str = ""
    """The working directory of the run: mirrored paths are relative to it where they lie below it."""

    def to_json(self) -> str:
        return json.dumps(self.__dict__)


def from_environment() -> Settings:
    """The settings of this process. Raises ValueError, with the variable's name, when they cannot be read."""
    text = os.environ.get(VARIABLE, "{}")
    try:
        known = {name: value for name, value in json.loads(text).items() if name in Settings.__dataclass_fields__}
        return Settings(**known)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"the variable {VARIABLE} was changed and cannot be read: {error}") from error
