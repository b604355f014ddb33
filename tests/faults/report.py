"""What a campaign came to, for the screen and for docs/faults.md."""

from __future__ import annotations

import datetime
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"


@dataclass
class Result:
    """The figures of a campaign."""

    title: str
    tried: Counter[str] = field(default_factory=Counter)
    """By kind of fault, how many were tried."""
    failed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What else there is to know: what was found to be redundant, what could not be tried and why."""
    tables: list[str] = field(default_factory=list)
    """Further tables, in Markdown."""
    seconds: float = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds += time.monotonic() - began

    @property
    def summary(self) -> str:
        total = sum(self.tried.values())
        return f"{self.title}: {total} tried, {total - len(self.failed)} passed, {len(self.failed)} failed"

    def text(self) -> str:
        """The figures as Markdown."""
        lines = [f"{self.summary}, in {self.seconds / 60:.1f} minutes.", "", "| fault | tried |", "| --- | ---: |"]
        lines += [f"| {what} | {count} |" for what, count in self.tried.items()]
        for table in self.tables:
            lines += ["", table]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        if self.failed:
            lines += ["", "Failed:", "", *(f"- {problem.splitlines()[0]}" for problem in self.failed[:50])]
        return "\n".join(lines)


def machine() -> str:
    """The machine in general terms, and the versions."""
    import torch

    import lastgood.program

    return (
        f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, lastgood {lastgood.program.lastgood_version()}"
    )


def record(name: str, result: Result, command: str, page: Path = PAGE) -> None:
    """Put the result into its section of the page, in place of the one before."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    body = f"{begin}\n`{command}`, {today}, on {machine()}.\n\n{result.text()}\n{end}"
    text = page.read_text()
    if begin not in text:
        text = text.rstrip() + f"\n\n## {result.title}\n\n{begin}\n{end}\n"
    text = re.sub(re.escape(begin) + r".*?" + re.escape(end), lambda _: body, text, flags=re.DOTALL)
    page.write_text(text)
