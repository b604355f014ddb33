"""How ranks learn who they are, find each other, and notice that they do not see one disk."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_processes import Rank, checkpoints, run_ranks

import lastgood
from lastgood import LastGoodError, PeerError, RunHeldError, coordinate
from lastgood.coordinate import Channel
from lastgood.world import World, detect_world

LAUNCHERS = {
    "torchrun": {"RANK": "{rank}", "WORLD_SIZE": "{size}", "LOCAL_WORLD_SIZE": "{size}"},
    "OpenMPI": {"OMPI_COMM_WORLD_RANK": "{rank}", "OMPI_COMM_WORLD_SIZE": "{size}"},
    "SLURM": {"SLURM_PROCID": "{rank}", "SLURM_STEP_NUM_TASKS": "{size}", "SLURM_NTASKS": "{size}"},
    "MPICH": {"PMI_RANK": "{rank}", "PMI_SIZE": "{size}"},
}


def state(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((40,), value)}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_rank_and_world_size_from_the_launchers_variables(tmp_path: Path, launcher: str) -> None:
    def main(rank: Rank) -> tuple[int, int]:
        for name, text in LAUNCHERS[launcher].items():
            os.environ[name] = text.format(rank=rank.rank, size=rank.size)
        with lastgood.Checkpointer(rank.run, state=state(), replicated=["*"], deadline=60) as ckpt:
            ckpt.save(1, blocking=True).result()
            return ckpt.world.rank, ckpt.world.size

    assert [e.ok() for e in run_ranks(2, main, tmp_path)] == [(0, 2), (1, 2)]
    assert checkpoints(tmp_path / "run") == ["step-00000001"]


def test_an_allocation_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain `python train.py` in an interactive SLURM allocation of eight tasks is alone."""
    for name, value in {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "12", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert detect_world() == World(0, 1, True)


def test_a_place_given_by_hand_counts_more_than_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (detect_world(1, 2).rank, detect_world(1, 2).size) == (1, 2)
    with pytest.raises(LastGoodError, match="together"):
        detect_world(rank=1)
    with pytest.raises(LastGoodError, match="counted from 0"):
        detect_world(2, 2)


def test_ranks_that_believe_they_are_alone_are_told_so(tmp_path: Path) -> None:
    """Children of mp.spawn that come before init_process_group: nothing says that they are two."""

    def main(rank: Rank) -> str:
        for name in ("RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
        if rank.rank:
            rank.await_mark("held")
        try:
            ckpt = lastgood.Checkpointer(rank.run, state=state())
        except RunHeldError as error:
            rank.mark("told")
            return str(error)
        rank.mark("held")
        rank.await_mark("told")
        ckpt.close()
        return "held"

    first, second = (e.ok() for e in run_ranks(2, main, tmp_path))
    assert first == "held"
    assert "rank= and world_size=" in second and "init_process_group" in second and "process " in second


def test_without_any_process_group(tmp_path: Path) -> None:
    def main(rank: Rank) -> bool:
        with rank.checkpointer(state=state(), replicated=["*"]) as ckpt:
            ckpt.save(1, blocking=True).result()
        return torch.distributed.is_initialized()

    assert [e.ok() for e in run_ranks(3, main, tmp_path)] == [False] * 3


# -- not one disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [True, False], ids=["process group", "no process group"])
def test_ranks_that_do_not_see_one_disk_are_named(tmp_path: Path, group: bool) -> None:
    """Every rank has a file system of its own under the name of the run."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    run = tmp_path / "local disk"
    run.mkdir()

    def main(rank: Rank) -> str:
        import ctypes

        if group:
            rank.group()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x00020000) == 0
        assert libc.mount(b"none", b"/", None, (1 << 18) | (1 << 14), None) == 0
        assert libc.mount(b"tmpfs", str(run).encode(), b"tmpfs", 0, None) == 0
        try:
            rank.checkpointer(run=run, state=state(), deadline=60 if group else 1.5)
        except PeerError as error:
            return str(error)
        return "not noticed"

    ended = run_ranks(2, main, tmp_path)
    texts = [e.ok() for e in ended]
    if group:
        assert all("rank 1" in text and "does not see" in text for text in texts)
        assert all(e.seconds < 40 for e in ended), "at the start, not at the deadline"
    else:
        assert "rank 1 of 2 did not make its Checkpointer" in texts[0]
        assert "rank 0 has not opened the run" in texts[1] and "see one disk" in texts[1]


def test_a_directory_of_another_name_is_another_run(tmp_path: Path) -> None:
    def main(rank: Rank) -> str:
        rank.group()
        try:
            rank.checkpointer(run=tmp_path / f"run-{rank.rank}", state=state(), deadline=1.5)
        except PeerError as error:
            return str(error)
        return "not noticed"

    for e in run_ranks(2, main, tmp_path):
        assert "of 2" in e.ok()


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("master", ["203.0.113.7", "no.such.host.invalid", "::1", "127.0.0.1"])
def test_a_master_that_is_no_use_is_no_harm(tmp_path: Path, master: str) -> None:
    """MASTER_ADDR of another machine, of none, or of a family that this one may not have."""

    def main(rank: Rank) -> bool:
        os.environ["MASTER_ADDR"] = master
        with rank.checkpointer(state=state(), replicated=["*"]) as ckpt:
            ckpt.save(1, blocking=True).result()
            return ckpt.world.one_host

    expected = master in ("127.0.0.1", "::1")
    assert [e.ok() for e in run_ranks(2, main, tmp_path)] == [expected] * 2


def test_a_host_whose_name_is_its_loopback_is_found_by_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian writes `127.0.1.1 node1.cluster node1` into /etc/hosts: others know what the name means, it does not."""

    def look_up(host: Any, *rest: Any, **options: Any) -> list[Any]:
        assert host in ("node1", "master.cluster")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "node1.cluster", ("127.0.1.1", 0))]

    class Probe(socket.socket):
        def connect(self, address: Any) -> None:
            if address[0] != "master.cluster":
                raise OSError(101, "Network is unreachable")
            super().connect(("127.0.0.1", address[1]))

    monkeypatch.setenv("MASTER_ADDR", "master.cluster")
    monkeypatch.setattr(socket, "gethostname", lambda: "node1")
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "socket", Probe)
    found = coordinate._own_addresses()
    assert found[:3] == ["master.cluster", "node1", "node1.cluster"]
    assert set(found[3:]) == {"127.0.0.1", "127.0.1.1", "::1"}, "last, for ranks on this machine"


def test_addresses_of_a_host_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    class Probe(socket.socket):
        def __init__(self, family: int = socket.AF_INET, *rest: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(97, "Address family not supported by protocol")
            super().__init__(family, *rest)

    monkeypatch.setenv("MASTER_ADDR", "::1")
    monkeypatch.setattr(socket, "socket", Probe)
    assert "127.0.0.1" in coordinate._own_addresses()


def test_without_ipv6(tmp_path: Path) -> None:
    def main(rank: Rank) -> str:
        create = socket.create_server

        def refusing(address: Any, **options: Any) -> Any:
            if options.get("family") == socket.AF_INET6:
                raise OSError(99, "Cannot assign requested address")
            return create(address, **options)

        socket.create_server = refusing
        with rank.checkpointer(state=state(), replicated=["*"]) as ckpt:
            ckpt.save(1, blocking=True).result()
        return "saved"

    assert [e.ok() for e in run_ranks(2, main, tmp_path)] == ["saved"] * 2


def test_on_one_machine_only_loopback_listens() -> None:
    channel = Channel(World(0, 2, one_host=True))
    assert channel.listen() in (["127.0.0.1"], ["::1"])
    channel.close()


def test_strangers_at_the_port_are_turned_away(tmp_path: Path) -> None:
    def main(rank: Rank) -> str:
        import json

        ckpt = rank.checkpointer(state=state(), replicated=["*"])
        if rank.rank == 0:
            for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 8, (5).to_bytes(8, "little") + b"[[[[[", b""):
                with socket.create_connection(("127.0.0.1", ckpt.channel.port)) as stranger:
                    stranger.sendall(data)
            wrong = json.dumps({"rank": 1, "size": 2, "job": "x", "mac": "0" * 64}).encode()
            with socket.create_connection(("127.0.0.1", ckpt.channel.port)) as stranger:
                stranger.sendall(len(wrong).to_bytes(8, "little") + wrong)
                stranger.settimeout(20)
                while stranger.recv(4096):
                    pass
        handle = ckpt.save(1, blocking=True)
        ckpt.close()
        return handle.state

    ended = run_ranks(2, main, tmp_path)
    assert [e.ok() for e in ended] == ["committed"] * 2
    assert not ended[0].logged("WARNING")


def listening() -> tuple[Channel, threading.Event]:
    """Rank 0's channel before its thread starts, with a task as the heartbeat is one."""
    channel = Channel(World(0, 2, one_host=True))
    channel.listen()
    beat = threading.Event()
    channel.every(0.05, beat.set)
    return channel, beat


def test_a_stranger_that_resets_its_connection_does_not_stop_the_heart() -> None:
    channel, beat = listening()
    for _ in range(3):
        stranger = socket.create_connection(("127.0.0.1", channel.port))
        # Closed by a reset, before rank 0 has said a word.
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stranger.close()
    channel.start()
    time.sleep(0.3)
    beat.clear()
    assert beat.wait(20)
    channel.close()


def test_a_task_that_is_added_while_the_background_thread_looks_at_them_does_not_end_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    channel, beat = listening()
    channel.start()
    added, me = threading.Event(), threading.get_ident()

    def monotonic() -> float:
        if threading.get_ident() == me:
            time.sleep(0.3)  # The background thread looks in the middle of the adding, several times.
        return time.monotonic()

    monkeypatch.setattr(coordinate, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    channel.every(0.05, added.set)
    monkeypatch.undo()
    assert added.wait(20)
    beat.clear()
    assert beat.wait(20)
    channel.close()


def test_a_task_that_is_added_does_not_wait_for_the_one_before() -> None:
    channel = Channel(World(0, 2, one_host=True))
    channel.listen()
    channel.every(3600.0, lambda: None)
    channel.start()
    time.sleep(0.2)  # The background thread waits for its one task.
    added = threading.Event()
    channel.every(0.05, added.set)
    assert added.wait(20)
    channel.close()


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 60000,
        b"[]",
        b"7",
        b"null",
        b'{"rank":1,"size":2,"job":"","mac":"\xc3\xa9"}',
        b'{"rank":[],"size":2,"job":"","mac":7}',
        b'{"rank":' + b"9" * 60000 + b"}",
    ],
    ids=["nested deeply", "list", "number", "null", "no ASCII", "wrong types", "huge number"],
)
def test_whatever_a_stranger_says_does_not_stop_the_heart(text: bytes) -> None:
    channel, beat = listening()
    channel.start()
    with socket.create_connection(("127.0.0.1", channel.port)) as stranger:
        stranger.sendall(len(text).to_bytes(8, "little") + text)
        stranger.settimeout(20)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(4096):
                pass
    beat.clear()
    assert beat.wait(20)
    channel.close()


def test_an_error_that_nobody_foresaw_does_not_stop_the_heart(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    channel, beat = listening()
    stumbled = threading.Event()

    def accept() -> None:
        monkeypatch.undo()
        stumbled.set()
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(channel, "_accept", accept)
    channel.start()
    with socket.create_connection(("127.0.0.1", channel.port)):
        assert stumbled.wait(20)
        beat.clear()
        assert beat.wait(20)
    assert "unforeseen" in caplog.text
    channel.close()


# -- launched for real ------------------------------------------------------------------------------------------------

TRAIN = """
    import os, signal, sys, torch, lastgood
    import torch.distributed as dist
    run, marker = sys.argv[1:3]
    # A store for each life: with the launcher's, gloo finds the addresses of the life before.
    life = os.environ["TORCHELASTIC_RESTART_COUNT"]
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{marker}-store-{life}", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lastgood.Checkpointer(run, model=model, optimizer=optimizer, every=1, deadline=60) as ckpt:
        for step in ckpt.steps(8):
            optimizer.zero_grad()
            model(torch.ones(2, 4) * step).sum().backward()
            optimizer.step()
            if step == 4 and dist.get_rank() == 1 and not os.path.exists(marker):
                ckpt.wait()
                open(marker, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
    if dist.get_rank() == 0:
        print("finished at", ckpt.last_step, "weights", model.module.weight.sum().item())
"""


def launch(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(TRAIN))
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *options]
        + [str(path) for path in (script, tmp_path / "run", tmp_path / "killed")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(lastgood.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_torchrun_restarts_a_job_that_lost_a_rank_and_it_resumes(tmp_path: Path) -> None:
    done = launch(tmp_path, "--standalone", "--max-restarts=1")
    assert done.returncode == 0, done.stderr
    assert "finished at 8" in done.stdout
    assert (tmp_path / "killed").exists()
    names = checkpoints(tmp_path / "run")
    assert names[-1] == "step-00000008.g2", "the second life"
    import json

    log = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (restored,) = (event for event in log if event["event"] == "restore")
    # Without the gradients of rank 1, rank 0 cannot have gone further than the step that rank 1 died in.
    assert restored["step"] in (4, 5)


def _spawned(rank: int, run: str, address: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    with lastgood.Checkpointer(run, state=state(), replicated=["*"], deadline=60) as ckpt:
        ckpt.save(1, blocking=True).result()
    dist.destroy_process_group()


@pytest.mark.slow
def test_mp_spawn_with_a_process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    torch.multiprocessing.spawn(_spawned, (str(tmp_path / "run"), f"file://{tmp_path}/store"), nprocs=2)
    assert checkpoints(tmp_path / "run") == ["step-00000001"]
