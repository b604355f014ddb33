"""The examples and the forked ranks are importable here."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
for directory in (ROOT / "examples", ROOT / "tests" / "ranks"):
    if str(directory) not in sys.path:
        sys.path.append(str(directory))
