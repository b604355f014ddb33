"""Power cuts on real file systems: what was reported as saved is there after the reboot, whole."""

from __future__ import annotations

import ast
import os
import shutil

import pytest

from tests.faults import power
from tests.faults.test_crash import in_fork

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="needs loop devices"),
    pytest.mark.timeout(900),
]


def in_process(code: str) -> str:
    """What is printed in a process of its own, which forks; skips where file systems cannot be mounted."""
    printed = in_fork(
        f"from tests.faults import power\ntry:\n    {code}\nexcept power.NotHereError as e:\n    print('SKIP', e)"
    )
    if printed.startswith("SKIP"):
        pytest.skip(f"mounting is not allowed here: {printed[5:].strip()}")
    return printed


@pytest.mark.parametrize("system", power.SYSTEMS)
def test_what_was_reported_is_there_after_a_power_cut(system: str) -> None:
    for program in (power.SYSTEMS[system].make[0], power.SYSTEMS[system].mount[0]):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    code = f"r = power.run(cuts=20, systems=[{system!r}]); print([r.failed, sum(r.tried.values()), r.notes])"
    failed, cuts, reasons = ast.literal_eval(in_process(code))
    assert failed == []
    if reasons:
        pytest.skip(f"mounting is not allowed here: {reasons[0]}")
    assert cuts == 20


def test_a_job_without_fsync_is_noticed() -> None:
    code = (
        "from pathlib import Path; power.jobs.limit_threads(); d = power.scratch(); p = d.__enter__(); "
        "o = power.outer_disk(p); r = power.try_system('ext4', o.__enter__(), 3, world=2, synced=False); "
        "o.__exit__(None, None, None); d.__exit__(None, None, None); print(len(r) > 0, r)"
    )
    assert in_process(code).startswith("True")
