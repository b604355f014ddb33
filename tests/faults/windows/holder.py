"""A program that has files open: a virus scanner, an indexer, an evaluation. It takes one JSON command a line.

It runs as a process of its own, without torch, and answers every command with a line.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

SHARES = {
    "share nothing": 0,
    "share reading": 1,
    "share writing": 2,
    "share reading and writing": 3,
    "share deleting": 4,
    "share reading and deleting": 5,
    "share writing and deleting": 6,
    "share all": 7,
}
MODES = ("reading", "writing", "memory map", *SHARES)
"""The ways to have a file open that Windows tells apart: with Python's means, and with CreateFileW."""
DELETABLE = [mode for mode, share in SHARES.items() if share & 4]
"""Whoever shares deletion lets the file be renamed under its hands."""


class Holder:
    """The test's end of such a process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def _say(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline()))

    def hold(self, path: Path, mode: str, seconds: float | None = None) -> None:
        """Open a file, and close it by itself after `seconds`."""
        answer = self._say(do="hold", path=str(path), mode=mode, seconds=seconds)
        assert answer == {"held": str(path)}, answer

    def drop(self) -> None:
        """Close everything."""
        self._say(do="drop")

    def scan(self, directory: Path, seconds: float) -> None:
        """From now on open every file that appears below a directory, sharing nothing, for so long."""
        self._say(do="scan", path=str(directory), seconds=seconds)

    def scanned(self) -> int:
        """End the scanning; returns how many files it had open."""
        return int(self._say(do="scanned")["files"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _open(path: str, mode: str) -> Any:
    """Something with a close method."""
    if mode in SHARES:
        import ctypes
        from ctypes import wintypes

        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined, unused-ignore]
        kernel32.CreateFileW.restype = wintypes.HANDLE
        kernel32.CreateFileW.argtypes = [wintypes.LPCWSTR, *[wintypes.DWORD] * 2, wintypes.LPVOID]
        kernel32.CreateFileW.argtypes += [wintypes.DWORD, wintypes.DWORD, wintypes.HANDLE]
        kernel32.CloseHandle.argtypes = [wintypes.HANDLE]
        handle = kernel32.CreateFileW(path, 0x80000000, SHARES[mode], None, 3, 0, None)
        if handle == wintypes.HANDLE(-1).value:
            raise OSError(f"error {ctypes.get_last_error()}")  # type: ignore[attr-defined, unused-ignore]
        return _Handle(lambda: kernel32.CloseHandle(handle))
    file = open(path, "r+b" if mode == "writing" else "rb")  # noqa: SIM115
    if mode == "memory map":
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        file.close()
        return memory
    return file


def _open_soon(path: str, mode: str) -> Any:
    """As above. Who shares nothing has to wait for those who have the file open at this moment."""
    end = time.monotonic() + 5
    while True:
        try:
            return _open(path, mode)
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.01)


class _Handle:
    def __init__(self, close: Any) -> None:
        self.close = close


def _patrol(root: str, seconds: float, stop: threading.Event, opened: list[str]) -> None:
    seen = {os.path.join(at, name) for at, _, names in os.walk(root) for name in names}
    held: list[tuple[float, Any]] = []
    while not stop.is_set():
        now = time.monotonic()
        for _, thing in [one for one in held if one[0] <= now]:
            thing.close()
        held = [one for one in held if one[0] > now]
        for at, _, names in os.walk(root):
            for path in (os.path.join(at, name) for name in names):
                if path in seen:
                    continue
                try:
                    held.append((now + seconds, _open(path, "share nothing")))
                except OSError:
                    continue  # Still being written, or gone: it is tried at the next look.
                seen.add(path)
                opened.append(path)
        time.sleep(0.002)
    for _, thing in held:
        thing.close()


def main() -> None:
    things: list[Any] = []
    stop, opened = threading.Event(), list[str]()
    patrol: threading.Thread | None = None
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if command["do"] == "hold":
                thing = _open_soon(command["path"], command["mode"])
                if command["seconds"] is None:
                    things.append(thing)
                else:
                    threading.Timer(command["seconds"], thing.close).start()
                answer = {"held": command["path"]}
            elif command["do"] == "drop":
                while things:
                    things.pop().close()
            elif command["do"] == "scan":
                stop.clear()
                opened.clear()
                arguments = (command["path"], command["seconds"], stop, opened)
                patrol = threading.Thread(target=_patrol, args=arguments)
                patrol.start()
            elif patrol is not None:
                stop.set()
                patrol.join()
                answer = {"files": len(opened)}
        except OSError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
