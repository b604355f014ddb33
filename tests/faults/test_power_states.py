"""After a power cut, whatever the disk kept of what was not synced, what was reported as saved is there and whole."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import powerloss
from tests.faults.posix_model import Disk, Event, Tree
from tests.faults.processes import scratch

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="the rules are those of POSIX"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    powerloss.jobs.limit_threads()
    log = logging.getLogger("lastgood")
    level, handlers = log.level, list(log.handlers)
    powerloss.quiet()
    with scratch() as directory:
        yield directory
    log.setLevel(level)
    log.handlers[:] = handlers


@pytest.fixture(scope="module")
def history(place: Path) -> list[Event]:
    return powerloss.record(place)


@pytest.fixture(scope="module")
def good() -> set[bytes]:
    """The states of this history that a test has judged and found good: another need not judge them again."""
    return set()


def states(*events: Event) -> list[Tree]:
    disk = Disk()
    for event in events:
        disk.play(event)
    found: list[Tree] = []
    for tree in disk.states(seed=0):
        if tree not in found:
            found.append(tree)
    return found


def test_model_loses_what_is_not_synced_and_keeps_what_is() -> None:
    created, written = Event("create", "a"), Event("write", "a", data=b"1234")
    assert {} in states(created, written)
    assert {"a": b""} in states(created, written)
    assert {"a": b"12"} in states(created, written)
    assert {"a": bytes(4)} in states(created, written)
    assert states(created, written, Event("sync", "a")) == [{}, {"a": b"1234"}]
    assert states(created, written, Event("sync", "a"), Event("sync_dir", ".")) == [{"a": b"1234"}]


def test_model_may_keep_a_rename_and_lose_the_data() -> None:
    history = [Event("create", "t"), Event("write", "t", data=b"12"), Event("replace", "m", source="t")]
    assert {"m": b""} in states(*history)
    assert {"t": b"12"} in states(*history)
    assert {} in states(*history)


def test_model_keeps_a_removal_and_loses_the_one_before_it() -> None:
    history = [Event("create", "a"), Event("create", "b"), Event("sync_dir", ".")]
    history += [Event("remove", "a"), Event("remove", "b")]
    assert sorted(map(sorted, states(*history))) == [[], ["a"], ["a", "b"], ["b"]]


def test_every_state_after_a_power_cut_recovers_what_was_reported(
    history: list[Event], place: Path, good: set[bytes]
) -> None:
    found = powerloss.walk(history, place, lives=25)
    good |= found.good
    assert found.problems == []
    assert found.states > 1000
    assert found.continued > 40


@pytest.mark.parametrize(
    "what",
    [
        *("shard.py", "_commit: sync_dir", "_commit: sync", "delete: sync_dir", "make_run", "replace_file: sync"),
        "_write_new: sync",
    ],
)
def test_a_missing_sync_is_noticed(history: list[Event], place: Path, good: set[bytes], what: str) -> None:
    sites = [site for site in powerloss.sites(history) if what.split(":")[0] in site and what in site]
    assert sites, f"nothing syncs in {what} any more"
    for site in sites:
        found = powerloss.walk(powerloss.without(history, site), place, lives=0, stop_early=True, good=good)
        good |= found.good
        assert found.problems, f"nothing is lost without {site}"
