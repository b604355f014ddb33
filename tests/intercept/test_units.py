"""Checkpoints of several files under `lastgood run`: which of them count as finished, and what a crash leaves."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path

import pytest
import torch
from test_run import posix, start

from lastgood.intercept import journal
from lastgood.intercept.runtime import system

# Any library that is watched will do, and torch takes seconds to import.
LIST = "import os, safetensors; print(sorted(name for name in os.listdir() if name.startswith('checkpoint')))"
COMPLETE = ("--complete", "checkpoint-*")
GPT_SOVITS = ("--preset", "gpt-sovits")
KILLED = 9 if os.name == "nt" else 128 + 9
HALF = """
    import multiprocessing, os, sys, torch

    def part(name, step=1, directory="checkpoint-1"):
        os.makedirs(directory, exist_ok=True)
        torch.save([step], f"{directory}/{name}.pth")

    def half(*_):
        part("model")
        raise RuntimeError("the network is gone")

    def whole():
        part("model"), part("optimizer")

    def kill():
        os.kill(os.getpid(), 9)
"""


def listed(directory: Path) -> str:
    """What the next program sees of the checkpoints, and what it is told."""
    code, output = start(directory, LIST, *COMPLETE)
    assert code == 0, output
    return output


def run(directory: Path, code: str, *options: str, **variables: str) -> tuple[int, str]:
    return start(directory, textwrap.dedent(HALF) + textwrap.dedent(code), *(options or COMPLETE), **variables)


# What counts as finished.

ENDINGS = {
    "sys.exit(1) in a handler": """
        try: half()
        except RuntimeError: sys.exit(1)
    """,
    "Ctrl-C in a save, handled": """
        class Interrupted:
            def __reduce__(self): raise KeyboardInterrupt
        part("model")
        try: part("optimizer", Interrupted())
        except KeyboardInterrupt: print("stopped")
    """,
    "an error in a child of mp.spawn": """
        if __name__ == "__main__":
            torch.multiprocessing.spawn(half)
    """,
    "an error in a forked child": """
        child = multiprocessing.get_context("fork").Process(target=half)
        child.start(), child.join()
    """,
    "os._exit with an error": "part('model')\nos._exit(3)",
}


@posix
@pytest.mark.parametrize("how", ENDINGS)
def test_a_directory_is_not_finished_by_an_end_with_an_error(tmp_path: Path, how: str) -> None:
    run(tmp_path, ENDINGS[how])
    assert (tmp_path / "checkpoint-1" / "model.pth").exists()
    output = listed(tmp_path)
    assert "[]" in output and "not completely written" in output, output


@posix
@pytest.mark.parametrize(
    "how",
    [
        'child = multiprocessing.get_context("fork").Process(target=whole)\nchild.start(), child.join()',
        "if os.fork() == 0:\n    whole(), os._exit(0)\nos.wait()",
        "try: sys.exit(1)\nexcept SystemExit: pass\nwhole()",
        "whole(), sys.exit()",
    ],
    ids=["a forked process of multiprocessing", "os.fork", "after an end that was caught", "sys.exit"],
)
def test_a_directory_is_finished_by_a_normal_end(tmp_path: Path, how: str) -> None:
    code, output = run(tmp_path, how)
    assert code == 0, output
    output = listed(tmp_path)
    assert "['checkpoint-1']" in output and "not completely" not in output, output


def test_a_directory_in_which_a_save_failed_is_not_finished_by_the_next(tmp_path: Path) -> None:
    code, output = run(
        tmp_path,
        """
        part("model")
        try: part("optimizer", lambda: 0)
        except Exception: print("no space")
        part("model", 2, "checkpoint-2"), part("optimizer", 2, "checkpoint-2")
        part("model", 3, "checkpoint-3")
        kill()
        """,
    )
    assert code == KILLED, output
    assert "['checkpoint-2']" in listed(tmp_path)


def test_a_save_that_failed_and_was_made_good_does_not_spoil_its_directory(tmp_path: Path) -> None:
    code, output = run(
        tmp_path,
        """
        part("model")
        try: part("optimizer", lambda: 0)
        except Exception: part("optimizer")
        part("model", 2, "checkpoint-2")
        kill()
        """,
    )
    assert code == KILLED, output
    assert "['checkpoint-1']" in listed(tmp_path)


def a_trainer(directory: Path) -> None:
    """Enough of Hugging Face's to be recognised: step 1 is whole, in step 2 the disk is full, 3 is whole."""
    (directory / "transformers").mkdir()
    (directory / "transformers" / "__init__.py").write_text("")
    (directory / "transformers" / "trainer.py").write_text(
        textwrap.dedent(
            """
            import os, torch
            class Trainer:
                args = type("Arguments", (), {"output_dir": "."})
                def _save_checkpoint(self, step):
                    os.makedirs(f"checkpoint-{step}", exist_ok=True)
                    torch.save([step], f"checkpoint-{step}/model.pth")
                    if step == 2: raise OSError(28, "No space left on device")
                    torch.save([step], f"checkpoint-{step}/optimizer.pth")
            """
        )
    )


@pytest.mark.parametrize("end", ["kill", "normal"])
def test_a_directory_is_not_finished_where_its_framework_raised(tmp_path: Path, end: str) -> None:
    a_trainer(tmp_path)
    code, output = run(
        tmp_path,
        """
        from transformers.trainer import Trainer
        for step in (1, 2, 3):
            try: Trainer()._save_checkpoint(step)
            except OSError as error: print(error)
        if END == "kill": kill()
        """.replace("END", repr(end)),
    )
    assert code == (KILLED if end == "kill" else 0), output
    assert "['checkpoint-1', 'checkpoint-3']" in listed(tmp_path)


def test_a_directory_is_unfinished_while_a_file_of_it_is_written_however_long_that_takes(tmp_path: Path) -> None:
    code, output = run(
        tmp_path,
        """
        import glob, time
        import _lastgood_run.units as units
        units.IDLE = 0.3
        def marks(): return [name for name in glob.glob(".lastgood/open-*") if os.path.exists(name)]
        class Slow:
            def __reduce__(self):
                time.sleep(1)
                print("MARKS", len(marks()), flush=True)
                return list, ()
        part("model")
        part("optimizer", Slow())
        time.sleep(1)
        print("AFTER", len(marks()))
        """,
    )
    assert code == 0 and "MARKS 1" in output and "AFTER 0" in output, output


# Directories that were complete before.


def test_a_file_that_is_added_to_a_complete_directory_does_not_make_it_unfinished(tmp_path: Path) -> None:
    assert run(tmp_path, "whole()")[0] == 0
    code, output = run(tmp_path, "import json\njson.dump([1], open('checkpoint-1/eval.json', 'w'))\nkill()")
    assert code == KILLED, output
    assert "['checkpoint-1']" in listed(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoint-1").glob("*.pth")) == ["model.pth", "optimizer.pth"]


def test_a_file_that_is_added_after_the_framework_is_done_does_not_make_it_unfinished(tmp_path: Path) -> None:
    a_trainer(tmp_path)
    code, output = run(
        tmp_path,
        """
        import json
        from transformers.trainer import Trainer
        Trainer()._save_checkpoint(1)
        json.dump([1], open('checkpoint-1/eval.json', 'w'))
        kill()
        """,
    )
    assert code == KILLED, output
    assert "['checkpoint-1']" in listed(tmp_path)


@pytest.mark.parametrize("rounds", [2, 3, 5])
@pytest.mark.parametrize("order", ["config once", "notes first"])
def test_a_directory_that_is_overwritten_in_place_gets_its_files_back(tmp_path: Path, rounds: int, order: str) -> None:
    code, output = run(
        tmp_path,
        f"""
        import json
        for step in range(1, {rounds} + 1):
            os.makedirs("checkpoint-latest", exist_ok=True)
            if step == 1 or {order!r} == "notes first": json.dump([step], open("checkpoint-latest/notes.json", "w"))
            part("model", step, "checkpoint-latest")
            if step == {rounds}:
                part("added", step, "checkpoint-latest"), kill()
            part("optimizer", step, "checkpoint-latest")
        """,
    )
    assert code == KILLED, output
    output = listed(tmp_path)
    assert "['checkpoint-latest']" in output, output
    found = {path.name: torch.load(path) for path in (tmp_path / "checkpoint-latest").glob("*.pth")}
    assert found == {"model.pth": [rounds - 1], "optimizer.pth": [rounds - 1]}, output
    if order == "notes first":
        assert (tmp_path / "checkpoint-latest" / "notes.json").read_text() == f"[{rounds - 1}]"


@posix
@pytest.mark.parametrize("killed_at", ["first", "second"])
def test_a_directory_that_two_ranks_overwrite_in_place_gets_its_files_back(tmp_path: Path, killed_at: str) -> None:
    """They wait for each other before each save, and rank 1 is faster."""
    code, output = run(
        tmp_path,
        f"""
        os.makedirs("checkpoint-latest")
        (turn, tell), (back, answer) = os.pipe(), os.pipe()
        other = os.fork()
        for step in range(1, 5):
            if other == 0:
                part("rng_1", step, "checkpoint-latest")
                os.write(tell, b"x"), os.read(back, 1)
                continue
            os.read(turn, 1)
            if step == 4 and {killed_at!r} == "first": break
            part("model", step, "checkpoint-latest")
            if step == 4: break
            part("optimizer", step, "checkpoint-latest")
            os.write(answer, b"x")
        os.kill(other, 9), kill()
        """,
    )
    assert code == KILLED, output
    output = listed(tmp_path)
    found = {path.name: torch.load(path) for path in (tmp_path / "checkpoint-latest").glob("*.pth")}
    assert found == {"model.pth": [3], "optimizer.pth": [3], "rng_1.pth": [3]}, output


# Pairs.


def pair(directory: Path) -> tuple[list[int] | None, ...]:
    paths = [directory / f"{letter}_233333333333.pth" for letter in "GD"]
    return tuple(torch.load(path) if path.exists() else None for path in paths)


SAVE_PAIR = """
    import os, torch
    def save(letter, epoch): torch.save([epoch], f"{letter}_233333333333.pth")
    def both(epoch): save("G", epoch), save("D", epoch)
"""


@posix
@pytest.mark.parametrize("d_of_rank_1", [False, True])
def test_a_pair_that_two_ranks_save_is_taken_back_as_one(tmp_path: Path, d_of_rank_1: bool) -> None:
    """Rank 1 is faster with G, and rank 0, which replaces it, is killed before D."""
    code, output = start(
        tmp_path,
        textwrap.dedent(SAVE_PAIR)
        + textwrap.dedent(
            f"""
            (turn, tell) = os.pipe()
            other = os.fork()
            os.environ.update(RANK="1" if other == 0 else "0", WORLD_SIZE="2")
            import time
            if other == 0:
                time.sleep(1)   # Rank 0 has saved the first epochs; these are left to it.
                both(1), both(2)
                save("G", 3)
                if {d_of_rank_1}: save("D", 3)
                os.write(tell, b"x")
                time.sleep(100)
            both(1), both(2)
            os.read(turn, 1)
            save("G", 3)
            os.kill(other, 9), os.kill(os.getpid(), 9)
            """
        ),
        *GPT_SOVITS,
    )
    assert code == KILLED, output
    load = "import torch; print([torch.load(f'{letter}_233333333333.pth') for letter in 'DG'])"
    code, output = start(tmp_path, load, *GPT_SOVITS)
    assert code == 0 and pair(tmp_path) == (([3], [3]) if d_of_rank_1 else ([2], [2])), output
    assert not list((tmp_path / ".lastgood").glob("open-*")), output


def test_a_pair_whose_earlier_version_is_gone_is_left_and_that_is_said(tmp_path: Path) -> None:
    code = textwrap.dedent(SAVE_PAIR) + "both(1), both(2), save('G', 3), os.kill(os.getpid(), 9)"
    assert start(tmp_path, code, *GPT_SOVITS)[0] == KILLED
    for link in (tmp_path / ".lastgood" / "history").glob("G_*"):
        link.unlink()
    code, output = start(tmp_path, "import torch; torch.load('D_233333333333.pth')", *GPT_SOVITS)
    assert code == 0 and pair(tmp_path) == ([3], [2]) and "no earlier version" in output, output
    assert not list((tmp_path / ".lastgood").glob("open-*"))


def test_without_history_the_only_file_of_a_pair_stays(tmp_path: Path) -> None:
    code = textwrap.dedent(SAVE_PAIR) + "both(1), both(2), save('G', 3), os.kill(os.getpid(), 9)"
    assert start(tmp_path, code, *GPT_SOVITS, "--history", "0")[0] == KILLED
    code, output = start(tmp_path, "import torch; torch.load('D_233333333333.pth')", *GPT_SOVITS, "--history", "0")
    assert code == 0 and pair(tmp_path) == ([3], [2]) and "no earlier version" in output, output


def test_a_new_file_of_a_pair_that_was_not_completed_is_put_away(tmp_path: Path) -> None:
    code = """
        import os, torch
        for step in (1, 2):
            torch.save([step], f"G_{step}.pth")
            if step == 2: os.kill(os.getpid(), 9)
            torch.save([step], f"D_{step}.pth")
    """
    assert start(tmp_path, code, *GPT_SOVITS, "--history", "0")[0] == KILLED
    code, output = start(tmp_path, "import os, safetensors; print(sorted(os.listdir()))", *GPT_SOVITS)
    assert "['D_1.pth', 'G_1.pth', 'script.py']" in output, output


def test_a_pair_is_taken_back_where_the_file_system_has_no_links(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        textwrap.dedent(SAVE_PAIR)
        + textwrap.dedent(
            """
            def link(*_, **__): raise OSError(1, "Operation not permitted")
            import _lastgood_run.system as system
            system.link = link
            both(1), both(2), save("G", 3), os.kill(os.getpid(), 9)
            """
        ),
        *GPT_SOVITS,
    )
    assert code == KILLED, output
    code, output = start(tmp_path, "import torch; torch.load('D_233333333333.pth')", *GPT_SOVITS)
    assert code == 0 and pair(tmp_path) == ([2], [2]), output


def test_a_recovery_that_is_killed_leaves_no_copy_behind(tmp_path: Path) -> None:
    """The program saves elsewhere and moves its files here, so that no save of it makes a temporary file here."""
    (tmp_path / "logs").mkdir()
    save = """
        import os, torch
        def save(letter, epoch):
            torch.save([epoch], "1795.pth")
            os.replace("1795.pth", f"logs/{letter}_233333333333.pth")
    """
    crash = "for epoch in (1, 2): save('G', epoch), save('D', epoch)\nsave('G', 3), os.kill(os.getpid(), 9)"
    assert start(tmp_path, textwrap.dedent(save) + crash, *GPT_SOVITS)[0] == KILLED
    code, output = start(
        tmp_path,
        """
        import os, torch
        from _lastgood_run import system
        copyfile = system.copyfile
        def cut_off(source, target): copyfile(source, target), os.kill(os.getpid(), 9)
        system.copyfile = cut_off
        torch.load("logs/D_233333333333.pth")
        """,
        *GPT_SOVITS,
    )
    assert code == KILLED, output
    left = [name for name in os.listdir(tmp_path / "logs" / ".lastgood") if name.startswith("tmp-")]
    assert len(left) == 1
    code, output = start(tmp_path, "import torch; torch.load('logs/D_233333333333.pth')", *GPT_SOVITS)
    assert code == 0 and pair(tmp_path / "logs") == ([2], [2]), output
    left = [name for name in os.listdir(tmp_path / "logs" / ".lastgood") if name.startswith("tmp-")]
    assert not left


# Damage.


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data[:-20])


@pytest.mark.parametrize("damaged", ["D", "G"])
@pytest.mark.parametrize("name", ["233333333333", "step"])
def test_a_damaged_file_of_a_pair_is_replaced_with_its_fellow(tmp_path: Path, damaged: str, name: str) -> None:
    step = "233333333333" if name == "233333333333" else "{epoch}"
    save = f"""
        import torch
        for epoch in (1, 2, 3):
            for letter in "GD": torch.save([epoch], f"{{letter}}_{step}.pth")
    """
    assert start(tmp_path, save, *GPT_SOVITS)[0] == 0
    last = name if name != "step" else "3"
    damage(tmp_path / f"{damaged}_{last}.pth")
    load = f"import torch; print([torch.load(f'{{letter}}_{last}.pth') for letter in 'DG'])"
    code, output = start(tmp_path, load, *GPT_SOVITS, "--fallback")
    assert code == 0 and "[[2], [2]]" in output and "instead" in output, output


def test_a_damaged_file_of_a_pair_without_a_whole_one_to_go_back_to_is_refused(tmp_path: Path) -> None:
    assert start(tmp_path, textwrap.dedent(SAVE_PAIR) + "both(1), both(2)", *GPT_SOVITS)[0] == 0
    for path in (tmp_path / "D_233333333333.pth", *(tmp_path / ".lastgood" / "history").glob("G_*")):
        damage(path)
    load = "import torch; print([torch.load(f'{letter}_233333333333.pth') for letter in 'DG'])"
    code, output = start(tmp_path, load, *GPT_SOVITS, "--fallback")
    assert code == 1 and "belong together" in output, output


def test_versions_whose_save_is_not_known_do_not_stand_in_for_a_damaged_pair(tmp_path: Path) -> None:
    """As what was saved before saves had numbers: G of epoch 1 and D of epoch 2 have none."""
    assert start(tmp_path, textwrap.dedent(SAVE_PAIR) + "both(1), both(2)", *GPT_SOVITS)[0] == 0
    for path in (tmp_path / ".lastgood").glob("?_*.jsonl"):
        path.write_text(re.sub(r', "save": \d+', "", path.read_text()))
    for path in (tmp_path / ".lastgood" / "history").glob("D_*"):
        path.unlink()
    damage(tmp_path / "G_233333333333.pth")
    load = "import torch; print([torch.load(f'{letter}_233333333333.pth') for letter in 'DG'])"
    code, output = start(tmp_path, load, *GPT_SOVITS, "--fallback")
    assert code == 1 and "belong together" in output, output


def test_a_damaged_file_of_a_directory_is_not_replaced_by_another_rank_s(tmp_path: Path) -> None:
    assert run(tmp_path, "part('rng_state_0', 0), part('rng_state_1', 1)")[0] == 0
    damage(tmp_path / "checkpoint-1" / "rng_state_1.pth")
    code, output = run(tmp_path, "torch.load('checkpoint-1/rng_state_1.pth')", *COMPLETE, "--fallback")
    assert code == 1 and "belong together" in output, output


def test_a_missing_file_is_missing_with_fallback_too(tmp_path: Path) -> None:
    assert start(tmp_path, "import torch\nfor i in (1, 2): torch.save([i], f'model_{i}.pth')")[0] == 0
    (tmp_path / "model_2.pth").unlink()
    code, output = start(tmp_path, "import torch; torch.load('model_2.pth')", "--fallback")
    assert code == 1 and "FileNotFoundError" in output and "Loading" not in output, output


@posix
def test_a_process_that_has_ended_is_dead_before_anybody_asks_for_its_exit_code() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        assert not system.is_alive(child)
    finally:
        os.waitpid(child, 0)
    assert system.is_alive(os.getpid()) and system.birth(os.getpid())


def test_the_mirror_does_not_finish_what_the_program_left_with_an_error(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import os, sys, time, torch
        import _lastgood_run.mirror as mirror
        copy = mirror.Mirror._copy
        def late(self, *arguments):
            time.sleep(1)  # The program has ended by then; the interpreter waits for this thread.
            copy(self, *arguments)
        mirror.Mirror._copy = late
        os.mkdir("checkpoint-1")
        torch.save([1], "checkpoint-1/model.pth")
        sys.exit(1)
        """,
        *("--complete", "checkpoint-*", "--mirror", str(tmp_path / "mirror")),
    )
    assert code == 1, output
    assert (tmp_path / "mirror" / "checkpoint-1" / "model.pth").exists()
    code, output = start(tmp_path, "import os, safetensors; print(sorted(os.listdir()))", "--complete", "checkpoint-*")
    assert "['mirror', 'script.py']" in output, output


def test_a_timer_that_cannot_be_started_fails_no_save(tmp_path: Path) -> None:
    """At the end of the interpreter no thread can."""
    code, output = start(
        tmp_path,
        """
        import os, threading, torch
        def start(self): raise RuntimeError("can't create new thread at interpreter shutdown")
        threading.Timer.start = start
        os.mkdir("checkpoint-1")
        torch.save([1], "checkpoint-1/model.pth")
        """,
        *("--complete", "checkpoint-*"),
    )
    assert code == 0 and "0 failed" in output, output


@posix
def test_a_signal_whose_handler_saves_may_come_in_a_save(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import os, signal, torch
        import _lastgood_run.report as report
        leave = report.Report._leave
        def interrupted(self):
            report.Report._leave = leave
            os.kill(os.getpid(), signal.SIGUSR1)  # While its lock is held.
            leave(self)
        signal.signal(signal.SIGUSR1, lambda *_: torch.save([2], "last.pth"))
        torch.save([0], "first.pth")
        report.Report._leave = interrupted
        torch.save([1], "other.pth")
        assert torch.load("last.pth") == [2]
        """,
    )
    assert code == 0 and "3 files saved" in output, output


@posix
def test_a_pair_that_another_rank_completed_is_complete_though_rank_0_was_killed_in_front_of_its_move(
    tmp_path: Path,
) -> None:
    """Rank 0 has put G there and has written down D, which it did not come to move: there lies another rank's D."""
    code, output = start(
        tmp_path,
        """
        import os, time, torch
        import _lastgood_run.journal as journal, _lastgood_run.system as system
        def pair(step):
            for name in "GD":
                torch.save({"iteration": step}, f"{name}_2333.pth")
        pair(1)
        replace = system.replace
        def moved(source, target):
            if not target.endswith("D_2333.pth"):
                return replace(source, target)
            *before, mine = journal.read(target)  # Written down a moment ago.
            torch.serialization._legacy_save({"iteration": 2}, open("other", "wb"), __import__("pickle"), 2)
            replace("other", target)
            theirs = journal.Version(os.stat(target).st_size, -1, mine.time, 1, mine.round, mine.run)
            theirs.inode, theirs.save = os.stat(target).st_ino, mine.save
            journal.write(target, [*before, theirs, mine])
            os.kill(os.getpid(), 9)
        system.replace = moved
        pair(2)
        """,
        *GPT_SOVITS,
    )
    assert code == KILLED, output
    code, output = start(
        tmp_path,
        """
        import torch
        print([torch.load(f"{name}_2333.pth")["iteration"] for name in "DG"])
        """,
        *GPT_SOVITS,
    )
    assert "[2, 2]" in output, output


@pytest.mark.parametrize(
    "options",
    [("--complete", "model.pth,optimizer.pth,epoch.json"), ("--complete", "checkpoint")],
    ids=["files", "a directory"],
)
def test_a_checkpoint_of_one_name_that_is_overwritten_and_loaded_by_its_path_is_taken_back(
    tmp_path: Path, options: tuple[str, str]
) -> None:
    """As skorch keeps its newest state; nobody lists the directory above."""
    save = """
        import json, os, torch
        def save(step):
            os.makedirs("checkpoint", exist_ok=True)
            for name in ("model", "optimizer"): torch.save([step], f"checkpoint/{name}.pth")
            with open("checkpoint/epoch.json", "w") as file:
                json.dump([step], file)
                if step == 3: os.kill(os.getpid(), 9)
        for step in (1, 2, 3): save(step)
    """
    assert start(tmp_path, save, *options)[0] == KILLED
    load = "import json, torch; print([torch.load(f'checkpoint/{name}.pth') for name in ('model', 'optimizer')]"
    code, output = start(tmp_path, load + ", json.load(open('checkpoint/epoch.json')))", *options)
    assert code == 0 and "[[2], [2]] [2]" in output, output


@pytest.mark.parametrize("wrote", ["part('model', 2), part('optimizer', 2)", "os.mkdir('checkpoint-2')"])
def test_a_directory_is_finished_when_the_program_deletes_the_one_before(tmp_path: Path, wrote: str) -> None:
    """As speechbrain does: if the new one were set aside after that, there would be none."""
    wrote = wrote.replace(", 2)", ", 2, 'checkpoint-2')")
    code = "import shutil\nwhole()\nshutil.rmtree('checkpoint-0', ignore_errors=True)\n"
    code, output = run(tmp_path, code + wrote + "\nshutil.rmtree('checkpoint-1')\nkill()", *COMPLETE)
    assert code == KILLED, output
    assert ("['checkpoint-2']" if "part" in wrote else "[]") in listed(tmp_path), output


def test_a_program_that_deletes_the_oldest_in_the_middle_of_a_save_has_not_finished_it(tmp_path: Path) -> None:
    """As the older examples of Hugging Face do, between the model and the optimizer."""
    code = "import shutil\nfor step in (0, 1): part('model', step, f'checkpoint-{step}')\n"
    code += "part('model', 2, 'checkpoint-2')\nshutil.rmtree('checkpoint-0')\nkill()"
    ended, output = run(tmp_path, code, *COMPLETE)
    assert ended == KILLED, output
    assert "['checkpoint-1']" in listed(tmp_path), output


SHARDED = """
    import os, pickle, torch
    from pathlib import Path
    from safetensors.torch import load_file, save_file
    rank = os.environ["RANK"]
    directory = Path("step_1")
    directory.mkdir(exist_ok=True)

    def save_as_torch_distributed_does():
        with (directory / f"__{rank}_0.distcp").open("wb") as file:
            torch.save([1, rank], file)
            os.fsync(file.fileno())
        if rank == "0":
            with (directory / ".metadata.tmp").open("wb") as file: pickle.dump([1], file)
            (directory / ".metadata.tmp").rename(directory / ".metadata")

    def load_as_torch_distributed_does():
        for name in (".metadata", "__0_0.distcp"):
            with (directory / name).open("rb") as file: file.read()

    def save_shards():
        for i in (1, 2): save_file({"w": torch.full((9,), float(i))}, f"step_1/model-0000{i}-of-00002.safetensors")
"""


def test_a_shard_of_a_group_is_read_from_what_stands_in_for_it(tmp_path: Path) -> None:
    options = ("--fallback", "--complete", ".metadata,__0_0.distcp", "--history", "2")
    for count in (1, 2):
        save = "save_as_torch_distributed_does()".join(["", f"\nprint({count})"])
        assert start(tmp_path, textwrap.dedent(SHARDED) + save, *options, RANK="0")[0] == 0
    path = tmp_path / "step_1" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-20])
    load = "for name in ('.metadata', '__0_0.distcp'):\n    print(name, len((directory / name).open('rb').read()))"
    code, output = start(tmp_path, textwrap.dedent(SHARDED) + load, *options, RANK="0")
    assert code == 0 and "instead" in output, output
    assert f"__0_0.distcp {path.stat().st_size + 20}" in output, output


@pytest.mark.parametrize(
    "save, load, damaged",
    [
        ("save_as_torch_distributed_does()", "load_as_torch_distributed_does()", "__0_0.distcp"),
        ("save_as_torch_distributed_does()", "load_as_torch_distributed_does()", ".metadata"),
        ("save_shards()", "load_file('step_1/model-00002-of-00002.safetensors')", "model-00002-of-00002.safetensors"),
        ("torch.save([rank], f'step_1/mp_rank_0{rank}.pt')", "torch.load('step_1/mp_rank_01.pt')", "mp_rank_01.pt"),
    ],
    ids=["a shard of torch.distributed", "its directory", "a shard of safetensors", "a rank's part"],
)
def test_another_part_of_a_checkpoint_does_not_stand_in_for_a_damaged_one(
    tmp_path: Path, save: str, load: str, damaged: str
) -> None:
    """Without --complete: their names differ by a number, as those of two steps do."""
    for rank in "01":
        code, output = start(tmp_path, textwrap.dedent(SHARDED) + save, RANK=rank)
        assert code == 0, output
    assert damaged in {Path(finding.path).name for finding in journal.verify(tmp_path)}
    assert start(tmp_path, textwrap.dedent(SHARDED) + load, "--fallback", RANK="0")[0] == 0
    path = tmp_path / "step_1" / damaged
    before = path.stat()
    data = path.read_bytes()
    middle = data.rfind(b"data.pkl") if data[:2] == b"PK" else len(data) - 1
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    code, output = start(tmp_path, textwrap.dedent(SHARDED) + load, "--fallback", RANK="0")
    assert code == 1 and f"{damaged} is damaged" in output and "load another checkpoint" in output, output
