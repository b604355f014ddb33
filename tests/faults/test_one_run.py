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
    printed = in_fork(
        "import random",
        "from lastgood.generation import Holder",
        "from tests.faults import twojobs",
        "twojobs.jobs.limit_threads()",
        "Holder.check = lambda self: None",
        "with twojobs.scratch() as directory:",
        "    print(next(twojobs.vanished(directory, random.Random(1)), 'nothing is wrong'))",
    )
    assert "the replaced job" in printed
