"""What is measured, one method a scenario. Each adds rows to the goals and leaves its series for the plots."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lastgood
from benchmarks import states
from benchmarks.measure import Series, in_new_process, median, ratio, resident, side_by_side, throughput
from benchmarks.peers import ALL as CONTENDERS
from benchmarks.peers import DcpAsync, Lastgood, Raw, RawBehind, TorchSave, drop_cache, trim

ALL = [
    *("saves", "new_process", "other_states", "training", "frozen_state", "small_tensors", "ranks"),
    *("many_checkpoints", "memory", "large_state"),
]
GPU = ["saves", "training"]


@dataclass(frozen=True, slots=True)
class Row:
    """A goal, and what was measured."""

    what: str
    goal: str
    value: str
    reached: bool


class Bench:
    """One run of all measurements in one directory."""

    def __init__(self, directory: Path, device: str, *, quick: bool, contenders: Sequence[str] = ("",)) -> None:
        self.directory, self.device, self.quick, self._wanted = directory, device, quick, tuple(contenders)
        self.mib = 120 if quick else 600
        self.rows: list[Row] = []
        self.series: dict[str, Series] = {}
        self.others: dict[str, dict[str, Series]] = {}
        """The series of other states than the first, by what they are."""

    def _add(self, what: str, goal: str, value: str, reached: bool) -> None:
        self.rows.append(Row(what, goal, value, reached))
        print(f"    {'ok ' if reached else 'NO '} {what}: {value} (goal {goal})", flush=True)

    def saves(self) -> None:
        """Hold-up, durable save and restore, beside all peers."""
        kinds = (Lastgood, Raw, TorchSave, DcpAsync) if self.device == "cuda" else CONTENDERS
        # lastgood, the disk and torch.save are what the goals are compared with.
        compared = (Lastgood, Raw, TorchSave)
        kinds = tuple(kind for kind in kinds if kind in compared or kind.name.startswith(self._wanted))
        self.series = side_by_side(
            lambda: states.adamw(self.mib, device=self.device),
            kinds,
            self.directory / "saves",
            rounds=5,
            pause=0.5,
        )
        ours = self.series[Lastgood.name]
        names = {kind.name for kind in kinds} - {Lastgood.name, Raw.name}
        peers = {name: s for name, s in self.series.items() if name in names and s.hold}
        best = min(peers, key=lambda name: median(peers[name].hold))
        hold, limit = median(ours.hold), median(peers[best].hold)
        self._add(
            f"hold-up of training, {self.mib} MiB, step longer than the copy",
            "≤ 5 ms, ≤ 0.1 × best peer",
            f"{hold * 1e3:.1f} ms ({median(ours.hold_cpu) * 1e3:.1f} ms of CPU); {best} {limit * 1e3:.0f} ms",
            hold <= 5e-3 and hold <= 0.1 * limit,
        )
        best = min(peers, key=lambda name: median(peers[name].hold_at_once))
        self._add(
            "hold-up where the step follows at once",
            "(for information)",
            f"{median(ours.hold_at_once) * 1e3:.0f} ms; {best} {median(peers[best].hold_at_once) * 1e3:.0f} ms",
            True,
        )
        raw = self.series[Raw.name]
        times = ratio(ours.durable, raw.durable)
        self._add(
            "durable, checksummed save / raw O_DIRECT + fsync",
            "≤ 1.15",
            f"{times:.2f} ({median(ours.durable):.2f} s; {median(raw.durable):.2f} s)",
            times <= 1.15,
        )
        self._add_restore("restore", ours.restore, raw.restore, self.series[TorchSave.name].restore)

    def _add_restore(self, what: str, ours: list[float], raw: list[float], torch_load: list[float]) -> None:
        times = ratio(ours, raw)
        self._add(
            f"{what} with full verification, cold cache / raw read",
            "≤ 1.2, and not slower than torch.load",
            f"{times:.2f} ({median(ours):.2f} s; {median(raw):.2f} s; torch.load {median(torch_load):.2f} s)",
            times <= 1.2 and median(ours) <= median(torch_load),
        )

    def new_process(self) -> None:
        """A restore as a training that starts again sees it: nothing is warm, and the optimizer has no state yet."""
        directory = self.directory / "new"
        in_new_process(_write_all, directory, self.mib)
        times: dict[str, list[float]] = {"ours": [], "raw": [], "torch_load": []}
        for _ in range(2 if self.quick else 5):
            for what, found in times.items():
                found.append(in_new_process(_restore_one, directory, self.mib, what))
        self._add_restore("restore in a new process", **times)

    def other_states(self) -> None:
        """The same beside the peers for other kinds of states."""
        builds = {
            "GPT-SoVITS stage 2, G and D with AdamW": states.sovits,
            f"LoRA, {self.mib} MiB of which 95 % are frozen": lambda: states.frozen(self.mib),
            "20,000 small tensors": states.small,
        }
        for what, build in builds.items():
            kinds = tuple(kind for kind in CONTENDERS if kind in (Lastgood, Raw) or kind.name.startswith(self._wanted))
            directory = self.directory / "other"
            self.others[what] = side_by_side(build, kinds, directory, rounds=1, warm=1, pause=0.5)
            ours = self.others[what][Lastgood.name]
            print(
                f"    {what}: held up {median(ours.hold) * 1e3:.1f} ms, durable {median(ours.durable):.2f} s",
                flush=True,
            )

    def large_state(self) -> None:
        """A state of 6 GiB: the memory bound, and what the training feels of it."""
        mib = 1024 if self.quick else 6 * 1024
        peak, held, seconds = in_new_process(_large, self.directory / "large", mib)
        self._add(
            f"peak extra host memory, {mib} MiB",
            f"≤ {mib} + 64 MiB",
            f"{peak:.0f} MiB; save() {held * 1e3:.1f} ms, durable {seconds:.1f} s",
            0 < peak <= mib + 64,
        )

    def training(self) -> None:
        """Throughput with a save every 10 steps of half a second: on a GPU, or with one and with all cores busy."""
        gpu = self.device == "cuda"
        goal, before = 0.995 if gpu else 0.97, torch.get_num_threads()
        for threads in [before] if gpu else sorted({1, os.cpu_count() or 1}):
            torch.set_num_threads(threads)
            results = throughput(
                lambda: states.adamw(self.mib, device=self.device),
                (Lastgood, RawBehind),
                self.directory / "training",
                rounds=3 if self.quick else 12,
            )
            ours, disk = results[Lastgood.name], results[RawBehind.name]
            where = "" if gpu else f", {threads} of {os.cpu_count()} cores computing"
            self._add(
                f"training throughput with a save every 10 steps of {ours.step:.2f} s{where}",
                f"≥ {goal}",
                f"{ours.text()}; the disk alone {disk.text()}",
                ours.ratio >= goal,
            )
        torch.set_num_threads(before)

    def frozen_state(self) -> None:
        """A state of which 95 % never change."""
        job = states.frozen(self.mib)
        raw = job.bytes()
        sizes, times = [], []
        with lastgood.Checkpointer(self.directory / "frozen", keep=lastgood.Keep(last=3), **job.objects()) as ckpt:
            for step in range(1, 13):
                job.step()
                before = {path.stat().st_ino for path in (self.directory / "frozen").rglob("*") if path.is_file()}
                began = time.perf_counter()
                handle = ckpt.save(step)
                ckpt.wait_snapshot()
                handle.result()
                times.append(time.perf_counter() - began)
                files = {p.stat().st_ino: p.stat().st_size for p in handle.path.rglob("*") if p.is_file()}
                sizes.append(sum(size for inode, size in files.items() if inode not in before))
                ckpt._finish_save()
        share, slow = sizes[2] / raw, median(times[2:]) / median(times[:2])
        self._add(
            "bytes of a save where 95 % are frozen, from the third on / full",
            "≤ 0.1",
            f"{max(sizes[2:]) / raw:.3f}",
            max(share, max(sizes[2:]) / raw) <= 0.1,
        )
        self._add("its time / full", "≤ 0.15", f"{slow:.3f} ({median(times[2:]):.3f} s)", slow <= 0.15)

    def small_tensors(self) -> None:
        """20,000 small tensors."""
        count = 4_000 if self.quick else 20_000
        job = states.small(count)
        times, cpus = [], []
        with lastgood.Checkpointer(self.directory / "small", **job.objects()) as ckpt:
            for step in range(1, 8):
                job.step()
                began, cpu = time.perf_counter(), time.thread_time()
                ckpt.save(step)
                ckpt.wait_snapshot()
                times.append(time.perf_counter() - began)
                cpus.append(time.thread_time() - cpu)
                ckpt._finish_save()
        each = median(times[2:]) / count
        self._add(
            f"hold-up per tensor, {count:,} small tensors",
            "≤ 20 µs",
            f"{each * 1e6:.1f} µs ({median(cpus[2:]) / count * 1e6:.1f} µs of CPU)",
            each <= 20e-6,
        )

    def ranks(self) -> None:
        """Replicated state on 1, 2 and 4 ranks."""
        mib = 64 if self.quick else 240
        results: dict[int, list[tuple[float, int]]] = {1: [], 2: [], 4: []}
        for round_ in range(2):
            for size in results:
                results[size].append(_with_ranks(self.directory / f"ranks-{size}-{round_}", size, mib))
        one_copy = results[1][0][1]
        for size in (2, 4):
            written = max(count for _, count in results[size]) / one_copy
            times = ratio([t for t, _ in results[size]], [t for t, _ in results[1]])
            self._add(
                f"{size} ranks, replicated state: bytes written / one copy; time / one rank",
                "1.0; ≤ 1.0",
                f"{written:.3f}; {times:.2f}",
                written < 1.01 and times <= 1.05,
            )

    def many_checkpoints(self) -> None:
        """A run that holds 10,000 checkpoints."""
        count = 1_000 if self.quick else 10_000
        run = self.directory / "many"
        job = states.adamw(2, tensors=3)
        with lastgood.Checkpointer(run, keep=lastgood.Keep(last=2 * count), **job.objects()) as ckpt:
            job.step()
            ckpt.save(count, blocking=True).result()
        for step in range(count):
            path = run / f"step-{step:08d}"
            path.mkdir()
            (path / "manifest.json").write_bytes(b"")
        times = []
        for _ in range(3):
            with lastgood.Checkpointer(run, keep=lastgood.Keep(last=2 * count), **job.objects()) as ckpt:
                began = time.perf_counter()
                assert ckpt.restore() == count
                times.append(time.perf_counter() - began)
        self._add(
            f"restore finds the newest of {count:,} checkpoints",
            "≤ 50 ms",
            f"{median(times) * 1e3:.0f} ms",
            median(times) <= 0.05,
        )

    def memory(self) -> None:
        """Host memory beside the state, at its peak, over many saves."""
        peak = in_new_process(_peak, self.directory / "memory", self.mib)
        self._add(
            f"peak extra host memory, {self.mib} MiB",
            f"≤ {self.mib} + 64 MiB",
            f"{peak:.0f} MiB",
            0 < peak <= self.mib + 64,
        )
        saves = 200 if self.quick else 1_000
        growth = in_new_process(_growth, self.directory / "steady", saves)
        self._add(f"growth of memory from save {saves // 5} to {saves}", "≤ 8 MiB", f"{growth:.1f} MiB", growth <= 8)


def _large(run: Path, mib: int) -> tuple[float, float, float]:
    """Peak of extra memory in MiB, and medians of the seconds of save() and until durable."""
    job = states.adamw(mib)
    with _Peak() as peak, lastgood.Checkpointer(run, **job.objects()) as ckpt:
        times = []
        for step in range(1, 4):
            peak.step(job)
            began = time.perf_counter()
            handle = ckpt.save(step)
            held = time.perf_counter() - began
            handle.result()
            times.append((held, time.perf_counter() - began))
            ckpt._finish_save()
        assert ckpt.restore() == 3
    return peak.extra, median([held for held, _ in times]), median([whole for _, whole in times])


def _peak(run: Path, mib: int) -> float:
    job = states.adamw(mib)
    job.step()
    with _Peak() as peak, lastgood.Checkpointer(run, **job.objects()) as ckpt:
        for step in range(1, 21):
            peak.step(job)
            ckpt.save(step, blocking=True).result()
    return peak.extra


def _growth(run: Path, saves: int) -> float:
    """MiB."""
    with lastgood.Checkpointer(run, a=torch.zeros(1 << 16), n=0) as ckpt:
        for step in range(1, saves + 1):
            ckpt.save(step, blocking=True).result()
            if step == saves // 5:
                early = resident()
    return (resident() - early) / states.MIB


def _write_all(directory: Path, mib: int) -> None:
    """What :func:`_restore_one` reads."""
    job = states.adamw(mib)
    directory.mkdir()
    with lastgood.Checkpointer(directory / "run", **job.objects()) as ckpt:
        ckpt.save(1)
    torch.save(job.state_dict(), directory / "torch.pt")


def _restore_one(directory: Path, mib: int, what: str) -> float:
    """Seconds of a restore in this process, which has done nothing before but to make model and optimizer."""
    job = states.adamw(mib, fresh=True)
    drop_cache(directory)
    began = time.perf_counter()
    if what == "ours":
        checkpointer = lastgood.Checkpointer(directory / "run", **job.objects())
        assert checkpointer.restore() == 1
    elif what == "raw":
        (path,) = (directory / "run").glob("step-*/*.safetensors")
        Raw.read(path)
    else:
        state = torch.load(directory / "torch.pt", weights_only=True)
        job.model.load_state_dict(state["model"])
        job.optimizer.load_state_dict(state["optimizer"])
    took = time.perf_counter() - began
    if what == "ours":
        checkpointer.close()
    return took


class _Peak:
    """Watches how far the memory of this process rises above what it is now.

    In steps of the optimizer it looks away: torch takes memory of its own for them.
    """

    extra = 0.0
    """MiB."""
    away = False

    def __enter__(self) -> _Peak:
        self._base, self._stop = resident(), threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            now = (resident() - self._base) / states.MIB
            self.extra = self.extra if self.away else max(self.extra, now)

    def step(self, job: states.Job) -> None:
        self.away = True
        job.step()
        trim()
        self.away = False

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watcher.join()


def _with_ranks(run: Path, size: int, mib: int) -> tuple[float, int]:
    """Median seconds of a durable save by `size` processes, and the bytes of the last checkpoint."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    children = [context.Process(target=_rank, args=(rank, size, str(run), mib, queue)) for rank in range(size)]
    for child in children:
        child.start()
    result: tuple[float, int] = queue.get(timeout=300)
    for child in children:
        child.join(60)
    return result


def _rank(rank: int, size: int, run: str, mib: int, queue: Any) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    job = states.adamw(mib)
    times = []
    with lastgood.Checkpointer(run, replicated=["*"], rank=rank, world_size=size, **job.objects()) as ckpt:
        ckpt.restore()
        for step in range(1, 7):
            job.step()
            began = time.perf_counter()
            handle = ckpt.save(step, blocking=True)
            handle.result()
            times.append(time.perf_counter() - began)
            ckpt._finish_save()
        if rank == 0:
            path = handle.path
            assert path is not None
            queue.put((median(times[1:]), sum(file.stat().st_size for file in path.iterdir())))
