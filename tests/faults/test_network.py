"""Two ranks on two hosts whose link is cut, slow or lossy: no endless wait, and nothing wrong is committed."""

from __future__ import annotations

import ast
import os
import sys

import pytest

from tests.faults.test_crash import in_fork

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="needs fork and network namespaces: not on Windows"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs network namespaces of Linux"),
    pytest.mark.timeout(900),
]
PROGRAM = """
from tests.faults import hosts, network
try:
    result = CALL
except hosts.NotAllowedError as error:
    print("SKIP", error)
else:
    print([sum(result.tried.values()), result.failed])
"""


def campaign(call: str) -> tuple[int, list[str]]:
    printed = in_fork(PROGRAM.replace("CALL", call)).strip()
    if printed.startswith("SKIP"):
        pytest.skip(printed[5:])
    count, failed = ast.literal_eval(printed)
    return count, failed


def test_links_that_fail() -> None:
    count, failed = campaign("network.run(network.QUICK)")
    assert failed == [] and count == 6


@pytest.mark.slow
def test_ranks_that_wait_too_long_are_noticed() -> None:
    call = "(setattr(network, 'SLACK', -1.9), network.run([network.Case('cut for good', 'own', 0, -1)]))[1]"
    assert any("waited" in problem for problem in campaign(call)[1])
