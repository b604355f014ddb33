"""Runs Windows tests, these and the core's, in a Windows Python under Wine; and runs that change systems.

``setup/setup.sh`` makes that Python. Several tests run in one process, since torch takes long to start there.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lastgood import catalog

sys.path.insert(0, str(Path(__file__).parent))
import left_out

ROOT = Path(os.environ.get("LASTGOOD_WINE", "~/.cache/lastgood-wine")).expanduser()
HERE = Path(__file__).parent
TREE = HERE.parents[2]
ALLOWED = (
    *("needs fork", "needs POSIX", "not on Windows", "No module named 'resource'", "needs CUDA"),
    "No module named 'tensorboard'",
    *("may not make symbolic links", "Wine", "this torch"),
)
"""Reasons for which a test may be skipped inside: what Windows does not have, and what Wine does otherwise."""

pytestmark = [
    pytest.mark.skipif(not (ROOT / "complete").exists(), reason="needs Wine: tests/faults/windows/setup/setup.sh"),
    pytest.mark.timeout(1500),
]


def windows_name(path: Path) -> str:
    """A path of this machine as Wine's programs name it."""
    drive = ROOT / "prefix" / "drive_c"
    if path.is_relative_to(drive):
        return "C:\\" + str(path.relative_to(drive)).replace("/", "\\")
    return "Z:" + str(path).replace("/", "\\")


def windows_python(
    *arguments: str, seconds: int = 3600 if "LASTGOOD_ROUNDS" in os.environ else 700, first: Path | None = None
) -> tuple[int, str]:
    """Exit code and output; `first` is a directory whose packages go before those of the Windows Python."""
    paths = [windows_name(path) for path in (first, TREE / "src", TREE / "tests", HERE) if path]
    done = subprocess.run(
        [str(ROOT / "wpython"), *arguments],
        env={
            **os.environ,
            "WPYTHON_SECONDS": str(seconds),
            "WPYTHON_PATH": ";".join(paths),
            "LASTGOOD_OLDEST_TORCH": windows_name(Path(os.environ.get("LASTGOOD_OLDEST_TORCH", ROOT / "oldest"))),
        },
        cwd=TREE,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    return done.returncode, done.stdout


@pytest.fixture
def drive(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory on Wine's drive C, where names are those of Windows."""
    directory = ROOT / "prefix" / "drive_c" / f"test-{os.getpid()}-{request.node.name[:20].rstrip('[')}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def share(drive: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A directory that Windows programs find under the name of a share."""
    server = ROOT / "prefix" / "dosdevices" / "unc" / f"server-{os.getpid()}"
    server.mkdir(parents=True)
    (drive / "shared").mkdir()
    (server / "share").symlink_to(drive / "shared")
    monkeypatch.setenv("LASTGOOD_SHARE", rf"\\{server.name}\share")
    yield
    shutil.rmtree(server)


FULL = "LASTGOOD_ROUNDS" in os.environ
CORE = sorted(
    path.name
    for path in (TREE / "tests").glob("test_*.py")
    if path.name not in left_out.LEFT_OUT and path.name != "test_files.py"
)
GROUPS = {
    "held files": (["faults/windows/test_holds.py", "faults/windows/test_refusals.py"], 110),
    "ways": (["faults/windows/test_ways.py"], 39),
    "single files": (["test_files.py"], 10),
    "damage": (["faults/test_damage.py"], 10),
    "core": (CORE, 680),
    # scikit-learn, which the demo needs, is not set up here.
    "command line": (
        [f"cli/{path.name}" for path in (TREE / "tests" / "cli").glob("test_*.py") if path.name != "test_demo.py"],
        90,
    ),
    "lastgood run": (
        [f"intercept/test_{name}.py" for name in ("launchers", "journal", *(("run", "environment") if FULL else ()))],
        40 if FULL else 23,
    ),
    "race": (["faults/windows/test_race.py"], 3),
    "jobs": (["faults/windows/test_jobs.py"], 8),
    "crashes": (["faults/windows/test_byte_crashes.py"], 5),
    "oldest torch": (["faults/windows/test_other_torch.py"], 2),
}
"""Test files, and how many tests in them have to pass on Windows at least."""


@pytest.mark.usefixtures("share")
@pytest.mark.parametrize("group", GROUPS)
def test_on_windows(drive: Path, group: str) -> None:
    report = drive / "report.xml"
    options = ["-q", "-p", "left_out", "-p", "no:cacheprovider", "--basetemp=" + windows_name(drive / "t")]
    names, least = GROUPS[group]
    files = [windows_name(TREE / "tests" / name) for name in names]
    for _attempt in range(2):
        code, output = windows_python("-m", "pytest", *options, "--junitxml=" + windows_name(report), *files)
        if "WinError 1359" not in output:
            break  # Once in some hundred times Wine cannot start a process, for no reason of ours.
    assert code == 0, output
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [str(found.get("message")) for case in cases for found in case.iter("skipped")]
    passed = [str(case.get("classname")).rsplit(".", 1)[-1] for case in cases if case.find("skipped") is None]
    assert set(passed) == {Path(name).stem for name in names}
    assert len(passed) >= least
    wrong = {reason for reason in skipped if not any(allowed in reason for allowed in ALLOWED)}
    assert not wrong, "\n".join(sorted(wrong))


def test_ctrl_c_at_a_console_saves_and_ends_with_75(drive: Path) -> None:
    """A terminal is a console for Wine: its keys come as Windows' console sends them, and its output goes there."""
    script = (
        "import sys, lastgood, time\n"
        "print('终端', sys.stdout.isatty())\n"
        "for step in lastgood.Checkpointer(sys.argv[1], x=1).steps(10**9):\n"
        "    step == 1 and print('training', flush=True)\n"
        "    time.sleep(0.01)\n"
    )
    keyboard, screen = os.openpty()
    process = subprocess.Popen(
        [str(ROOT / "wpython"), "-c", script, windows_name(drive / "训练")],
        env={**os.environ, "WPYTHON_SECONDS": "300", "WPYTHON_PATH": windows_name(TREE / "src")},
        **dict.fromkeys(("stdin", "stdout", "stderr"), screen),
        start_new_session=True,
    )
    os.close(screen)
    shown = b""
    try:
        while b"training" not in shown:
            shown += os.read(keyboard, 4096)
        os.write(keyboard, b"\x03")
        with contextlib.suppress(OSError):  # The end of the terminal.
            while part := os.read(keyboard, 4096):
                shown += part
        assert process.wait(100) == 75, shown.decode(errors="replace")
    finally:
        process.kill()
        os.close(keyboard)
    assert "终端".encode() in shown and b"True" in shown
    assert len(catalog.committed(drive / "训练")) == 1


def test_a_run_goes_from_linux_to_windows_and_back(drive: Path) -> None:
    from program import live

    run, notes = drive / "训练 runs" / "语音-1", drive / "notes"
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    try:
        here = live(run, 0, 1, 3)
        code, output = windows_python(
            windows_name(HERE / "program.py"), windows_name(run), windows_name(notes), "0", "1", "6"
        )
        assert code == 0, output
        there = json.loads((notes / "life-0.json").read_text())
        back = live(run, 0, 1, 8)
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
    assert (here["start"], there["start"], back["start"]) == (0, 3, 6)
    assert there["began"] == here["ended"]
    assert back["began"] == there["ended"]
    for entry in catalog.committed(run):
        catalog.check_full(entry)
    code, output = windows_python("-m", "lastgood", "verify", "--full", windows_name(run))
    assert code == 0, output
