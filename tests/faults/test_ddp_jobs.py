"""A killed DDP job ends in the same bits as one that was never killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import ddp
from tests.faults.forked import ROOT
from tests.faults.test_crash import campaign, in_fork

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL; Windows has its own campaign"),
    pytest.mark.timeout(900),
]


def test_ddp_killed_at_many_points_ends_in_the_same_bits() -> None:
    assert "4 tried, 4 passed, 0 failed" in campaign("ddp", "--count", "4")


def test_ddp_killed_under_torchrun_is_restarted_and_ends_in_the_same_bits(tmp_path: Path) -> None:
    # Operation 9 of rank 1 is in its third shard.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "tests.faults.ddp", str(tmp_path / "run"), str(tmp_path / "notes"), "9"]
    source = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    notes = [json.loads(line) for line in (tmp_path / "notes" / "0.jsonl").read_text().splitlines()]
    assert [note["what"] for note in notes].count("restored") == 2, "nobody was killed"
    assert notes[-2]["step"] >= 2, "the second attempt did not continue"
    ended = [
        json.loads((tmp_path / "notes" / f"{rank}.jsonl").read_text().splitlines()[-1])["digest"] for rank in (0, 1)
    ]
    plain = in_fork(
        "from pathlib import Path",
        "from tests.faults import ddp",
        f"print(ddp.reference(Path({str(tmp_path / 'plain')!r})))",
    )
    assert str(ended) in plain
    assert ddp.WORLD == 2
