"""One file under several names: links in its path, temporary names, kept names, permissions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_run import HELD, memory, posix, start

from lastgood.intercept import journal, launch

__all__ = ["memory"]

TWO_RANKS = """
    import multiprocessing, os, shutil, sys, torch
    link, target = os.environ["LINK"], os.environ["TARGET"]
    def rank(number, wake):
        if os.environ.get("KNOWN"): os.environ.update(RANK=str(number), WORLD_SIZE="2")
        for i in range(40):
            wake.wait(9)
            torch.save({"round": i, "w": torch.full((3000,), float(i))}, f"{link}/{i}.pth")
            shutil.move(f"{link}/{i}.pth", target)
            wake.wait(9)
            saved = torch.load(target)
            assert saved["round"] == i and bool((saved["w"] == i).all()), saved["round"]
    if __name__ == "__main__":
        context = multiprocessing.get_context("fork")
        wake = context.Barrier(2)
        ranks = [context.Process(target=rank, args=(i, wake)) for i in range(2)]
        for process in ranks: process.start()
        for process in ranks: process.join()
        sys.exit(max(abs(process.exitcode) for process in ranks))
"""


@posix
@pytest.mark.parametrize("known", ["", "1"], ids=["ranks unknown", "ranks known"])
@pytest.mark.parametrize("across", [False, True], ids=["one file system", "two file systems"])
def test_two_ranks_that_save_through_a_linked_directory(tmp_path: Path, memory: Path, across: bool, known: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "out").symlink_to(memory if across else tmp_path / "real")
    target = tmp_path / "out" / "last.pth"
    code, output = start(tmp_path, TWO_RANKS, LINK=str(tmp_path / "link"), TARGET=str(target), KNOWN=known)
    assert code == 0, output
    assert torch.load(target)["round"] == 39
    assert {path.name for path in (tmp_path / "real").iterdir()} <= {".lastgood", "last.pth"}
    assert not [finding for finding in journal.verify(target.parent) if finding.damage]


@posix
def test_a_rank_that_leaves_the_saving_to_rank_0_sees_its_files_through_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    code, output = start(
        tmp_path,
        """
        import os, shutil, torch
        torch.save([1], "link/a.pth")
        assert os.path.exists("link/a.pth") and os.path.isfile("real/a.pth") and os.stat("link/a.pth").st_size > 500
        os.replace("link/a.pth", "link/b.pth")
        assert not os.path.exists("link/a.pth") and os.path.getsize("link/b.pth") > 500
        shutil.move("link/b.pth", "real/c.pth")
        os.remove("link/c.pth")
        assert not os.path.exists("real/c.pth")
        """,
        "--save-on",
        "rank0",
        RANK="3",
    )
    assert code == 0, output
    assert not list((tmp_path / "real").glob("*.pth"))


@posix
def test_what_is_deleted_through_a_link_takes_its_history_with_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    code, output = start(
        tmp_path,
        """
        import os, torch
        for i in (1, 2): torch.save([i], "link/last.pth")
        assert os.listdir("real/.lastgood/history")
        os.remove("link/last.pth")
        assert not os.listdir("real/.lastgood/history")
        torch.save([3], "real/file.pth")
        os.symlink("file.pth", "real/latest.pth")
        torch.save([4], "real/latest.pth")              # Through the link,
        os.replace("real/latest.pth", "link/moved.pth") # which is moved as what it is.
        assert os.path.islink("real/moved.pth") and torch.load("real/file.pth") == [4]
        """,
    )
    assert code == 0, output


@posix
def test_a_rank_that_loads_what_rank_0_is_yet_to_save_waits_for_it(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import os, time, torch
        if os.fork() == 0:
            os.environ["RANK"] = "0"
            time.sleep(0.5)
            torch.save([0], "last.pth")
            os._exit(0)
        torch.save([3], "last.pth")
        assert torch.load("last.pth") == [0]
        """,
        "--save-on",
        "rank0",
        RANK="3",
    )
    assert code == 0, output


@pytest.mark.parametrize("how", ["save", "move"])
def test_a_complete_file_that_could_not_be_put_in_place_survives_the_next_start(tmp_path: Path, how: str) -> None:
    code, output = start(tmp_path, HELD, "--patience", "0.2", HELD="100", HOW=how, CODE="32")
    assert code == launch.LAST_SAVE_FAILED, output
    kept = output.split("The complete new file is ")[1].split(";")[0]
    code, output = start(tmp_path, "import torch; torch.save([2], 'last.pth'); torch.save([2], 'other.pth')")
    assert code == 0, output
    assert torch.load(kept) == [1] and (how == "move" or not kept.endswith(".pth"))


def test_a_complete_file_that_is_put_in_place_the_next_time_is_not_kept_twice(tmp_path: Path) -> None:
    program = HELD + "\n    import time; time.sleep(1)\n    torch.save([2], 'last.pth')"
    code, output = start(tmp_path, program, "--patience", "0.1", HELD="0.6", HOW="save", CODE="32")
    assert code == 0 and "The complete new file is" in output, output
    assert torch.load(tmp_path / "last.pth") == [2]
    assert not list((tmp_path / ".lastgood" / "unsaved").iterdir())


@pytest.mark.parametrize(
    "save",
    [
        "torch.save([1], 'missing/last.pth')",
        "open('missing/last.pth', 'wb')",
        "torch.save([1], 'new.pth'); shutil.move('new.pth', 'missing/last.pth')",
        "torch.save([1], 'new.pth'); os.replace('new.pth', 'missing/last.pth')",
        "open('there', 'w'); open('new.pth', 'wb').close(); os.rename('new.pth', 'there/last.pth')",
        "torch.save([1], 'new.pth'); shutil.copyfile('new.pth', 'missing/last.pth')",
        "os.mkdir('going'); file = open('going/last.pth', 'wb'); shutil.rmtree('going'); file.close()",
        "from safetensors.torch import save_file; save_file({'w': torch.zeros(9)}, 'missing/last.safetensors')",
    ],
)
def test_a_last_save_into_a_directory_that_is_missing_is_not_passed_over(tmp_path: Path, save: str) -> None:
    """As GPT-SoVITS's savee does it: it prints the error and goes on."""
    code, output = start(
        tmp_path, f"import os, shutil, torch\ntry: {save}\nexcept Exception: print('swallowed')\nelse: print('?')"
    )
    assert "swallowed" in output and code == launch.LAST_SAVE_FAILED, output
    assert "last save FAILED" in output


def test_what_is_missing_is_no_failed_save_when_the_program_makes_it_good(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import os, torch
        for step in (1, 2):
            try: torch.save([step], "late/last.pth"); break
            except Exception: os.mkdir("late")
        try: os.rename("no such file.pth", "late/last.pth")
        except FileNotFoundError: print("as ever")
        """,
    )
    assert code == 0 and "as ever" in output, output


@posix
def test_ranks_that_leave_the_saving_to_rank_0_write_nothing_and_see_all(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import numpy, os, shutil, torch
        def size(name):
            assert os.path.isfile(name)
            return os.stat(name).st_size
        open("last.pth", "w").write("rank 0's") if os.environ["RANK"] == "0" else None
        torch.save([3], "one.pth")
        shutil.copyfile("one.pth", "two.pth"), shutil.copy("one.pth", "three.pth"), shutil.copy2("one.pth", "four.pth")
        assert size("one.pth") == size("two.pth") == size("three.pth") == size("four.pth") > 500
        with open("five.pth", "wb") as file: file.write(b"x" * 999)
        assert size("five.pth") == 999
        with open("six.pth", "w") as file: file.write("x" * 99); assert file.name == "six.pth"
        assert size("six.pth") == 99
        os.mkdir("sub")
        numpy.savez("sub/seven.npz", a=numpy.zeros(999))
        assert size("sub/seven.npz") > 999 * 8
        shutil.move("one.pth", "sub")
        assert size("sub/one.pth") > 500 and not os.path.exists("one.pth")
        os.mkdir("rank_3"), os.mkdir("checkpoint-3")
        torch.save([3], "rank_3/state.pt"), torch.save([3], "checkpoint-3/state.pt")
        """,
        "--save-on",
        "rank0",
        "--match",
        "*.npz",
        RANK="3",
    )
    assert code == 0, output
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert {name for name in written if ".lastgood" not in name} == {"script.py", "rank_3/state.pt"}, written


@posix
def test_a_move_that_takes_longer_than_the_lock_is_held_fails_in_no_rank(tmp_path: Path, memory: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import multiprocessing, os, shutil, sys, time, torch
        target = os.environ["TARGET"]
        def rank(number, wake):
            import _lastgood_run.saving as saving, _lastgood_run.system as system
            system.LOCK_DEADLINE = 0.3
            put = saving.Saver._put
            def slow(self, *args, **kwargs):
                if kwargs.get("ahead") is not None or len(args) > 1 and args[1] == target: time.sleep(1)
                return put(self, *args, **kwargs)
            saving.Saver._put = slow
            wake.wait(60)
            torch.save([number], "tmp.pth")
            wake.wait(60)
            time.sleep(number / 2)
            getattr(sys.modules[os.environ["MODULE"]], os.environ["HOW"])("tmp.pth", target)
        if __name__ == "__main__":
            context = multiprocessing.get_context("fork")
            wake = context.Barrier(2)
            ranks = [context.Process(target=rank, args=(i, wake)) for i in range(2)]
            for process in ranks: process.start()
            for process in ranks: process.join()
            sys.exit(max(abs(process.exitcode) for process in ranks))
        """,
        TARGET=str(memory / "last.pth"),
        MODULE="shutil",
        HOW="move",
    )
    assert code == 0, output
    assert torch.load(memory / "last.pth") in ([0], [1])


@posix
def test_files_that_change_places_do_not_wait_for_each_other(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import multiprocessing, os, sys, time, torch
        def rank(number, wake):
            import _lastgood_run.saving as saving, _lastgood_run.system as system
            real = system._locked
            def slow(path):
                held = real(path)
                class Held:
                    def __enter__(self): held.__enter__(); time.sleep(0.3)
                    def __exit__(self, *error): return held.__exit__(*error)
                return Held()
            names = ["one.pth", "two.pth"]
            torch.save([number], names[number])
            wake.wait(60)
            system._locked = slow
            os.replace(names[number], names[1 - number])
        if __name__ == "__main__":
            context = multiprocessing.get_context("fork")
            wake = context.Barrier(2)
            ranks = [context.Process(target=rank, args=(i, wake)) for i in range(2)]
            begin = time.monotonic()
            for process in ranks: process.start()
            for process in ranks: process.join()
            assert time.monotonic() - begin < 30
        """,
    )
    assert code == 0, output
    assert len(list(tmp_path.glob("*.pth"))) == 1


def test_a_move_into_a_directory_replaces_nothing_there(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import os, shutil, torch
        os.mkdir("sub")
        for number in (1, 2):
            torch.save([number], "last.pth")
            try: shutil.move("last.pth", "sub")
            except shutil.Error as error: print("REFUSED", error)
        assert torch.load("sub/last.pth") == [1] and torch.load("last.pth") == [2]
        """,
    )
    assert code == 0 and output.count("REFUSED") == 1, output


@posix
def test_permissions_are_kept(tmp_path: Path, memory: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import os, shutil, torch
        from safetensors.torch import save_file
        def mode(name): return os.stat(name).st_mode & 0o777
        saves = {
            "a.pth": lambda: torch.save([1], "a.pth"),
            "b.pth": lambda: open("b.pth", "wb").close(),
            "c.safetensors": lambda: save_file({"w": torch.zeros(9)}, "c.safetensors"),
            "d.pth": lambda: shutil.copyfile("a.pth", "d.pth"),
        }
        for name, save in saves.items():
            save()
            assert mode(name) == 0o644 or name == "c.safetensors", name  # 0600, or as the library has it.
            for wanted in (0o600, 0o664, 0o600):
                os.chmod(name, wanted)
                save()
                assert mode(name) == wanted, (name, oct(mode(name)))
        os.chown("a.pth", 12345, 12345)
        torch.save([2], "a.pth")
        assert os.stat("a.pth").st_uid == 12345
        os.chmod("a.pth", 0o600)
        os.utime("a.pth", (1e9, 1e9))
        target = os.environ["TARGET"]
        shutil.move("a.pth", target)
        assert mode(target) == 0o600 and os.stat(target).st_mtime == 1e9
        """,
        TARGET=str(memory / "last.pth"),
    )
    assert code == 0, output


@posix
def test_the_names_of_new_directories_are_synced_once(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import os, torch
        import _lastgood_run.system as system
        real, synced = system.sync_dir, []
        def sync_dir(path):
            synced.append(os.path.relpath(path))
            real(path)
        system.sync_dir = sync_dir
        os.makedirs("runs/one/two")
        torch.save([1], "runs/one/two/last.pth")
        assert synced == ["runs/one/two", "runs/one", "runs", "."], synced
        torch.save([2], "runs/one/two/last.pth")
        assert len(synced) == 5
        import shutil
        shutil.rmtree("runs/one/two")
        os.mkdir("runs/one/two")
        torch.save([3], "runs/one/two/last.pth")
        assert synced[5:] == ["runs/one/two", "runs/one"], synced
        """,
    )
    assert code == 0, output


@posix
@pytest.mark.parametrize("history", [0, 1])
def test_what_was_replaced_gives_its_space_back_though_a_child_was_forked_meanwhile(
    tmp_path: Path, history: int
) -> None:
    # It is freed in a thread: here that thread sleeps until a child was forked, and until both were looked at.
    code, output = start(
        tmp_path,
        """
        import os, threading, time, torch
        import _lastgood_run.system as system
        def open_without_name():
            links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
            return [path for path in map(os.readlink, filter(os.path.lexists, links)) if path.endswith(" (deleted)")]
        forked, let_go = threading.Event(), system._let_go
        def late(descriptor):
            forked.wait(20)
            let_go(descriptor)
        system._let_go = late
        for step in range(3):
            torch.save(torch.full((200_000,), float(step)), "last.pth")
        assert open_without_name()
        child = os.fork()
        if child == 0:
            os._exit(3 if open_without_name() else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        forked.set()
        end = time.monotonic() + 20
        while open_without_name():
            assert time.monotonic() < end
            time.sleep(0.01)
        assert torch.load("last.pth")[0] == 2
        """,
        "--history",
        str(history),
    )
    assert code == 0, output


def test_a_second_name_of_a_checkpoint_is_checked_as_the_first(tmp_path: Path) -> None:
    """As timm names its checkpoints: the last one is linked to the name of its epoch."""
    code, output = start(
        tmp_path,
        """
        import os, torch
        for epoch in range(3):
            torch.save({"epoch": epoch}, "tmp.pth.tar")
            os.replace("tmp.pth.tar", "last.pth.tar")
            os.link("last.pth.tar", f"checkpoint-{epoch}.pth.tar")
            if epoch: os.unlink(f"checkpoint-{epoch - 1}.pth.tar")
        torch.save({"epoch": 9}, "new")                    # Put in place without replacing anything.
        os.link("new", "best.pth.tar")
        os.unlink("new")
        try: os.link("last.pth.tar", "best.pth.tar")
        except FileExistsError: print("EXISTS")
        """,
    )
    assert code == 0 and "EXISTS" in output and "0 failed" in output, output
    assert torch.load(tmp_path / "best.pth.tar")["epoch"] == 9
    found = {Path(finding.path).name: finding.damage for finding in journal.verify(tmp_path)}
    assert {name for name in found if "." in name} >= {"last.pth.tar", "checkpoint-2.pth.tar", "best.pth.tar"}
    assert not any(found.values()) and "checkpoint-1.pth.tar" not in found
    path = tmp_path / "checkpoint-2.pth.tar"
    path.write_bytes(path.read_bytes()[:-9])
    code, output = start(tmp_path, "import torch; torch.load('checkpoint-2.pth.tar')")
    assert code == 1 and "checkpoint-2.pth.tar is damaged" in output, output
