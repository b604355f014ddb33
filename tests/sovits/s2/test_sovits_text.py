import hashlib

import pytest

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.text import SYMBOL_COUNTS, symbol_ids

# SHA-256 of the symbols joined by line feeds, computed from upstream's own tables.
DIGESTS = {
    "v1": "f7c3b280b9cc519b0829a6f182fcdd208643a07f1e20c1ab2bf4fc9e8e9a7ca6",
    "v2": "0771f6cd6f6201e8c2b0de921dc69cc04caf3f346c599d4a41413967d5674da7",
}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_table_is_upstreams_in_its_order(version: str) -> None:
    table = symbol_ids(version)
    assert list(table.values()) == list(range(SYMBOL_COUNTS[version]))
    assert hashlib.sha256("\n".join(table).encode()).hexdigest() == DIGESTS[version]


def test_later_versions_share_the_v2_table_and_extend_v1() -> None:
    assert symbol_ids("v2Pro") == symbol_ids("v2ProPlus") == symbol_ids("v2")
    assert symbol_ids("v1").items() <= symbol_ids("v2").items()
    assert symbol_ids("v2")["!"] == 0


def test_no_version_is_refused() -> None:
    with pytest.raises(SovitsError, match="empty"):
        symbol_ids("")
