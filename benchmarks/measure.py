"""The measurements. Contenders take turns within every round, so that what disturbs one disturbs all."""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.peers import Contender, drop_cache, trim
from benchmarks.states import Job


@dataclass(slots=True)
class Series:
    """Seconds, or bytes, of one contender over the rounds."""

    hold: list[float] = field(default_factory=list)
    """save() and the wait of the optimizer step after a forward and backward pass."""
    hold_cpu: list[float] = field(default_factory=list)
    """CPU seconds of the training thread in the same."""
    hold_at_once: list[float] = field(default_factory=list)
    """The same where the step follows immediately."""
    durable: list[float] = field(default_factory=list)
    restore: list[float] = field(default_factory=list)
    why_not: str = ""


def side_by_side(
    build: Callable[[], Job],
    contenders: Sequence[type[Contender]],
    directory: Path,
    *,
    rounds: int,
    pause: float,
    warm: int = 2,
    restore: bool = True,
) -> dict[str, Series]:
    """Hold-up, time until durable and time to restore, of all contenders on the same state.

    Args:
        pause: seconds of forward and backward between a save and the next optimizer step.
        warm: rounds that do not count: buffers and plans are made in them.
    """
    results: dict[str, Series] = {kind.name: Series() for kind in contenders}
    job = build()
    running: dict[str, Contender] = {}
    for kind in contenders:
        try:
            running[kind.name] = kind(job, directory / kind.__name__)
        except Exception as error:
            results[kind.name].why_not = f"{type(error).__name__}: {error}"
    step = 0
    for round_ in range(-warm, rounds):
        for name, contender in list(running.items()):
            series = results[name]
            try:
                for at_once in (False, True):
                    step += 1
                    job.step()
                    settle(job)
                    began, cpu = time.perf_counter(), time.thread_time()
                    contender.save(step)
                    held, held_cpu = time.perf_counter() - began, time.thread_time() - cpu
                    if not at_once:
                        time.sleep(pause)
                    waits, cpu = time.perf_counter(), time.thread_time()
                    contender.before_step()
                    settle(job)
                    held += time.perf_counter() - waits
                    held_cpu += time.thread_time() - cpu
                    contender.finish()
                    durable = time.perf_counter() - began
                    contender.settle()
                    if round_ >= 0:
                        if at_once:
                            series.hold_at_once.append(held)
                            series.durable.append(durable)
                        else:
                            series.hold.append(held)
                            series.hold_cpu.append(held_cpu)
                    if at_once and restore and round_ >= 0:
                        drop_cache(contender.directory)
                        began = time.perf_counter()
                        contender.restore()
                        settle(job)
                        series.restore.append(time.perf_counter() - began)
                    contender.forget(step)
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                series.why_not = f"{type(error).__name__}: {error}"
                del running[name]
            trim()
    for contender in running.values():
        contender.close()
    shutil.rmtree(directory, ignore_errors=True)
    return results


def settle(job: Job) -> None:
    """Wait for the GPU, where there is one: what it has queued is part of the time."""
    if next(job.model.parameters()).is_cuda:
        torch.cuda.synchronize()


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


@dataclass(frozen=True, slots=True)
class Throughput:
    """Training with saves against training without, from paired blocks of steps."""

    ratio: float
    low: float
    high: float
    """95 % confidence interval of the mean ratio."""
    cpu: float
    """CPU seconds of the process with saves, over those without."""
    step: float
    """Seconds of a step."""


def throughput(
    build: Callable[[], Job],
    kind: type[Contender],
    directory: Path,
    *,
    blocks: int,
    steps: int = 10,
    every: int = 10,
    seconds: float = 0.5,
) -> Throughput:
    """A loop of steps of a fixed amount of work, in turn with a save every `every` steps and without."""
    job = build()
    device = next(job.model.parameters()).device
    size = 4096 if device.type == "cuda" else 1024
    left = torch.randn(size, size, device=device)

    def work(count: int) -> None:
        for _ in range(count):
            torch.mm(left, left)
        settle(job)

    work(5)
    began = time.perf_counter()
    work(20)
    count = max(1, round(seconds * 20 / (time.perf_counter() - began)))
    contender = kind(job, directory / "throughput")
    number = 0

    def block(saves: bool) -> tuple[float, float]:
        nonlocal number
        began, cpu = time.perf_counter(), time.process_time()
        for step in range(steps):
            work(count)
            contender.before_step()
            job.step()
            if saves and step % every == 0:
                number += 1
                contender.save(number)
        settle(job)
        took = time.perf_counter() - began, time.process_time() - cpu
        if saves:
            contender.finish()
            contender.settle()
            contender.forget(number)
        return took

    block(True)
    ratios, cpus, plain_times = [], [], []
    for index in range(blocks):
        if index % 2:
            with_saves, plain = block(True), block(False)
        else:
            plain, with_saves = block(False), block(True)
        ratios.append(plain[0] / with_saves[0])
        cpus.append(with_saves[1] / plain[1])
        plain_times.append(plain[0] / steps)
    contender.close()
    shutil.rmtree(directory, ignore_errors=True)
    mean = statistics.fmean(ratios)
    spread = 2.0 * statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
    return Throughput(mean, mean - spread, mean + spread, statistics.fmean(cpus), median(plain_times))


def resident() -> int:
    """Bytes of memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
