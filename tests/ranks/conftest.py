"""Test files here import classes from those beside this directory."""

import sys
from pathlib import Path

directory = Path(__file__).parent.parent
if str(directory) not in sys.path:
    sys.path.append(str(directory))
