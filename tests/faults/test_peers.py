"""Kills at system calls, flipped bits and a full disk: lastgood loses nothing, and the method notices who does."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

from tests.faults.test_crash import campaign

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="needs fork and strace: not on Windows"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs strace of Linux"),
    pytest.mark.timeout(900),
]


def test_what_is_lost() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    report = campaign("peers", "--count", "8", "--files", "lastgood,torch.save,safetensors")
    assert "0 failed" in report
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in report.splitlines() if line.startswith("|")}
    ours, theirs = rows["lastgood"], rows["torch.save"]
    assert int(ours[0]) >= 6 and int(ours[1]) == int(ours[0]), "every kill is followed by the newest step"
    assert int(theirs[3]) > 0, "torch.save over the only file loses it"
    assert int(theirs[9]) > 0, "flipped bits are loaded by torch.load"
