"""What of the core's tests is not run under Wine, with the reasons: a pytest plugin, and the list.

Whatever is not named here, and has no reason of its own to skip on Windows, runs there.
"""

from __future__ import annotations

import os

import pytest

FORK = "needs fork"
COMPILER = "Wine: there is no compiler for torch.compile"

LEFT_OUT: dict[str, str] = {
    "test_cuda.py": "needs CUDA",
    "test_end_of_program.py": FORK,
    "test_fork.py": FORK,
    "test_macos.py": "needs POSIX: macOS is one",
    "test_steady.py::test_a_compiled_step_is_waited_for_or_makes_nothing_steady": COMPILER,
    "cli/test_ls_show.py::test_ten_thousand_checkpoints_are_listed_in_seconds": "Wine: 20,000 new files take minutes",
}
"""Test files, test functions and single cases, named as pytest does without the directory; and why."""


def reason(nodeid: str) -> str | None:
    """Why a test is left out; None when it runs."""
    name = nodeid.replace("\\", "/").rsplit("tests/", 1)[-1]
    file, _, function = name.partition("::")
    for key in (name, f"{file}::{function.partition('[')[0]}", file):
        if key in LEFT_OUT:
            return LEFT_OUT[key]
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is listed."""
    if os.name == "nt":
        for item in items:
            why = reason(item.nodeid)
            if why is not None:
                item.add_marker(pytest.mark.skip(reason=why))
