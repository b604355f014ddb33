"""One file under several names: links in its path, temporary names, kept names, permissions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_run import memory, posix, start

from lastgood.intercept import journal

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
