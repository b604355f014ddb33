"""Programs that end in every way: run by test_end_of_program.py, which checks what is left of them.

Imports torch once and forks for each of them; a child falls off the end of this file, so that its interpreter shuts
down as that of any program does.

    python endings.py DIRECTORY
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

import lastgood
from lastgood import disk


def slow(operation: disk.Operation, moment: str) -> None:
    if operation.name == "write" and moment == "before":
        time.sleep(0.15)


def full(operation: disk.Operation, moment: str) -> None:
    if operation.name == "write" and moment == "before" and "step-" in str(operation.path):
        raise OSError(28, "No space left on device", str(operation.path))


def hang(operation: disk.Operation, moment: str) -> None:
    if operation.name == "write" and moment == "before" and "step-00000002" in str(operation.path):
        time.sleep(1000)


def make(run: Path) -> lastgood.Checkpointer:
    return lastgood.Checkpointer(run, w=torch.ones(1000), deadline=10)


def never_closed(run: Path) -> None:
    make(run).save(1)


def never_closed_and_slow(run: Path) -> None:
    disk.observer = slow
    make(run).save(1)


def dropped(run: Path) -> None:
    def inner() -> None:
        make(run).save(1)

    inner()
    gc.collect()


def an_exception(run: Path) -> None:
    with make(run) as ckpt:
        ckpt.save(1)
        raise RuntimeError("of the program itself")


def exception_without_with(run: Path) -> None:
    ckpt = make(run)
    ckpt.save(1)
    raise RuntimeError("of the program itself")


def exit_3(run: Path) -> None:
    ckpt = make(run)
    ckpt.save(1)
    sys.exit(3)


def exit_0_inside(run: Path) -> None:
    disk.observer = slow
    with make(run) as ckpt:
        ckpt.save(1)
        sys.exit(0)


def interrupted(run: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background jobs are started without.
    disk.observer = slow
    handle = make(run).save(1)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    handle.result()


def from_a_daemon_thread(run: Path) -> None:
    disk.observer = slow
    ckpt = make(run)
    saved = threading.Event()

    def work() -> None:
        ckpt.save(1)
        saved.set()
        time.sleep(60)

    threading.Thread(target=work, daemon=True).start()
    saved.wait()


def failed_at_the_end(run: Path) -> None:
    disk.observer = full
    make(run).save(1)


def failed_and_exit_0(run: Path) -> None:
    disk.observer = full
    make(run).save(1)
    sys.exit(0)


def failed_and_exit_0_inside(run: Path) -> None:
    disk.observer = full
    with make(run) as ckpt:
        ckpt.save(1)
        sys.exit(0)


def failed_and_closed(run: Path) -> None:
    disk.observer = full
    with make(run) as ckpt:
        ckpt.save(1)


def failed_and_exception(run: Path) -> None:
    disk.observer = full
    with make(run) as ckpt:
        ckpt.save(1)
        raise RuntimeError("of the program itself")


def failed_and_seen(run: Path) -> None:
    disk.observer = full
    ckpt = make(run)
    try:
        ckpt.save(1).result()
    except lastgood.SaveError:
        print("seen", file=sys.stderr)


def failed_then_saved(run: Path) -> None:
    disk.observer = full
    ckpt = make(run)
    ckpt.save(1).wait()
    disk.observer = None
    ckpt.save(2)


def forked_child_ends(run: Path) -> None:
    disk.observer = slow
    ckpt = make(run)
    ckpt.save(1)
    child = os.fork()
    if child:
        print("child", os.waitpid(child, 0)[1], file=sys.stderr)
        ckpt.save(2)


def hung(run: Path) -> lastgood.Checkpointer:
    ckpt = lastgood.Checkpointer(run, w=torch.ones(1000), deadline=0.15)
    ckpt.save(1).result()
    disk.observer = hang
    return ckpt


def hung_and_never_closed(run: Path) -> None:
    hung(run).save(2)


def hung_and_closed(run: Path) -> None:
    with hung(run) as ckpt:
        ckpt.save(2)


def hung_and_caught(run: Path) -> None:
    ckpt = hung(run)
    try:
        ckpt.save(2, blocking=True)
    except lastgood.SaveError as error:
        print("caught", error, file=sys.stderr)
    ckpt.__exit__(RuntimeError, RuntimeError(), None)


ENDINGS = [
    never_closed,
    never_closed_and_slow,
    dropped,
    an_exception,
    exception_without_with,
    exit_3,
    exit_0_inside,
    interrupted,
    from_a_daemon_thread,
    failed_at_the_end,
    failed_and_exit_0,
    failed_and_exit_0_inside,
    failed_and_closed,
    failed_and_exception,
    failed_and_seen,
    failed_then_saved,
    forked_child_ends,
    hung_and_never_closed,
    hung_and_closed,
    hung_and_caught,
]


def run_all(directory: Path) -> None:
    gc.collect()
    gc.freeze()  # The children then end several times as fast.
    children = {}
    for ending in ENDINGS:
        child = os.fork()
        if child == 0:
            descriptor = os.open(directory / f"{ending.__name__}.err", os.O_WRONLY | os.O_CREAT)
            os.dup2(descriptor, 2)
            ending(directory / ending.__name__)
            return  # And off the end of the file.
        children[child] = ending.__name__
    statuses = {}
    for child, name in children.items():
        statuses[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (directory / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
