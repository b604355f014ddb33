"""Hostile files of every kind: refused with a sentence, or read right. Nothing runs, hangs, or takes the memory."""

from __future__ import annotations

import os
import sys

import pytest

from tests.faults.test_crash import campaign, in_fork

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="needs fork and limits; Windows has its own campaign"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc of Linux"),
    pytest.mark.timeout(900),
]


def test_thousands_of_hostile_files() -> None:
    assert "0 failed" in campaign("hostile")


WRONG = {
    "os.system('true')": "it caused the event os.system",
    "open('/no-such-place/file', 'a').close()": "it opened /no-such-place/file",
    "[0] * (1 << 28)": "MemoryError",
    "list(iter(int, 1))": "the reader ended with -",
    "os.kill(os.getpid(), 11)": "the reader ended with -11",
    "{}['x']": "KeyError",
    "None": "other bits than were written",
}
PROGRAM = """
import os, sys
from tests.faults import hostile
from tests.faults.report import Result
hostile.CPU_SECONDS = 1
for code in CODES:
    def read(data, place):
        if data != b"as it was":
            eval(compiled)
            return "other"
        return "same"
    compiled = compile(code, "<reader>", "eval")
    target, result = hostile.Target("t", b"as it was", hostile.mutations.scramble, read, True), Result("t")
    with hostile.scratch() as directory:
        hostile.run_target(target, 2, directory, result)
    print(" ".join(result.failed).replace(chr(10), " "))
"""


def test_a_reader_that_does_what_it_must_not_is_noticed() -> None:
    printed = in_fork(f"CODES = {[*WRONG]!r}", PROGRAM).splitlines()
    for (code, words), line in zip(WRONG.items(), printed, strict=True):
        assert words in line, code
