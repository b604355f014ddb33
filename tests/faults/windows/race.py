"""The bug that this project starts from: two processes save under one temporary name, and move it to one target.

usage: race.py HOW ROUNDS DIRECTORY [--stop-early]
HOW: naive (torch.save and shutil.move), or lastgood (lastgood.save). The last line printed is a JSON object.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


def rank(number: int) -> None:
    """One of the two: takes a JSON command a line, and answers each."""
    import torch

    print(json.dumps({"ready": number}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {"rank": number}
        index, target = command["round"], command["target"]
        state = {"round": index, "rank": number, "w": torch.full((30000,), float(index))}
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


def race(how: str, rounds: int, directory: Path, stop_early: bool) -> dict[str, Any]:
    """Let the two run side by side; returns the errors, and the rounds after which the target was not whole."""
    command = [sys.executable, __file__, "rank"]
    ranks = [
        subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    target = str(directory / "最新 last.pth")

    def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        return dict(json.loads(process.stdout.readline()))

    def tell(process: subprocess.Popen[str], what: str, index: int) -> None:
        assert process.stdin is not None
        name = str(directory / f"{1795380252 + index}.{index}.pth")  # time.time() of both, in one tick of the clock
        process.stdin.write(json.dumps({"do": what, "round": index, "name": name, "target": target}) + "\n")
        process.stdin.flush()

    for process in ranks:
        answer(process)
    errors, broken, done = [], [], 0
    for done in range(1, rounds + 1):
        for process in ranks:
            tell(process, how, done)
        found = [reply["error"] for reply in map(answer, ranks) if "error" in reply]
        errors += found
        if stop_early and len(errors) >= 5:
            break
        if not found:
            tell(ranks[0], "check", done)
            reply = answer(ranks[0])
            if not reply.get("whole"):
                broken.append(done)
    for process in ranks:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)
    return {"how": how, "rounds": done, "errors": errors, "broken": broken}


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank(int(sys.argv[2]))
    else:
        result = race(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), "--stop-early" in sys.argv)
        print(json.dumps(result), flush=True)
