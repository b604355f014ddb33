"""What directory names say, which checkpoint is the newest, and which came from which."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lastgood
from lastgood import catalog
from lastgood.errors import DamagedError, LastGoodError


@given(st.integers(0, 10**12), st.integers(1, 10**6), st.integers(0, 50))
def test_a_directory_name_says_what_it_was_made_from(step: int, generation: int, attempt: int) -> None:
    name = catalog.directory_name(step, generation, attempt)
    entry = catalog.entry_of(Path("run"), name)
    assert entry is not None and (entry.generation, entry.step, entry.attempt) == (generation, step, attempt)


@given(st.text(max_size=30))
def test_other_names_are_no_checkpoints(name: str) -> None:
    entry = catalog.entry_of(Path("run"), name)
    assert entry is None or name.isascii()


@pytest.mark.parametrize(
    "name",
    ["", "step-1", "step-00000001.tmp", "step-00000001.g", "xstep-00000001", "step-00000001.g1.1.1", "step-0000000१"],
)
def test_names_that_nearly_are(name: str) -> None:
    assert catalog.entry_of(Path("run"), name) is None


KEYS = st.tuples(st.integers(1, 30), st.integers(0, 10**9), st.integers(0, 12))


@settings(deadline=None)
@given(st.lists(KEYS, unique=True, min_size=1, max_size=12))
def test_newest_is_the_highest_generation_and_step_not_the_highest_name(keys: list[tuple[int, int, int]]) -> None:
    found = [catalog.entry_of(Path("r"), catalog.directory_name(s, g, a)) for g, s, a in keys]
    entries = sorted(entry for entry in found if entry is not None)
    assert [(e.generation, e.step, e.attempt) for e in entries] == sorted(keys)


def lay(run: Path, *names: str, **bases: str) -> list[catalog.Entry]:
    """Directories with empty manifests, and the notes of where generations began (g2="step-...")."""
    (run / "generations").mkdir(parents=True, exist_ok=True)
    for name in names:
        (run / name).mkdir()
        (run / name / "manifest.json").write_bytes(b"")
    for key, base in bases.items():
        (run / "generations" / f"{int(key[1:]):08d}.base").write_text(base)
    return catalog.committed(run)


def line(run: Path) -> list[str]:
    newest = catalog.newest(run)
    assert newest is not None
    return [entry.name for entry in catalog.lineage(newest, catalog.committed(run))]


def s(step: int, generation: int = 1) -> str:
    return catalog.directory_name(step, generation)


def test_a_directory_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    lay(tmp_path, s(1))
    (tmp_path / s(2)).mkdir()
    (tmp_path / s(3)).write_text("a file")
    assert [e.name for e in catalog.committed(tmp_path)] == [s(1)]
    assert len(catalog.entries(tmp_path)) == 3


def test_the_line_of_one_life_goes_down_the_steps(tmp_path: Path) -> None:
    lay(tmp_path, s(3), s(1), s(2), g1="")
    assert line(tmp_path) == [s(3), s(2), s(1)]


def test_after_a_roll_back_the_abandoned_branch_is_not_in_the_line(tmp_path: Path) -> None:
    lay(tmp_path, s(1), s(2), s(3), s(2, 2), s(4, 2), g1="", g2=s(1))
    assert line(tmp_path) == [s(4, 2), s(2, 2), s(1)]


def test_branches_of_branches(tmp_path: Path) -> None:
    lay(
        tmp_path,
        s(1),
        s(5),
        s(2, 2),
        s(9, 2),
        s(3, 3),
        s(9, 3),
        s(4, 5),
        g1="",
        g2=s(1),
        g3=s(2, 2),
        g4=s(9, 3),
        g5=s(3, 3),
    )
    assert line(tmp_path) == [s(4, 5), s(3, 3), s(2, 2), s(1)]


def test_a_deleted_base_does_not_end_the_line(tmp_path: Path) -> None:
    lay(tmp_path, s(1), s(3, 2), s(9), g1="", g2=s(2))
    assert line(tmp_path) == [s(3, 2), s(1)]


def test_a_fresh_start_has_no_past(tmp_path: Path) -> None:
    lay(tmp_path, s(1), s(3, 2), g1="", g2="")
    assert line(tmp_path) == [s(3, 2)]


def test_lost_notes_fall_back_to_the_newest_earlier_step(tmp_path: Path) -> None:
    lay(tmp_path, s(1), s(5), s(3, 2), s(4, 7))
    assert line(tmp_path) == [s(4, 7), s(3, 2), s(1)]


def test_notes_that_lead_in_a_circle_come_to_an_end(tmp_path: Path) -> None:
    lay(tmp_path, s(1, 2), s(1, 3), g2=s(1, 3), g3=s(1, 2))
    assert line(tmp_path)[0] == s(1, 3)
    lay(tmp_path, g3=s(1, 3))
    assert line(tmp_path) == [s(1, 3)]
    lay(tmp_path, g3="no such name at all")
    assert line(tmp_path)[0] == s(1, 3)


def save(run: Path, *steps: int, back_to: int | None = None) -> None:
    with lastgood.Checkpointer(run, keep=lastgood.Keep(last=50), w=torch.zeros(2), n=0) as ckpt:
        ckpt.restore(step=back_to)
        for step in steps:
            ckpt["n"] = step
            ckpt.save(step)


def test_many_lives_and_a_roll_back_long_ago_keep_the_line(tmp_path: Path) -> None:
    """Records of old lives are cleared away, and what came from which is known all the same."""
    save(tmp_path, 1, 2, 3)
    save(tmp_path, 4, back_to=1)
    for step in range(5, 25):
        save(tmp_path, step)
    names = line(tmp_path)
    assert len(names) == 22
    assert names[-2:] == [catalog.directory_name(4, 3), s(1)]


def test_a_roll_back_and_its_fallback(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30)
    save(tmp_path, 25, back_to=10)
    (newest,) = [e for e in catalog.committed(tmp_path) if e.step == 25]
    (newest.path / "00000.safetensors").write_bytes(b"")
    with lastgood.Checkpointer(tmp_path, w=torch.zeros(2), n=0) as ckpt:
        assert ckpt.restore() == 10  # Not 30 or 20: they are another history.
        assert ckpt["n"] == 10


def test_asking_for_a_step_takes_it_from_the_present_branch(tmp_path: Path) -> None:
    save(tmp_path, 10, 20, 30)
    save(tmp_path, 20, back_to=10)
    with lastgood.Checkpointer(tmp_path, w=torch.zeros(2), n=0) as ckpt:
        assert ckpt.restore(step=20) == 20
        assert ckpt.restore(step=30) == 30
        with pytest.raises(LastGoodError, match="no checkpoint of step 15; there are 10, 20, 30, 20"):
            ckpt.restore(step=15)


def test_a_manifest_in_the_wrong_directory_is_damage(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / s(1)).rename(tmp_path / s(7))
    (tmp_path / s(2)).rename(tmp_path / s(2, 9))
    for name in (s(7), s(2, 9)):
        entry = catalog.entry_of(tmp_path, name)
        assert entry is not None
        with pytest.raises(DamagedError, match="does not belong into"):
            catalog.check_full(entry)
