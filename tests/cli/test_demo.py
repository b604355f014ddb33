"""``lastgood demo`` keeps every promise, and says so when one is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

pytest.importorskip("sklearn")

from lastgood import Checkpointer, SaveHandle
from lastgood.demo import promises, story
from lastgood.demo.promises import Finding
from lastgood.errors import LastGoodError

PROMISES = [
    "all or nothing",
    "one commit",
    "last good",
    "same in one process and in many",
    "exact resume",
    "never in the way",
    "nothing lost",
    "nothing executed",
]


def test_the_demo_sees_every_promise_kept() -> None:
    environment = {**os.environ, "LASTGOOD_LANG": "en"}
    command = [sys.executable, "-m", "lastgood", "demo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    found = json.loads(done.stdout)["promises"]
    assert [item["promise"] for item in found] == PROMISES
    assert [item["seen"] for item in found if not item["kept"]] == []
    assert done.returncode == 0
    assert "killed in the middle of the save of step 120" in done.stderr


def test_a_broken_promise_is_said(call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("all or nothing", "a torn one", True), Finding("last good", "nothing was noticed", False)]
    monkeypatch.setattr(story, "tell", lambda *_: findings)
    shown, printed = call("demo"), call("demo", "--json")
    assert shown.exit_code == printed.exit_code == 1
    assert [line.split()[-2] for line in shown.output.splitlines() if "noticed" in line or "torn" in line] == [
        "yes",
        "NO",
    ]
    assert [item["kept"] for item in json.loads(printed.stdout)["promises"]] == [True, False]
    monkeypatch.setattr(story, "tell", lambda *_: findings[:1])
    assert call("demo").exit_code == 0


def test_a_save_that_training_waits_for_is_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Checkpointer.save

    def waiting(ckpt: Checkpointer, step: int, **options: Any) -> SaveHandle:
        return save(ckpt, step, **{**options, "blocking": True})

    monkeypatch.setattr(Checkpointer, "save", waiting)
    assert not promises.never_in_the_way(tmp_path).kept


def test_what_is_no_full_disk_shows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises, "_is_full", lambda operation, when: None)
    found = promises.nothing_lost(tmp_path, tmp_path / "none")
    assert not found.kept and "NOT refused" in found.seen


def test_code_that_runs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promises.files, "load", lambda path: torch.load(path, weights_only=False))
    with Checkpointer(tmp_path / "run", w=torch.ones(2)) as ckpt:
        ckpt.save(1)
    found = promises.nothing_executed(tmp_path, tmp_path / "run")
    assert not found.kept and "RAN IT" in found.seen


@pytest.mark.skipif(os.name == "nt", reason="the programs are shell scripts")
def test_a_training_that_fails_or_stands_still_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    monkeypatch.setattr(story.sys, "executable", str(program))
    for text, why in (("yes | head -c 300000; exit 3", "exit codes"), ("echo waits; exec sleep 60", "did not end")):
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        with pytest.raises(LastGoodError, match=why):
            story._train(tmp_path / "run", 2)
        monkeypatch.setattr(story, "_SECONDS", 1.0)
