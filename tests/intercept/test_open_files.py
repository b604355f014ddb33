"""Checkpoints written through files that the program opens itself: what is put in place, and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_run import posix, start

from lastgood.intercept import launch

GOOD = """
    import json, os, pickle, sys, numpy, torch
    torch.save(["good"], "last.pth")
    with open("state.json", "w") as file: json.dump("good", file)
    with open("state.pkl", "wb") as file: pickle.dump("good", file)
    numpy.savez("state.npz", a=["good"])
    class Bad:
        def __reduce__(self): raise ValueError("no")
"""


def good(directory: Path) -> bool:
    import numpy

    return (
        torch.load(directory / "last.pth") == ["good"]
        and json.loads((directory / "state.json").read_text()) == "good"
        and b"good" in (directory / "state.pkl").read_bytes()
        and numpy.load(directory / "state.npz")["a"].tolist() == ["good"]
    )


@pytest.mark.parametrize(
    "save",
    [
        'torch.save([torch.zeros(9999), Bad()], open("last.pth", "wb"))',
        'json.dump(["x" * 9999999, object()], open("state.json", "w"))',
        'pickle.dump([b"x" * 9999999, Bad()], open("state.pkl", "wb"))',
        'numpy.savez("state.npz", a=numpy.zeros(999999), b=numpy.array([Bad()]))',
    ],
)
@pytest.mark.parametrize("caught", [True, False])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, save: str, caught: bool) -> None:
    tried = f"try: {save}\n    except Exception: print('REFUSED')" if caught else save
    code, output = start(tmp_path, GOOD + "    " + tried)
    assert code == (launch.LAST_SAVE_FAILED if caught else 1), output
    assert ("REFUSED" in output) == caught and "last save FAILED" in output, output
    assert good(tmp_path)


@pytest.mark.parametrize(
    "write",
    [
        # A library that knows nothing of us fails, and nothing but the end of the program lets go of the file.
        """
        def dump(file):
            file.write("[")
            raise ValueError("no")
        dump(open("state.json", "w"))
        """,
        """
        file = open("state.json", "w")
        file.write("[")
        1 / 0
        """,
        """
        file = open("state.json", "w")
        try:
            file.write("[")
            1 / 0
        finally:
            file.close()
        """,
    ],
)
def test_a_program_that_ends_with_an_error_in_the_middle_of_a_file_leaves_what_was_there(
    tmp_path: Path, write: str
) -> None:
    code, output = start(tmp_path, GOOD + write.replace("\n    ", "\n"))
    assert code == 1, output
    assert good(tmp_path)


def test_what_was_written_before_the_error_is_kept_aside(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        GOOD
        + """
    file = open("state.json", "w")
    try: raise KeyboardInterrupt
    except KeyboardInterrupt:
        file.write("interrupted")
        file.close()
        """,
    )
    assert code == launch.LAST_SAVE_FAILED and good(tmp_path), output
    kept = output.split("until then is in ")[1].split(";")[0]
    assert Path(kept).read_text() == "interrupted"


@posix
def test_a_write_that_the_disk_cuts_short_is_not_made_whole_by_a_later_one(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        GOOD
        + """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, resource.RLIM_INFINITY))
    file = open("last.pth", "wb")
    try: file.write(bytes(9 << 20))
    except OSError: print("REFUSED")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    file.close()
        """,
    )
    assert code == launch.LAST_SAVE_FAILED and "REFUSED" in output, output
    assert good(tmp_path)


def test_ordinary_ways_of_not_closing_a_file_are_no_errors(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import json, os, sys, torch
        torch.save([1], open("last.pth", "wb"))
        open("one.json", "w").write("1")
        json.dump(2, open("two.json", "w"))
        try: {}["missing"]
        except KeyError:
            # Begun and ended while an error is dealt with that was there before.
            try: [][0]
            except IndexError: inner = open("three.json", "w")
            inner.write("3"); inner.close()
            json.dump(4, open("four.json", "w"))
        items, five = iter([5]), open("five.json", "w")
        while True:
            try: five.write(str(next(items)))
            except StopIteration: five.close(); break
        def lines():
            file = open("six.json", "w")
            try:
                while True: file.write((yield))
            finally: file.close()
        writer = lines(); next(writer); writer.send("6"); writer.close()
        at_the_end = open("seven.json", "w"); at_the_end.write("7")
        def last():
            local = open("eight.json", "w"); local.write("8")
            sys.exit()
        last()
        """,
    )
    assert code == 0, output
    assert torch.load(tmp_path / "last.pth") == [1]
    names = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    for number, name in enumerate(names, 1):
        assert (tmp_path / f"{name}.json").read_text() == str(number), name
        assert (tmp_path / ".lastgood" / f"{name}.json.jsonl").exists(), name


@posix
def test_a_forked_child_that_ends_does_not_put_its_parents_open_file_in_place(tmp_path: Path) -> None:
    code, output = start(
        tmp_path,
        """
        import os, sys, torch
        torch.save([1], "last.pth")
        file = open("state.json", "w")
        if os.fork() == 0: sys.exit()
        os.wait()
        assert not os.path.exists("state.json")
        file.write("1")
        file.close()
        assert open("state.json").read() == "1"
        """,
    )
    assert code == 0, output
