"""Disks that are full or broken: training goes on, the last good stays, the space is given back."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lastgood import Checkpointer, Keep, SaveError, catalog, commit
from lastgood.member import Member
from lastgood.world import World
from tests.faults import failing
from tests.faults.crash import left_overs
from tests.faults.test_crash import campaign

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="needs fork; Windows has its own campaign"),
    pytest.mark.timeout(900),
]


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_every_operation_of_a_save_may_fail(error: str) -> None:
    assert "0 failed" in campaign("failing", "--errors", error)


@pytest.mark.parametrize("real", [True, False], ids=["in the middle of a write", "seen before the first byte"])
def test_a_full_disk_gives_its_space_back(tmp_path: Path, real: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() != 0:
        pytest.skip("only root may mount a small disk")
    if real:
        # Without the look ahead, it is the write that fails.
        monkeypatch.setattr(commit, "_MARGIN", -(1 << 30))
    weights = {"w": torch.zeros(300_000)}
    try:
        context = failing.small_disk(tmp_path / "disk", 16 << 20)
        disk = context.__enter__()
    except OSError as error:
        pytest.skip(str(error))
    try:
        run, ballast = disk / "run", disk / "ballast"
        with Checkpointer(run, keep=Keep(last=2), rank=0, world_size=1, weights=weights) as ckpt:
            ckpt.restore()
            ckpt.save(1, blocking=True).result()
            room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            ballast.write_bytes(bytes(room - 600_000))
            weights["w"] += 1
            handle = ckpt.save(2, blocking=True)
            with pytest.raises(SaveError, match="left" if not real else "No space left"):
                handle.result()
            assert [entry.step for entry in catalog.committed(run)] == [1]
            catalog.check_full(catalog.committed(run)[0])
            assert left_overs(run) is None
            assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize > 500_000, "the space was not given back"
            ballast.unlink()
            weights["w"] += 1
            ckpt.save(3, blocking=True).result()
        with Checkpointer(run, rank=0, world_size=1, weights=weights) as ckpt:
            weights["w"].zero_()
            assert ckpt.restore() == 3
            assert (weights["w"] == 2).all()
    finally:
        context.__exit__(None, None, None)


def test_a_rank_that_hears_of_the_failure_before_it_began_still_answers(tmp_path: Path) -> None:
    """Rank 0 deletes what a failed save left when every rank that came has answered: silence would keep it for good."""
    posted: dict[str, Any] = {}
    outcome = {"failed": "the disk is full"}

    class Channel:
        def on(self, prefix: str, act: object) -> None: ...
        def forget(self, prefix: str) -> None: ...
        def post(self, key: str, value: Any) -> None:
            posted[key.rpartition("/")[2]] = value

        def receive_any(self, keys: list[str], deadline: float) -> tuple[str, Any]:
            return keys[0], {"name": "step-00000001", "attempt": "a"}

        def peek(self, key: str, rank: int) -> Any:
            return outcome

        def receive(self, key: str, deadline: float) -> Any:
            return outcome

    member = Member(tmp_path, World(1, 2, True), cast(Any, Channel()))
    request = SimpleNamespace(step=1, tries=0, random=None, objects={}, layout=SimpleNamespace(compare=[]), deadline=9)
    with pytest.raises(SaveError, match="full"):
        member.save(cast(Any, request), generation=1)
    assert "report" in posted
