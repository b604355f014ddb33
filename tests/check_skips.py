"""Fail when a test was skipped that has to run here. Usage: check_skips.py JUNIT.XML...

A skip is allowed for the reasons listed below: what another platform, a GPU, or the right to mount would be needed for.
"""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree as ElementTree

ALLOWED = [
    "needs CUDA",
    "needs Windows",
    "mounting is not allowed here",
    "namespaces are not allowed here",
    "this torch",
]
if not os.environ.get("LASTGOOD_WINE"):  # Where it is set, Wine was set up, and the Windows tests run under it.
    ALLOWED.append("needs Wine")


def main(paths: list[str]) -> int:
    wrong = []
    for case in (case for path in paths for case in ElementTree.parse(path).iter("testcase")):
        for skipped in case.iter("skipped"):
            reason = skipped.get("message", "")
            if not any(text in reason for text in ALLOWED):
                wrong.append(f"{case.get('classname')}::{case.get('name')}: {reason}")
    for line in wrong:
        print("skipped, but it must run here:", line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
