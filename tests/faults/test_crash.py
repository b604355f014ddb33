"""A job that is killed at any disk operation continues from the newest commit, to the same bits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lastgood import disk
from tests.faults import crash, forked
from tests.faults.processes import Ranks, scratch

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL; Windows has its own campaign"),
    pytest.mark.timeout(900),
]


def in_fork(*lines: str) -> str:
    """What a program prints that runs in a process of its own, which has no other thread when it forks."""
    code, printed, log = forked.run("\n".join(lines))
    assert code == 0, printed + log
    return printed


def campaign(*arguments: str) -> str:
    """What a campaign prints, in a process of its own."""
    return in_fork("import tests.faults.__main__ as faults", f"raise SystemExit(faults.main({[*arguments]!r}))")


@pytest.mark.parametrize("scenario", ["old", "new"])
def test_one_rank_killed_at_every_operation_ends_in_the_same_bits(scenario: str) -> None:
    assert "0 failed" in campaign("crash", "--ranks", "1", "--scenarios", scenario)


@pytest.mark.parametrize("victim", ["0", "1"])
def test_two_ranks_with_one_killed_at_every_operation_end_in_the_same_bits(victim: str) -> None:
    assert "0 failed" in campaign("crash", "--ranks", "2", "--victims", victim)


@pytest.mark.parametrize("kind", ["own", "differing"])
def test_a_save_is_given_up_when_what_only_the_dead_rank_had_is_lost(kind: str) -> None:
    assert "0 failed" in campaign("crash", "--ranks", "2", "--scenarios", "new", "--victims", "1", "--kinds", kind)


def test_one_rank_that_links_frozen_files_is_killed_at_every_operation() -> None:
    report = campaign("crash", "--ranks", "1", "--scenarios", "new", "--kinds", "frozen")
    assert "0 failed" in report


def test_a_commit_before_its_data_is_noticed() -> None:
    """The campaign itself: a manifest that is in place before the shards must make it fail."""
    with scratch() as directory:
        broken = crash.Campaign(1, "replicated", "old", directory / "broken")
        broken.prepare()
        point = next(p for p in broken.points([0]) if p.operation.startswith("replace manifest.json"))
        assert broken.try_point(point) is None
        # The same life, but with a manifest that was there before its data.
        inner = disk.make_dir

        def make_committed(path: Path) -> None:
            inner(path)
            if path.name.startswith("step-00000005"):
                old = path.with_name("step-00000004") / "manifest.json"
                (path / "manifest.json").write_bytes(old.read_bytes())

        disk.make_dir = make_committed
        try:
            problem = broken.try_point(point)
        finally:
            disk.make_dir = inner
        assert problem is not None


def test_a_rank_that_never_ends_is_reported_and_killed(tmp_path: Path) -> None:
    import time

    ranks = Ranks([lambda: time.sleep(600) or 0], tmp_path)
    ranks.limit = 0.2
    with pytest.raises(TimeoutError, match="still run"):
        ranks.wait()
