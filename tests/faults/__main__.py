"""The fault campaigns from the command line: ``python -m tests.faults CAMPAIGN``."""

from __future__ import annotations

import argparse
import sys
import time

from tests.faults import crash


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--victims", default=None)
    parser.add_argument("--kinds", default="replicated")
    parser.add_argument("--scenarios", default="old,new")
    parser.add_argument("--workers", type=int, default=3)
    options = parser.parse_args()
    began = time.monotonic()
    result = crash.run(
        [int(x) for x in options.ranks.split(",")],
        kinds=options.kinds.split(","),
        scenarios=options.scenarios.split(","),
        victims=None if options.victims is None else [int(x) for x in options.victims.split(",")],
        workers=options.workers,
    )
    for line in result.failed:
        print("FAILED", line)
    print(dict(result.tried), f"{len(result.failed)} failed, {time.monotonic() - began:.1f}s")
    return bool(result.failed)


sys.exit(main())
