"""`lastgood run` on real processes: the environment, the ranks, moves, damage, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lastgood.intercept import journal, launch

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX processes")


def start(directory: Path, code: str, *options: str, protected: bool = True, **variables: str) -> tuple[int, str]:
    """Exit code and output of a script, with or without `lastgood run`."""
    script = directory / "script.py"
    script.write_text(textwrap.dedent(code), encoding="utf-8")
    prefix = [sys.executable, "-m", "lastgood.cli.run", *options, "--"] if protected else []
    done = subprocess.run(
        [*prefix, sys.executable, str(script)],
        cwd=directory,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=200,
    )
    return done.returncode, done.stdout


@pytest.fixture
def memory() -> Iterator[Path]:
    directory = subprocess.run(["mktemp", "-d", "-p", "/dev/shm"], capture_output=True, text=True).stdout.strip()
    if not directory:
        pytest.skip("there is no /dev/shm")
    yield Path(directory)
    subprocess.run(["rm", "-rf", directory], check=True)


# The bug that this project starts from.

RANKS = """
    import os, shutil, sys, time
    import torch

    def rank(number, rounds, target, wake):
        if os.environ.get("KNOWN"):
            os.environ.update(RANK=str(number), WORLD_SIZE="2")
        failures = 0
        for i in range(rounds):
            wake.wait(60)
            name = f"{round_names[i]}.pth"      # time.time() of both, in one tick of the clock
            try:
                torch.save({"round": i, "rank": number, "w": torch.full((3000,), float(i))}, name)
                shutil.move(name, target)
            except Exception as error:
                failures += 1
                print(f"round {i} rank {number}: {error!r}", flush=True)
            wake.wait(60)
            saved = torch.load(target)
            if not bool((saved["w"] == saved["round"]).all()) or saved["round"] != i:
                failures += 1
                print("round", i, "damaged", saved["round"], flush=True)
            wake.wait(60)
        sys.stdout.flush()
        os._exit(1 if failures else 0)

    rounds = int(os.environ["ROUNDS"])
    round_names = [f"{1795380252 + i}.{i}" for i in range(rounds)]
    if __name__ == "__main__":
        import multiprocessing
        context = multiprocessing.get_context("fork")
        wake = context.Barrier(2)
        target = os.environ["TARGET"]
        ranks = [context.Process(target=rank, args=(i, rounds, target, wake)) for i in range(2)]
        for process in ranks: process.start()
        for process in ranks: process.join()
        sys.exit(max(process.exitcode for process in ranks))
"""


@posix
@pytest.mark.parametrize("known", ["", "1"], ids=["ranks unknown", "ranks known"])
@pytest.mark.parametrize("across", [False, True], ids=["one file system", "two file systems"])
def test_two_ranks_with_one_temporary_name(tmp_path: Path, memory: Path, across: bool, known: str) -> None:
    target = (memory if across else tmp_path) / "last.pth"
    code, output = start(tmp_path, RANKS, ROUNDS="200", TARGET=str(target), KNOWN=known)
    assert code == 0, output
    assert torch.load(target)["round"] == 199
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("1795")]
    assert not [finding for finding in journal.verify(target.parent) if finding.damage]


@posix
def test_the_same_ranks_fail_without_us(tmp_path: Path) -> None:
    code, output = start(tmp_path, RANKS, protected=False, ROUNDS="200", TARGET=str(tmp_path / "last.pth"))
    assert code == 1
    assert "FileNotFoundError" in output or "No such file" in output


@posix
def test_a_file_that_is_saved_under_a_temporary_name_and_moved_counts_once(tmp_path: Path, memory: Path) -> None:
    code, output = start(
        tmp_path,
        f"""
        import os, shutil, torch
        for target in ("last.pth", {str(memory / "last.pth")!r}):
            torch.save(torch.zeros(250_000), "tmp.pth")
            shutil.move("tmp.pth", target)
        torch.save(torch.zeros(250_000), "tmp.pth")
        os.replace("tmp.pth", "other.pth")
        """,
    )
    assert code == 0 and "3 files saved, 3.0 MB" in output, output


@posix
def test_a_rank_that_is_late_puts_no_old_state_over_a_newer_one(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import os, torch
        reader, writer = os.pipe()
        late = os.fork()
        os.environ.update(RANK="1" if late == 0 else "0", WORLD_SIZE="2")
        if late == 0:
            os.read(reader, 1)
            for step in (1, 2):
                torch.save([step], "tmp.pth")
                os.replace("tmp.pth", "last.pth")
                torch.save([step], "plain.pth")
            os._exit(0)
        for step in (1, 2, 3):
            torch.save([step], "tmp.pth")
            os.replace("tmp.pth", "last.pth")
            torch.save([step], "plain.pth")
        os.write(writer, b"x")
        os.wait()
        assert torch.load("last.pth") == [3] and torch.load("plain.pth") == [3], torch.load("last.pth")
        """,
    )
    assert code == 0, output
    assert "4 collisions avoided" in output


@posix
def test_a_late_rank_that_moved_the_newer_state_itself_puts_no_old_one_over_it(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import os, torch
        (saved, tell_saved), (moved, tell_moved) = os.pipe(), os.pipe()
        late = os.fork()
        os.environ.update(RANK="1" if late == 0 else "0", WORLD_SIZE="2")

        def save(step):
            torch.save([step], "tmp.pth")

        def move():
            os.replace("tmp.pth", "last.pth")

        if late == 0:
            os.read(saved, 1)
            save(1), move()     # What it moves is rank 0's third state.
            os.write(tell_moved, b"x")
            save(2), move()
            os._exit(0)
        save(1), move(), save(2), move(), save(3)
        os.write(tell_saved, b"x")
        os.read(moved, 1)
        move()
        os.wait()
        assert torch.load("last.pth") == [3], torch.load("last.pth")
        """,
    )
    assert code == 0, output


@posix
@pytest.mark.parametrize("across", [False, True], ids=["one file system", "two file systems"])
def test_rank_0_does_not_move_what_a_late_rank_saved_in_place_of_its_own(
    tmp_path: Path, memory: Path, across: bool
) -> None:
    code, output = start(
        tmp_path,
        """
        import os, shutil, torch
        target = os.environ["TARGET"]
        (saved, tell_saved), (moved, tell_moved), (last, tell_last) = os.pipe(), os.pipe(), os.pipe()
        late = os.fork()
        os.environ.update(RANK="1" if late == 0 else "0", WORLD_SIZE="2")

        def save(step):
            torch.save([step], "tmp.pth")

        def move():
            shutil.move("tmp.pth", target)

        if late == 0:
            os.read(saved, 1)
            save(1), move()     # What it moves is rank 0's third state.
            save(2)
            os.write(tell_moved, b"x")
            os.read(last, 1)
            move()
            os._exit(0)
        save(1), move(), save(2), move(), save(3)
        os.write(tell_saved, b"x")
        os.read(moved, 1)
        move()                  # What lies there is the other's second state.
        before = torch.load(target)
        os.write(tell_last, b"x")
        assert os.wait()[1] == 0
        assert (before, torch.load(target)) == ([3], [3]), (before, torch.load(target))
        save(4), move()
        assert torch.load(target) == [4] and not os.path.exists("tmp.pth")
        """,
        TARGET=str((memory if across else tmp_path) / "last.pth"),
    )
    assert code == 0, output


@posix
def test_ranks_that_are_started_anew_are_not_taken_for_those_before(tmp_path: Path) -> None:
    """As torchrun does it with --max-restarts: the rounds of a process begin again, and the run is the same."""
    code, output = start(
        tmp_path,
        """
        import os, subprocess, sys, torch
        if len(sys.argv) == 1:
            for life in ("first", "second"):
                subprocess.run([sys.executable, __file__, life], check=True)
            sys.exit()

        def save(step):
            torch.save([step], "tmp.pth")

        def move():
            os.replace("tmp.pth", "last.pth")

        os.environ.update(RANK="0", WORLD_SIZE="2")
        if sys.argv[1] == "first":
            save(1), move(), save(2), move(), save(3), move()
            sys.exit()
        save(4)
        other = os.fork()
        if other == 0:
            os.environ["RANK"] = "1"
            save(4), save(5), save(6)
            os._exit(0)
        assert os.waitpid(other, 0)[1] == 0
        move()                  # What lies there is newer.
        assert not os.path.exists("tmp.pth")
        assert torch.load("last.pth")[0] > 3, torch.load("last.pth")
        """,
    )
    assert code == 0, output


@posix
def test_rank_0_killed_in_a_save_does_not_make_another_ranks_state_its_own(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import os, torch
        (begun, tell_begun), (saved, tell_saved), (killed, tell_killed) = os.pipe(), os.pipe(), os.pipe()
        late = os.fork()
        os.environ.update(RANK="1" if late == 0 else "0", WORLD_SIZE="2")

        def save(step):
            torch.save([step], "tmp.pth")

        if late == 0:
            os.read(begun, 1)
            save(1)
            os.write(tell_saved, b"x")
            os.read(killed, 1)
            os.replace("tmp.pth", "last.pth")
            os._exit(0)
        if os.fork() == 0:
            import _lastgood_run.system as system
            save(1), os.replace("tmp.pth", "last.pth")
            save(2), os.replace("tmp.pth", "last.pth")
            os.write(tell_begun, b"x")
            os.read(saved, 1)
            system.replace = lambda source, target: os._exit(0)     # Killed: the journal is written, and no more.
            save(3)
        os.wait()
        os.write(tell_killed, b"x")
        os.wait()
        assert torch.load("last.pth") == [2], torch.load("last.pth")
        """,
    )
    assert code == 0, output


@posix
def test_save_on_rank0_writes_once_and_the_others_see_it_as_done(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import os, shutil, torch
        rank = os.environ["RANK"]
        torch.save({"rank": rank}, f"tmp-{rank}x.pth")
        assert os.path.exists(f"tmp-{rank}x.pth") and os.path.getsize(f"tmp-{rank}x.pth") > 500
        shutil.move(f"tmp-{rank}x.pth", "last.pth")
        assert not os.path.exists(f"tmp-{rank}x.pth") and os.path.isfile("last.pth")
        torch.save({"rank": rank}, f"rng_state_{rank}.pth")
        """,
        "--save-on",
        "rank0",
        RANK="7",
        WORLD_SIZE="8",
    )
    # Rank 7's temporary name has its number, so that file is its own: it is the target that is rank 0's.
    assert code == 0, output
    assert not (tmp_path / "last.pth").exists()
    assert torch.load(tmp_path / "rng_state_7.pth") == {"rank": "7"}
    code, output = start(tmp_path, "import torch; torch.save([0], 'last.pth')", "--save-on", "rank0", RANK="0")
    assert code == 0, output
    assert torch.load(tmp_path / "last.pth") == [0]


# Files.


def test_history_fallback_and_verify(tmp_path: Path) -> None:
    code, output = start(
        tmp_path, "import torch\nfor i in range(5): torch.save({'i': i}, 'last.pth')", "--history", "2"
    )
    assert code == 0, output
    assert len(list((tmp_path / ".lastgood" / "history").iterdir())) == 2
    assert not [finding for finding in journal.verify(tmp_path) if finding.damage]
    assert len(journal.verify(tmp_path)) == 3
    data = bytearray((tmp_path / "last.pth").read_bytes())
    data[data.index(b"X\x01\x00\x00\x00i") + 5] ^= 1  # The key. What torch pads its files with is nobody's content.
    (tmp_path / "last.pth").write_bytes(data)
    assert [Path(finding.path).name for finding in journal.verify(tmp_path) if finding.damage] == ["last.pth"]
    load = "import torch; print('loaded', torch.load('last.pth')['i'])"
    code, output = start(tmp_path, load)
    assert code == 1
    assert "is damaged" in output and ".lastgood/history/last.pth." in output.replace("\\", "/")
    code, output = start(tmp_path, load, "--fallback")
    assert code == 0
    assert "loaded 3" in output and "instead" in output


def test_a_program_that_swallows_the_refusal_of_a_damaged_pair_is_told_and_its_earlier_pair_stays(
    tmp_path: Path,
) -> None:
    """As GPT-SoVITS does, which then begins at epoch 1 and saves over the only pair."""
    program = """
        import os, shutil, torch
        def save(letter, epoch):
            torch.save([epoch], "1795.pth")
            shutil.move("1795.pth", f"{letter}_233333333333.pth")
        try:
            epoch = [torch.load(f"{letter}_233333333333.pth") for letter in "DG"][0][0]
        except:
            epoch = 0
        for epoch in range(epoch + 1, epoch + 3):
            save("G", epoch), save("D", epoch)
    """
    pair = ("--preset", "gpt-sovits")
    code, output = start(tmp_path, program, *pair)
    assert code == 0 and "refused" not in output, output
    path = tmp_path / "G_233333333333.pth"
    path.write_bytes(path.read_bytes()[:-20])
    history = {path.name: path.read_bytes() for path in (tmp_path / ".lastgood" / "history").iterdir()}
    assert len(history) == 2
    code, output = start(tmp_path, program, *pair)
    assert code == 0 and "G_233333333333.pth is damaged" in output and "--fallback" in output, output
    assert "1 damaged files refused" in output, output
    for name, data in history.items():
        assert (tmp_path / ".lastgood" / "history" / name).read_bytes() == data
    # Nor is the damaged one kept as a version to which a crash in the middle of a pair would go back.
    after = sorted((kept.name[0], torch.load(kept)[0]) for kept in (tmp_path / ".lastgood" / "history").iterdir())
    assert after == [("D", 1), ("D", 1), ("G", 1), ("G", 1)]


def test_a_damaged_file_that_is_saved_over_does_not_become_an_earlier_version(tmp_path: Path) -> None:
    """It would pass for an intact one, for of a file with another size the journal knows nothing."""
    assert start(tmp_path, "import torch\nfor i in (1, 2): torch.save({'i': i}, 'last.pth')")[0] == 0
    path = tmp_path / "last.pth"
    path.write_bytes(path.read_bytes()[:-20])
    assert start(tmp_path, "import torch; torch.save({'i': 3}, 'last.pth')")[0] == 0
    assert [torch.load(kept) for kept in (tmp_path / ".lastgood" / "history").iterdir()] == [{"i": 1}]


def test_a_damaged_safetensors_file_is_refused_and_its_earlier_version_loaded_instead(tmp_path: Path) -> None:
    save = "import torch\nfrom safetensors.torch import save_file\n"
    save += "for i in (1, 2): save_file({'w': torch.full((99,), float(i))}, 'model.safetensors')"
    assert start(tmp_path, save)[0] == 0
    path = tmp_path / "model.safetensors"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # A disk that fails leaves no date.
    load = """
        from safetensors import safe_open
        from safetensors.torch import load_file
        def opened():
            with safe_open("model.safetensors", "pt") as file: return file.get_tensor("w")[-1].item()
        for load in (opened, lambda: load_file("model.safetensors")["w"][-1].item()):
            try: print("LOADED", load())
            except RuntimeError as error: print("REFUSED", error)
    """
    code, output = start(tmp_path, load)
    assert code == 0 and output.count("REFUSED") == 2 and "is damaged" in output and ".lastgood" in output, output
    code, output = start(tmp_path, load, "--fallback")
    assert code == 0 and output.count("LOADED 1.0") == 2, output


def test_a_file_that_another_program_replaced_is_not_called_damaged(tmp_path: Path) -> None:
    assert start(tmp_path, "import torch; torch.save({'i': 1}, 'last.pth')")[0] == 0
    torch.save({"i": 2, "more": torch.zeros(100)}, tmp_path / "last.pth")
    code, output = start(tmp_path, "import torch; print('loaded', torch.load('last.pth')['i'])")
    assert "loaded 2" in output and code == 0


def test_what_another_program_wrote_without_checksums_is_not_called_damaged(tmp_path: Path) -> None:
    options = "import torch; torch.serialization.set_crc32_options(False); "
    assert start(tmp_path, options + "torch.save({'i': 1}, 'last.pth')")[0] == 0
    changed = os.stat(tmp_path / "last.pth").st_mtime + 5
    load = "import torch; print('loaded', torch.load('last.pth')['i'])"
    assert start(tmp_path, options + "torch.save({'i': 2}, 'last.pth')", protected=False)[0] == 0
    os.utime(tmp_path / "last.pth", (changed, changed))
    code, output = start(tmp_path, load)
    assert "loaded 2" in output and code == 0, output
    whole = (tmp_path / "last.pth").read_bytes()
    for damaged, when in ((whole[: len(whole) // 2], changed), (whole.replace(b"little", b"middle"), changed - 5)):
        (tmp_path / "last.pth").write_bytes(damaged)
        os.utime(tmp_path / "last.pth", (when, when))
        code, output = start(tmp_path, load)
        assert "is damaged" in output and code == 1, output


def test_a_zip_whose_beginning_is_damaged_is_damaged_whatever_its_date(tmp_path: Path) -> None:
    """As one is that was copied without its date: it does not pass for torch's old format, which has no checksums."""
    assert start(tmp_path, "import torch\nfor i in (1, 2): torch.save({'i': i}, 'last.pth')")[0] == 0
    path = tmp_path / "last.pth"
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    os.utime(path, (path.stat().st_mtime + 5, path.stat().st_mtime + 5))
    load = "import torch; print('loaded', torch.load('last.pth')['i'])"
    assert "is damaged" in start(tmp_path, load)[1]
    code, output = start(tmp_path, load, "--fallback")
    assert code == 0 and "loaded 1" in output, output


@pytest.mark.parametrize("names", ["epoch_1_of_100.pt epoch_2_of_100.pt", "step_10.pt step_20.pt"])
def test_another_step_stands_in_whichever_rank_saved_it(tmp_path: Path, names: str) -> None:
    for rank, name in enumerate(names.split()):
        save = f"import torch; torch.save({{'i': {rank}}}, {name!r})"
        assert start(tmp_path, save, RANK=str(rank))[0] == 0
    path = tmp_path / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    code, output = start(tmp_path, f"import torch; print('loaded', torch.load({name!r})['i'])", "--fallback")
    assert code == 0 and "loaded 0" in output, output


@pytest.mark.parametrize("later", [True, False], ids=["written later", "changed in place"])
def test_what_another_program_wrote_in_a_format_without_checksums_is_not_called_damaged(
    tmp_path: Path, later: bool
) -> None:
    """As a resumed program does that is started without us; a disk that fails leaves no date."""
    save = """
        import json, pickle, sys, torch
        from safetensors.torch import save
        i = int(sys.argv[1])
        torch.save({"i": i, "w": torch.ones(99 * i)}, "last.pth", _use_new_zipfile_serialization=False)
        with open("params.pt", "wb") as file: file.write(save({"w": torch.ones(99 * i)}))
        with open("net.pkl", "wb") as file: pickle.dump([i] * 99 * i, file)
        with open("state.json", "w") as file: json.dump([i] * 99 * i, file)
        with open("meta.yaml", "w") as file: file.write("[1] " * i)
    """
    names = ("last.pth", "params.pt", "net.pkl", "state.json", "meta.yaml")
    assert start(tmp_path, save.replace("sys.argv[1]", "1"))[0] == 0
    saved = {name: (tmp_path / name).stat().st_mtime for name in names}
    assert start(tmp_path, save.replace("sys.argv[1]", "2"), protected=False)[0] == 0
    for name, when in saved.items():
        os.utime(tmp_path / name, (when + 5 * later, when + 5 * later))
    damaged = [Path(finding.path).name for finding in journal.verify(tmp_path) if finding.damage]
    assert damaged == ([] if later else sorted(names))
    code, output = start(tmp_path, "import torch; print('loaded', torch.load('last.pth')['i'])")
    assert ("loaded 2" in output and code == 0) if later else ("is damaged" in output and code == 1), output
    for name, torn in (("last.pth", bytes(999)), ("net.pkl", b""), ("state.json", b"[1, 2")):
        (tmp_path / name).write_bytes(torn)
        os.utime(tmp_path / name, (saved[name] + 5, saved[name] + 5))
    damaged = [Path(finding.path).name for finding in journal.verify(tmp_path) if finding.damage]
    assert set(damaged) >= {"last.pth", "net.pkl", "state.json"}


@pytest.mark.parametrize("target", ['"last.pth"', 'open("last.pth", "wb")'])
@pytest.mark.parametrize("save_on", ["auto", "rank0"])
def test_data_that_the_program_writes_after_the_save_is_not_called_damaged(
    tmp_path: Path, save_on: str, target: str
) -> None:
    code, output = start(
        tmp_path,
        f"""
        import os, torch
        with torch.serialization.skip_data():
            torch.save({{"w": torch.arange(5000.0)}}, {target})
        print("size", os.path.getsize("last.pth"))
        if os.environ["RANK"] == "0":
            begins = torch._C.PyTorchFileReader("last.pth").get_record_offset("data/0")
            with open("last.pth", "r+b") as file:
                file.seek(begins)
                file.write(torch.arange(5000.0).numpy().tobytes())
            print("loaded", torch.load("last.pth")["w"][-1].item())
        """,
        "--save-on",
        save_on,
        RANK="1" if save_on == "rank0" else "0",
    )
    assert code == 0, output
    assert int(output.split()[1]) > 20_000
    assert (save_on == "auto") == ("loaded 4999.0" in output) == (tmp_path / "last.pth").exists()
    assert not [finding for finding in journal.verify(tmp_path) if finding.damage]


def test_every_file_of_the_program_may_be_a_checkpoint(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import json, torch
        with open("state.json", "w") as file: json.dump([1], file)
        with open("notes", "w") as file: file.write("one")
        torch.save([1], "last.pth")
        """,
        "--match",
        "*",
    )
    assert code == 0, output
    assert "3 files saved" in output
    assert {Path(finding.path).name for finding in journal.verify(tmp_path)} == {"state.json", "notes", "last.pth"}


def test_an_error_in_the_middle_keeps_the_old_file(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import json, torch
        torch.save([1], "last.pth")
        json.dump([1], open("state.json", "w"))
        class Bad:
            def __reduce__(self): raise ValueError("no")
        for save in (lambda: torch.save([torch.zeros(9), Bad()], "last.pth"),):
            try: save()
            except (ValueError, TypeError): pass
        try:
            with open("state.json", "w") as file:
                file.write("[")
                raise KeyError
        except KeyError: pass
        assert torch.load("last.pth") == [1] and json.load(open("state.json")) == [1]
        """,
    )
    assert code == launch.LAST_SAVE_FAILED, output
    assert "the last save FAILED" in output
    assert not [path for path in (tmp_path / ".lastgood").iterdir() if path.name.startswith("tmp-")]


def test_a_side_file_is_safe_before_the_process_saves_its_first_checkpoint(tmp_path: Path) -> None:
    """As after a resume, or in a rank that saves nothing else."""
    save = "import json, os, torch\njson.dump(['one'], open('state.json', 'w'))\ntorch.save([1], 'last.pth')\n"
    assert start(tmp_path, save)[0] == 0
    killed = "import os, torch\nfile = open('state.json', 'w')\nfile.write('[')\nfile.flush()\nos._exit(9)"
    assert start(tmp_path, killed)[0] == 9
    assert json.loads((tmp_path / "state.json").read_text()) == ["one"]


def test_a_resumed_program_that_deletes_a_checkpoint_deletes_its_earlier_versions(tmp_path: Path) -> None:
    assert start(tmp_path, "import torch\nfor i in (1, 2): torch.save([i], 'last.pth')")[0] == 0
    assert len(list((tmp_path / ".lastgood" / "history").iterdir())) == 1
    assert start(tmp_path, "import os, torch\nos.remove('last.pth')")[0] == 0
    assert not list((tmp_path / ".lastgood" / "history").iterdir()) and not journal.verify(tmp_path)


@pytest.mark.parametrize("again", [True, False], ids=["saved again", "not saved again"])
def test_a_failed_save_that_a_process_after_it_makes_good_is_no_failure_of_the_program(
    tmp_path: Path, again: bool
) -> None:
    """As torchrun starts ranks anew, of which one died while it saved."""
    code, output = start(
        tmp_path,
        f"""
        import subprocess, sys, torch
        class Bad:
            def __reduce__(self): raise RuntimeError("no")
        if sys.argv[1:] == ["bad"]: torch.save([1, Bad()], "rank1.pt")
        if sys.argv[1:]: torch.save([2], "rank1.pt" if {again} else "other.pt"); sys.exit()
        codes = [subprocess.run([sys.executable, "script.py", arg]).returncode for arg in ("good", "bad", "good")]
        assert codes == [0, 1, 0], codes
        """,
    )
    assert code == (0 if again else launch.LAST_SAVE_FAILED), output
    assert "1 failed" in output and ("last save FAILED" in output) == (not again), output


def test_a_failed_save_that_is_made_good_by_the_next_is_no_failure_of_the_program(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import torch
        try: torch.save([torch.zeros(9), lambda: 0], "last.pth")
        except Exception: print("REFUSED")
        torch.save([1], "last.pth")
        """,
    )
    assert code == 0 and "REFUSED" in output and "1 failed" in output, output


@posix
def test_a_journal_that_the_disk_cuts_short_fails_the_save_and_keeps_the_old_file(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import os, resource, torch
        for i in range(20): torch.save([i], "last.pth")
        limit = os.path.getsize(".lastgood/last.pth.jsonl") + 100
        assert limit > 2 * os.path.getsize("last.pth")
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try: torch.save([20], "last.pth")
        except OSError as error: print("REFUSED", error)
        """,
    )
    assert code == launch.LAST_SAVE_FAILED and "REFUSED" in output, output
    assert torch.load(tmp_path / "last.pth") == [19]
    assert not [finding for finding in journal.verify(tmp_path) if finding.damage]


HELD = """
    import os, shutil, sys, time, torch
    import _lastgood_run.system as system
    real, until = system.replace, time.monotonic() + float(sys.argv[1] if len(sys.argv) > 1 else os.environ["HELD"])
    def held(source, target):
        if os.path.abspath(str(target)) == os.path.abspath("last.pth") and time.monotonic() < until:
            error = PermissionError(13, "used by another process"); error.winerror = int(os.environ["CODE"])
            raise error
        return real(source, target)
    system.replace = held
    torch.save([1], "new.pth")
    try:
        if os.environ["HOW"] == "save": torch.save([1], "last.pth")
        else: shutil.move("new.pth", "last.pth")
    except PermissionError as error:
        print("REFUSED", error)
"""


@pytest.mark.parametrize(("how", "number"), [("save", "5"), ("move", "32"), ("save", "33")])
def test_a_destination_that_is_held_for_a_while(tmp_path: Path, how: str, number: str) -> None:
    code, output = start(tmp_path, HELD, HELD="0.7", HOW=how, CODE=number)
    assert code == 0, output
    assert torch.load(tmp_path / "last.pth") == [1]
    assert "REFUSED" not in output and " 0 retries" not in output


@pytest.mark.parametrize("how", ["save", "move"])
def test_a_destination_that_stays_held_keeps_the_new_file(tmp_path: Path, how: str) -> None:
    code, output = start(tmp_path, HELD, "--patience", "0.5", HELD="100", HOW=how, CODE="32")
    assert code == launch.LAST_SAVE_FAILED, output
    kept = output.split("The complete new file is ")[1].split(";")[0]
    assert torch.load(kept) == [1]
    assert not (tmp_path / "last.pth").exists()


def test_mirror(tmp_path: Path) -> None:
    code, output = start(tmp_path, "import torch; torch.save([1], 'last.pth')", "--mirror", str(tmp_path / "copies"))
    assert code == 0, output
    assert torch.load(tmp_path / "copies" / "last.pth") == [1]


def test_the_mirror_keeps_what_is_newest_under_the_names_that_remain(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import os, shutil, threading, time, torch
        import _lastgood_run.mirror as mirror
        copy, counts = shutil.copyfileobj, []
        def slow(*arguments):
            counts.append(threading.active_count())
            time.sleep(0.5 if len(counts) == 1 else 0.05)  # The first copy takes longer than the later ones.
            copy(*arguments)
        shutil.copyfileobj = slow
        for step in range(9):
            torch.save([step], "last.pth")
            torch.save([step], f"{step}.tmp.pth")
            time.sleep(0.02 * step)
            os.replace(f"{step}.tmp.pth", "moved.pth")
        torch.save([9], "at the end.pth")
        assert max(counts) == 2, counts
        """,
        "--mirror",
        str(tmp_path / "copies"),
    )
    assert code == 0, output
    names = ["at the end.pth", "last.pth", "moved.pth"]
    assert sorted(path.name for path in (tmp_path / "copies").glob("*.pth")) == names, output
    assert [torch.load(tmp_path / "copies" / name) for name in names] == [[9], [8], [8]]
    assert not list((tmp_path / ".lastgood").glob("tmp-*")) and not list((tmp_path / "copies/.lastgood").glob("tmp-*"))


def test_the_program_does_not_see_our_directory(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import glob, os, shutil, torch
        for name in ("a", "b"):
            os.mkdir(name)
            torch.save([1], f"{name}/x.pth")
            assert os.listdir(name) == ["x.pth"] and glob.glob(f"{name}/*") == [os.path.join(name, "x.pth")]
        os.remove("a/x.pth")
        os.rmdir("a")
        shutil.rmtree("b")
        assert not os.path.exists("a") and not os.path.exists("b")
        """,
    )
    assert code == 0, output


def test_an_unfinished_directory_is_set_aside(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import os, signal, torch
        for step in (1, 2):
            os.mkdir(f"checkpoint-{step}")
            for part in ("model", "optimizer"):
                torch.save([step], f"checkpoint-{step}/{part}.pth")
                if step == 2: os.kill(os.getpid(), 9)
        """,
        "--complete",
        "checkpoint-*",
    )
    assert code == (9 if os.name == "nt" else 128 + 9), output
    assert (tmp_path / "checkpoint-2").exists()
    code, output = start(tmp_path, "import os, torch; print(sorted(os.listdir()))", "--complete", "checkpoint-*")
    assert "['checkpoint-1', 'script.py']" in output and "not completely written" in output


@posix
def test_an_unfinished_directory_that_cannot_be_set_aside_is_out_of_sight_and_may_be_written_anew(
    tmp_path: Path,
) -> None:
    save = "for part in ('model', 'optimizer'): torch.save([step], f'checkpoint-{step}/{part}.pth')\n"
    killed = (
        "import os, torch\nfor step in (1, 2):\n os.makedirs(f'checkpoint-{step}', exist_ok=True)\n "
        + save.replace("\n", "; step == 2 and os.kill(os.getpid(), 9)\n")
    )
    assert start(tmp_path, killed, "--complete", "checkpoint-*")[0] == 128 + 9
    refuse = """
import os, torch
import _lastgood_run.system as system
def rename(source, target):  # As Windows does while a program has a file in the directory open.
    error = PermissionError(13, "Access is denied"); error.winerror = 5
    raise error
system.rename = rename
print(sorted(os.listdir()))
"""
    code, output = start(tmp_path, refuse, "--complete", "checkpoint-*")
    assert code == 0 and "['checkpoint-1', 'script.py']" in output and "cannot be dealt with" in output, output
    code, output = start(tmp_path, refuse + "step = 2\n" + save, "--complete", "checkpoint-*")
    assert code == 0, output
    code, output = start(tmp_path, "import os, safetensors; print(sorted(os.listdir()))", "--complete", "checkpoint-*")
    assert "['checkpoint-1', 'checkpoint-2', 'script.py']" in output, output
