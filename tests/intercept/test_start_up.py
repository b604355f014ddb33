"""What `lastgood run` costs a Python process that never imports torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lastgood.intercept import launch

LIMIT = 0.030
"""Seconds."""
OURS = {"sitecustomize", "_lastgood_hook", "__future__"}


def environments() -> tuple[dict[str, str], dict[str, str]]:
    """That of a plain Python, and the same below `lastgood run`."""
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return plain, launch.environment(launch.Settings(run="r"), plain)


def cpu_seconds(environment: dict[str, str]) -> float:
    """Processor time of one Python that does nothing: unlike the time on the clock, it leaves out what others do."""
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", "pass"], environment)
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    return usage.ru_utime + usage.ru_stime


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX: wait4")
def test_a_python_without_torch_starts_at_most_30_ms_later() -> None:
    plain, below = environments()
    # In turns, so that both see the same machine; the least, since disturbances only add.
    pairs = [(cpu_seconds(plain), cpu_seconds(below)) for _ in range(25)]
    without, with_us = (min(times) for times in zip(*pairs, strict=True))
    assert with_us - without <= LIMIT, f"{1e3 * without:.1f} ms without, {1e3 * with_us:.1f} ms with `lastgood run`"


def test_a_python_without_torch_loads_the_hook_and_nothing_more() -> None:
    shown = [
        set(
            subprocess.check_output(
                [sys.executable, "-c", "import sys; print(*sys.modules)"], env=one, text=True
            ).split()
        )
        for one in environments()
    ]
    more = shown[1] - shown[0]
    assert more <= OURS, sorted(more - OURS)
    assert {"sitecustomize", "_lastgood_hook"} <= shown[1]
