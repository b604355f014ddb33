"""Run `test_other_torch.py` under Wine with one torch after the other, and say which it works with.

usage: python tests/faults/windows/setup/torches.py 2.1 2.2 2.14.1 ...
       python tests/faults/windows/setup/torches.py 2.4 --tests test_checkpointer.py test_restore.py

With --tests, these files of `tests/` are run instead, by a Python that has no other torch: the library itself is for
torch 2.4 and newer. `setup.sh` has to be through. Each version is a download of 110 to 250 MB, kept while it is tested.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import test_under_wine as wine  # noqa: E402

FOR_WINDOWS = [
    *("--platform=win_amd64", "--python-version=311", "--implementation=cp", "--only-binary=:all:", "--no-deps"),
    *("--root-user-action=ignore", "--no-compile", "-q"),
]
LIBRARIES = (
    "vcruntime140_threads.dll",
    *(f"Library/bin/mkl_{part}*" for part in ("core", "intel_thread", "def", "avx", "vml")),
)
"""What a torch looks for outside. Not all of mkl: torch loads whatever lies beside it, and some of that needs MPI."""


def install(version: str, directory: Path) -> str:
    """Unpack a torch for Windows, the newest that begins with `version`; returns its full version."""
    minor = int(version.split(".")[1])
    wanted = [f"torch=={version}" if version.count(".") > 1 else f"torch=={version}.*"]
    if minor < 4:
        wanted.append("numpy==1.26.4")  # They were built before numpy 2.
    if minor == 3:
        wanted.append("mkl==2021.4.0")  # The others bring it.
    if minor >= 14:
        wanted.append("msvc-runtime==14.44.35112")  # For vcruntime140_threads.dll, newer than setup.sh's runtime.
    subprocess.run([sys.executable, "-m", "pip", "install", *FOR_WINDOWS, f"--target={directory}", *wanted], check=True)
    for pattern in LIBRARIES:
        for library in directory.glob(pattern):
            shutil.move(library, directory / "torch" / "lib")
    found = next(directory.glob("torch-*.dist-info")).name
    return found[len("torch-") : -len(".dist-info")]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("versions", nargs="+")
    arguments.add_argument("--tests", nargs="+", default=[], metavar="FILE")
    given = arguments.parse_args()
    failed = False
    for version in given.versions:
        # On Wine's drive C, where names are those of Windows.
        with tempfile.TemporaryDirectory(dir=wine.ROOT / "prefix" / "drive_c", prefix="torch-") as temporary:
            directory = Path(temporary) / "torch"
            found = install(version, directory)
            os.environ["LASTGOOD_OLDEST_TORCH"] = str(directory)
            files = [str(wine.TREE / "tests" / name) for name in given.tests or ["faults/windows/test_other_torch.py"]]
            code, output = wine.windows_python(
                *("-m", "pytest", "-q", "-rs", "-p", "left_out", "-p", "no:cacheprovider"),
                "--basetemp=" + wine.windows_name(Path(temporary) / "t"),
                *(wine.windows_name(Path(file)) for file in files),
                seconds=3600,
                first=directory if given.tests else None,
            )
        if code:
            print(output)
        failed = failed or code != 0
        counts = re.findall(r"^\d+ (?:passed|failed|skipped|error).*", output, re.MULTILINE)[-1:]
        print(f"{found:10} {'passed' if code == 0 else 'FAILED':8} {''.join(counts)}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
