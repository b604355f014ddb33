"""Which programs are killed at which file operations: a few points in the tests, all of them in the full form."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

HERE = Path(__file__).parent
HUGGING_FACE = "torch,transformers.trainer,accelerate"
LIGHTNING = "torch,lightning.pytorch"
RACE = ("--until", "3")
"""These ranks do not wait for each other: one that comes late may find nothing left to do, and is not killed."""


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """A program, and how it is killed."""

    title: str
    program: str
    mode: Literal["before", "torn"] = "before"
    """Before each file operation and each sync, or inside of each first write."""
    ranks: int = 1
    quick: int = 5
    """The quick form takes every so many points."""
    full: int = 1
    """The full form too, where all would take hours. Odd where there are two ranks: each is the victim in turn."""
    preload: str = "torch"
    """Modules that are imported once, for all points."""
    options: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    """Options of `lastgood run`."""
    across: bool = False
    """The working directory is on another file system than the checkpoints, which are in memory."""


def _both(title: str, **arguments: Any) -> dict[str, Campaign]:
    """A campaign that kills before each operation, and one that kills in the middle of each write."""
    name = arguments["program"].removesuffix(".py") + arguments.pop("suffix", "")
    torn = arguments.pop("torn", {})
    torn = {"mode": "torn", **arguments, **torn}

    def each(what: str, every: int) -> str:
        return f"each {what}" if every == 1 else f"one in {every} {what}s"

    return {
        f"{name}-before": Campaign(title=f"{title}, before {each('operation', arguments.get('full', 1))}", **arguments),
        f"{name}-torn": Campaign(title=f"{title}, in the middle of {each('write', torn.get('full', 1))}", **torn),
    }


CAMPAIGNS: dict[str, Campaign] = {
    **_both("A script that overwrites its only file", program="naive.py", torn={"quick": 1}),
    "naive-2-before": Campaign(
        title="The same, 2 ranks, before each operation", program="naive.py", ranks=2, quick=9, options=RACE
    ),
    **_both(
        "A loop in which every rank renames, 2 ranks",
        program="every_rank_renames.py",
        ranks=2,
        options=RACE,
        torn={"quick": 1},
    ),
    **_both("GPT-SoVITS, latest", program="sovits.py", quick=9, run=("--preset", "gpt-sovits"), torn={"across": True}),
    **_both(
        "GPT-SoVITS, names by step",
        program="sovits.py",
        suffix="-by-step",
        quick=9,
        options=("--variable", "BY_STEP=1"),
        run=("--preset", "gpt-sovits"),
        torn={"across": True},
    ),
    **_both(
        "GPT-SoVITS, latest, saved by 2 ranks",
        program="sovits.py",
        suffix="-2",
        ranks=2,
        quick=61,
        run=("--preset", "gpt-sovits"),
        torn={"quick": 31, "across": True},
    ),
    **_both("Hugging Face Trainer", program="hf.py", quick=29, preload=HUGGING_FACE),
    **_both(
        "Hugging Face Trainer, save_total_limit=1",
        program="hf.py",
        suffix="-limit-1",
        quick=43,
        preload=HUGGING_FACE,
        options=("--variable", "LIMIT=1"),
        torn={"quick": 31},
    ),
    **_both(
        "Hugging Face Trainer, 2 ranks",
        program="hf.py",
        suffix="-2",
        quick=121,
        ranks=2,
        preload=HUGGING_FACE,
        full=3,
        torn={"quick": 61, "full": 3},
    ),
    **_both('Lightning, ckpt_path="last"', program="lightning_last.py", quick=11, preload=LIGHTNING),
}


def crash(
    campaign: Campaign,
    memory: Path,
    disk: Path,
    *,
    stride: int,
    first: int = 0,
    protected: bool = True,
    timeout: float = 280,
) -> tuple[list[dict[str, Any]], str]:
    """What came of each point, and the output.

    Args:
        memory: a directory in memory, for the checkpoints.
        disk: one on another file system, for the working directory where that is to be elsewhere.
        timeout: seconds for all points.
    """
    prefix = [sys.executable, "-m", "lastgood.cli.run", *campaign.run, "--"] if protected else []
    command = [*prefix, sys.executable, str(HERE / "crash.py"), str(HERE / "programs" / campaign.program), str(memory)]
    command += ["--mode", campaign.mode, "--ranks", str(campaign.ranks), "--preload", campaign.preload]
    command += ["--stride", str(stride), "--first", str(first), *campaign.options]
    command += ["--cwd", str(disk)] if campaign.across else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=memory)
    output = done.stdout + done.stderr
    assert done.returncode in (0, 74), output
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('[{"point"'))), output


def crash_everywhere(campaign: Campaign, memory: Path, disk: Path, workers: int) -> list[dict[str, Any]]:
    """All points, or one in so many, shared out among `workers` processes."""

    def share(first: int) -> list[dict[str, Any]]:
        (memory / str(first)).mkdir(exist_ok=True)
        points = {"stride": workers * campaign.full, "first": first * campaign.full}
        return crash(campaign, memory / str(first), disk, timeout=4 * 3600, **points)[0]

    with ThreadPoolExecutor(workers) as pool:
        return [result for results in pool.map(share, range(workers)) for result in results]


def lost(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points after which the program did not come back to what it had saved last, or ended otherwise than it does
    from the same checkpoint undisturbed."""
    return [
        result
        for result in results
        if result["killed"]
        and (
            any(result["resume_codes"])
            or int(result["resumed"] or -1) < int(result["saved"] or 0)
            or not result["ended"]
            or result["ended"] != result["expected"]
        )
    ]
