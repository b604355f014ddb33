"""`lastgood run` with another torch than the tests' own: the oldest that it is for, or any that is given to it.

``setup/torches.py`` runs this with one minor version after the other.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from test_race import NEVER, race

from lastgood.intercept import journal

OTHER = os.environ.get("LASTGOOD_OLDEST_TORCH", "")
pytestmark = [
    pytest.mark.skipif(os.name != "nt", reason="needs Windows"),
    pytest.mark.skipif(not OTHER, reason="needs LASTGOOD_OLDEST_TORCH, a directory with a torch in it"),
    pytest.mark.timeout(600),
]

PROGRAM = """
    import inspect, os, shutil
    import numpy, torch
    from safetensors.torch import load_file, save_file

    assert torch.__version__.split("+")[0] == VERSION, torch.__version__
    known = tuple(map(int, VERSION.split(".")[:2]))
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

    # What torch.save could be told in later versions.
    extra = {}
    if known >= (2, 1):
        torch.save(state, "unordered.pth", _disable_byteorder_record=True)
        extra["unordered"] = {"mmap": True}
    if known >= (2, 6):
        torch.serialization.set_crc32_options(False)
        torch.save(state, "unchecked.pth")
        torch.serialization.set_crc32_options(True)
        extra["unchecked"] = {"weights_only": True}
    if known >= (2, 5):
        with torch.serialization.skip_data():
            torch.save(state, "filled.pth")
        reader = torch._C.PyTorchFileReader("last.pth")
        parts = {name: reader.get_record(name) for name in reader.get_all_records() if name.startswith("data/")}
        reader = torch._C.PyTorchFileReader("filled.pth")
        places = {name: reader.get_record_offset(name) for name in parts}
        del reader
        with open("filled.pth", "r+b") as file:
            for name, part in parts.items():
                file.seek(places[name])
                file.write(part)
        extra["filled"] = {}
    if known >= (2, 7):
        from torch.utils.serialization import config
        for alignment in (8, 4096):
            with config.patch("save.storage_alignment", alignment):
                torch.save(state, f"aligned-{alignment}.pth")
            with config.patch("load.mmap", True):
                torch.load(f"aligned-{alignment}.pth")
            extra[f"aligned-{alignment}"] = {}

    for name, options in {**dict.fromkeys(("last", "open", "moved", "replaced", "old"), {}), **extra}.items():
        loaded = torch.load(f"{name}.pth", **options)
        assert loaded["step"] == 3 and torch.equal(loaded["model"]["weight"], model.weight), name
        del loaded  # What is mapped cannot be replaced.
    assert torch.equal(load_file("model.safetensors")["weight"], model.weight)
    assert sorted(os.listdir()) == sorted([*NAMES, *(f"{name}.pth" for name in extra)]), os.listdir()

    # An error in the middle of a save, the program's or the disk's, is an error and not the end of the program.
    class Bad:
        def __reduce__(self):
            raise ValueError("no")
    with open("open.pth", "wb") as file:
        raw = type(file.raw)
        torch.save(state, file)
    write = raw._write
    def full(self, data):
        if self.size > 100_000:
            raise OSError(28, "No space left on device")
        return write(self, data)
    for bad, ours in (([torch.ones(9), Bad()], write), ([torch.ones(99_999), torch.ones(99_999)], full)):
        raw._write = ours
        try:
            torch.save(bad, "last.pth")
        except (ValueError, OSError, RuntimeError) as error:
            print("FAILED", repr(error))
        raw._write = write
    assert torch.load("last.pth")["step"] == 3
    torch.save(state, "last.pth")

    extra.pop("filled", None)
    for name in ("last", *extra):
        times = os.stat(f"{name}.pth")
        with open(f"{name}.pth", "r+b") as file:
            file.seek(file.read().index(model.weight.detach().numpy().tobytes()) + 500)
            file.write(b"damage")
        os.utime(f"{name}.pth", ns=(times.st_atime_ns, times.st_mtime_ns))  # A disk that fails changes no time.
        try:
            torch.load(f"{name}.pth")
        except RuntimeError as error:
            print("REFUSED", error)
"""
NAMES = {f"{name}.pth" for name in ("last", "open", "moved", "replaced", "old")}
NAMES |= {"model.safetensors", "state.npz", "state.npy", "script.py"}
SINCE = {"unordered": (2, 1), "unchecked": (2, 6), "aligned-8": (2, 7), "aligned-4096": (2, 7)}
"""By file, the first torch that can write it. Their damage is seen; in filled.pth, known by its size only, not."""


def version() -> str:
    """Of the torch in that directory: "2.0.1"."""
    found = re.search(r"__version__ = '([\d.]+)", (Path(OTHER) / "torch" / "version.py").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


@pytest.fixture(autouse=True)
def other_torch_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([OTHER, os.environ.get("PYTHONPATH", "")]))


def test_saves_loads_and_moves(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"NAMES = {NAMES!r}\nVERSION = {version()!r}\n" + textwrap.dedent(PROGRAM), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "lastgood", "run", "--", sys.executable, str(script)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    assert done.returncode == 0, done.stdout
    known = tuple(map(int, version().split(".")[:2]))
    damaged = {"last.pth", *(f"{name}.pth" for name, since in SINCE.items() if since <= known)}
    unseen = {"filled.pth"} if known >= (2, 5) else set()
    assert f"{17 + len(damaged | unseen)} files saved" in done.stdout and "NOT made safe" not in done.stdout
    assert "FAILED ValueError('no')" in done.stdout and "FAILED OSError(28, 'No space" in done.stdout, done.stdout
    for name in damaged:
        assert f"{name} is damaged" in done.stdout, done.stdout
    assert done.stdout.count("REFUSED ") == len(damaged) and "The newest intact version is" in done.stdout
    findings = journal.verify(tmp_path)
    assert {Path(finding.path).name for finding in findings if finding.damage} == damaged, findings
    assert {Path(finding.path).name for finding in findings} >= NAMES - {"script.py"} | damaged | unseen


def test_two_processes_with_one_temporary_name(tmp_path: Path) -> None:
    result = race(tmp_path, "naive", "-m", "lastgood", "run", "--", sys.executable, rounds=30)
    assert result == {"how": "naive", "rounds": 30, **NEVER}
