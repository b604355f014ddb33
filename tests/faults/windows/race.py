"""The bug that this project starts from: two processes save under one temporary name, and move it to one target.

usage: race.py HOW ROUNDS DIRECTORY SECONDS
HOW: naive (torch.save and shutil.move), or lastgood (lastgood.save). The last line printed is a JSON object.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any


class Meeting:
    """A value that is written when the other process has begun to write too, or some seconds later.

    The files of large models take seconds, and the ranks that leave a step begin together: so they are under way at
    the same time. Small files on a busy machine would only be so now and then.
    """

    def __init__(self, seconds: float, longer: float) -> None:
        self._seconds = seconds
        self._longer = longer  # No two processes end in the same microsecond.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.other, self.round = 0, 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        self._socket.sendto(str(self.round).encode(), ("127.0.0.1", self.other))
        end = time.monotonic() + self._seconds
        while (left := end - time.monotonic()) > 0:
            self._socket.settimeout(left)
            with contextlib.suppress(OSError):
                if self._socket.recv(100) == str(self.round).encode():
                    break
        time.sleep(self._longer)
        return OrderedDict, ()


def rank(number: int, seconds: float) -> None:
    """One of the two: takes a JSON command a line, and answers each."""
    import torch

    meeting = Meeting(seconds, 0.05 * number)
    print(json.dumps({"port": meeting.port}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {"rank": number}
        index, target = command["round"], command["target"]
        state = {"round": index, "rank": number, "meeting": meeting, "w": torch.full((30000,), float(index))}
        meeting.round, meeting.other = index, command["other"]
        try:
            if command["do"] == "check":
                saved = torch.load(target, weights_only=True)
                answer["whole"] = saved["round"] == index and bool((saved["w"] == index).all())
            elif command["do"] == "naive":
                torch.save(state, command["name"])
                shutil.move(command["name"], target)
            else:
                import lastgood

                lastgood.save(state, target)
        except OSError as error:
            answer["error"] = (
                f"{type(error).__name__}, errno {error.errno}, winerror {getattr(error, 'winerror', None)}"
            )
        except Exception as error:
            answer["error"] = repr(error)
        print(json.dumps(answer), flush=True)


def race(how: str, rounds: int, directory: Path, seconds: str) -> dict[str, Any]:
    """Let the two run side by side; returns the rounds that failed, the errors, and the rounds without an error after
    which the target was not whole.
    """
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "rank", str(number), seconds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    target = str(directory / "最新 last.pth")

    def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        return dict(json.loads(process.stdout.readline()))

    def tell(process: subprocess.Popen[str], what: str, index: int, other: int = 0) -> None:
        assert process.stdin is not None
        name = str(directory / f"{1795380252 + index}.{index}.pth")  # time.time() of both, in one tick of the clock
        command = {"do": what, "round": index, "name": name, "target": target, "other": other}
        process.stdin.write(json.dumps(command) + "\n")
        process.stdin.flush()

    ports = [answer(process)["port"] for process in ranks]
    errors: dict[str, int] = {}
    failed, broken = [], []
    for done in range(1, rounds + 1):
        for process, other in zip(ranks, reversed(ports), strict=True):
            tell(process, how, done, other)
        found = [reply["error"] for reply in map(answer, ranks) if "error" in reply]
        for error in found:
            errors[error] = errors.get(error, 0) + 1
        if found:
            failed.append(done)
        else:
            tell(ranks[0], "check", done)
            reply = answer(ranks[0])
            if not reply.get("whole"):
                broken.append(done)
    for process in ranks:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)
    return {"how": how, "rounds": rounds, "failed": failed, "errors": errors, "broken": broken}


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank(int(sys.argv[2]), float(sys.argv[3]))
    else:
        print(json.dumps(race(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])), flush=True)
