"""Two jobs on one run, vanished machines, and runs that are copied, moved and put back: one job at most commits."""

from __future__ import annotations

import os

import pytest

from tests.faults.test_crash import campaign, in_fork

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGSTOP; Windows has its own campaign"),
    pytest.mark.timeout(900),
]


def test_jobs_that_want_one_run() -> None:
    assert "0 failed" in campaign("jobs", "--count", "1")


def test_a_job_that_does_not_look_before_it_commits_is_noticed() -> None:
    """It is noticed when the first job stands still inside of a save, which a single try may miss."""
    printed = in_fork(
        "import random",
        "from lastgood.generation import Holder",
        "from tests.faults import twojobs",
        "twojobs.jobs.limit_threads()",
        "Holder.check = lambda self: None",
        "for seed in range(8):",
        "    with twojobs.scratch() as directory:",
        "        problem = next(twojobs.vanished(directory, random.Random(seed)), None)",
        "    if problem:",
        "        break",
        "print(problem)",
    )
    assert "the replaced job" in printed
