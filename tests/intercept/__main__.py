"""Programs that know nothing of lastgood, killed at every file operation: the full form.

    python -m tests.intercept                   all campaigns
    python -m tests.intercept naive-before      one of them

With --record, the figures go into docs/run.md. The exit code is 1 when anything was lost.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from campaigns import CAMPAIGNS, crash_everywhere, lost

from tests.faults.report import Result, record

NOTE = (
    "The checkpoints are on tmpfs. In the middle of writes, the working directory of GPT-SoVITS is on a disk, so that "
    "its moves go across file systems."
)
PAGE = Path(__file__).parents[2] / "docs" / "run.md"


def run(names: list[str], workers: int) -> Result:
    """Kill each program everywhere: its checkpoints are in memory, on tmpfs, as its working directory mostly is."""
    result = Result("Programs killed at every file operation of their saves")
    for name in names:
        campaign = CAMPAIGNS[name]
        memory = Path(tempfile.mkdtemp(prefix="lastgood-test-", dir="/dev/shm"))
        disk = Path(tempfile.mkdtemp(prefix="lastgood-test-"))
        with result.timed():
            points = crash_everywhere(campaign, memory, disk, workers)
        shutil.rmtree(memory)
        shutil.rmtree(disk)
        result.tried[campaign.title] += sum(point["killed"] for point in points)
        result.failed += [f"{campaign.title}: {point}" for point in lost(points)]
        print(f"{name}: {result.tried[campaign.title]} killed, {len(lost(points))} lost", *lost(points), flush=True)
    result.notes.append(NOTE)
    return result


def main(arguments: list[str]) -> int:
    """Run the campaigns that were asked for. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.intercept", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *CAMPAIGNS], metavar="CAMPAIGN", help=", ".join(CAMPAIGNS))
    parser.add_argument("--record", action="store_true", help="write the figures into docs/run.md")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side")
    options = parser.parse_args(arguments)
    result = run(options.names or list(CAMPAIGNS), options.workers)
    print(result.text())
    if options.record:
        wanted = [argument for argument in arguments if argument != "--record"]
        record(" ".join(["intercept", *options.names]), result, " ".join(["python -m tests.intercept", *wanted]), PAGE)
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
