"""`lastgood run` with torch 2.0.1, the oldest that it is for: what it patches is as it was three years before."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from test_race import NEVER, race

from lastgood.intercept import journal

OLDEST = os.environ.get("LASTGOOD_OLDEST_TORCH", "")
pytestmark = [
    pytest.mark.skipif(os.name != "nt", reason="needs Windows"),
    pytest.mark.skipif(not OLDEST, reason="needs LASTGOOD_OLDEST_TORCH, a directory with torch 2.0.1"),
    pytest.mark.timeout(600),
]

PROGRAM = """
    import inspect, os, shutil
    import numpy, torch
    from safetensors.torch import load_file, save_file

    assert torch.__version__.startswith("2.0.1"), torch.__version__
    assert list(inspect.signature(torch.save).parameters)[:2] == ["obj", "f"]
    model = torch.nn.Linear(20, 20)
    optimizer = torch.optim.Adam(model.parameters())
    for step in (1, 2, 3):
        model(torch.ones(20)).sum().backward()
        optimizer.step()
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, "last.pth")
        with open("open.pth", "wb") as file:
            torch.save(state, file)
        torch.save(state, "tmp.pth")
        shutil.move("tmp.pth", "moved.pth")
        torch.save(state, "tmp.pth")
        os.replace("tmp.pth", "replaced.pth")
    torch.save(state, "old.pth", _use_new_zipfile_serialization=False)
    save_file(model.state_dict(), "model.safetensors")
    numpy.savez("state.npz", a=numpy.ones(9))
    numpy.save("state.npy", numpy.ones(9))
    for name in ("last", "open", "moved", "replaced", "old"):
        loaded = torch.load(f"{name}.pth")
        assert loaded["step"] == 3 and torch.equal(loaded["model"]["weight"], model.weight), name
    assert torch.equal(load_file("model.safetensors")["weight"], model.weight)
    assert sorted(os.listdir()) == sorted(NAMES), os.listdir()
    with open("last.pth", "r+b") as file:
        file.seek(500)
        file.write(b"damage")
    try:
        torch.load("last.pth")
    except RuntimeError as error:
        print("REFUSED", error)
"""
NAMES = {f"{name}.pth" for name in ("last", "open", "moved", "replaced", "old")}
NAMES |= {"model.safetensors", "state.npz", "state.npy", "script.py"}


@pytest.fixture(autouse=True)
def oldest_torch_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([OLDEST, os.environ.get("PYTHONPATH", "")]))


def test_saves_loads_and_moves(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"NAMES = {NAMES!r}\n" + textwrap.dedent(PROGRAM), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "lastgood", "run", "--", sys.executable, str(script)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    assert done.returncode == 0, done.stdout
    assert "22 files saved" in done.stdout and "NOT made safe" not in done.stdout
    assert "last.pth is damaged" in done.stdout and "The newest intact version is" in done.stdout
    findings = journal.verify(tmp_path)
    assert [Path(finding.path).name for finding in findings if finding.damage] == ["last.pth"], findings
    assert {Path(finding.path).name for finding in findings} >= NAMES - {"script.py"}


def test_two_processes_with_one_temporary_name(tmp_path: Path) -> None:
    result = race(tmp_path, "naive", "-m", "lastgood", "run", "--", sys.executable, rounds=30)
    assert result == {"how": "naive", "rounds": 30, **NEVER}
