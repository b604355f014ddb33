"""The measurements. Contenders take turns within every round, so that what disturbs one disturbs all."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    restores: int = 3,
) -> dict[str, Series]:
    """Hold-up and time until durable, then the time to restore, of all contenders on the same state.

    Args:
        pause: seconds of forward and backward between a save and the next optimizer step.
        warm: rounds that do not count: buffers and plans are made in them.
        restores: rounds of restores, after one that does not count.
    """
    results: dict[str, Series] = {kind.name: Series() for kind in contenders}
    job = build()
    running: dict[str, Contender] = {}

    chance = random.Random(0)

    def take_turns(measure: Callable[[Contender, Series], None]) -> None:
        # Those that do not sync leave the disk something to do, and who deletes much, too: it must not fall on the next
        # one, and if it does, not always on the same one.
        for name, contender in chance.sample(list(running.items()), len(running)):
            try:
                measure(contender, results[name])
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                results[name].why_not = f"{type(error).__name__}: {error}"
                del running[name]
            trim()
            os.sync()

    for kind in contenders:
        try:
            running[kind.name] = kind(job, directory / kind.__name__)
        except Exception as error:
            results[kind.name].why_not = f"{type(error).__name__}: {error}"
    step = 0

    def save(contender: Contender, series: Series, *, counts: bool, last: bool) -> None:
        nonlocal step
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
            if counts and at_once:
                series.hold_at_once.append(held)
                series.durable.append(durable)
            elif counts:
                series.hold.append(held)
                series.hold_cpu.append(held_cpu)
            if not (last and at_once):
                contender.forget(step)

    def restore(contender: Contender, series: Series, *, counts: bool) -> None:
        drop_cache(contender.directory)
        began = time.perf_counter()
        contender.restore()
        settle(job)
        if counts:
            series.restore.append(time.perf_counter() - began)

    for number in range(warm + rounds):
        take_turns(functools.partial(save, counts=number >= warm, last=number == warm + rounds - 1))
    for number in range(1 + restores):
        take_turns(functools.partial(restore, counts=number > 0))
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


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over the rounds of what one took of what the other took in the same round."""
    return median([a / b for a, b in zip(ours, theirs, strict=False)])


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

    def text(self) -> str:
        return f"{self.ratio:.3f} (95 % interval {self.low:.3f} to {self.high:.3f}; CPU seconds × {self.cpu:.3f})"


def throughput(
    build: Callable[[], Job],
    kinds: Sequence[type[Contender]],
    directory: Path,
    *,
    rounds: int,
    steps: int = 10,
    seconds: float = 0.5,
) -> dict[str, Throughput]:
    """Blocks of steps of a fixed amount of work, with a save at the beginning and without, in turn.

    Args:
        seconds: of a step.
    """
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
    contenders = {kind.name: kind(job, directory / kind.__name__) for kind in kinds}
    number = 0

    def block(contender: Contender | None) -> tuple[float, float]:
        nonlocal number
        began, cpu = time.perf_counter(), time.process_time()
        for step in range(steps):
            work(count)
            if contender is not None:
                contender.before_step()
            job.step()
            if contender is not None and step == 0:
                number += 1
                contender.save(number)
        settle(job)
        took = time.perf_counter() - began, time.process_time() - cpu
        if contender is not None:
            contender.finish()
            contender.settle()
            contender.forget(number)
        return took

    results: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    steps_alone = []
    chance = random.Random(0)
    for contender in contenders.values():
        block(contender)
    for _ in range(rounds):
        times = {name: block(contenders.get(name)) for name in chance.sample(["", *contenders], 1 + len(contenders))}
        wall, cpu = times[""]
        steps_alone.append(wall / steps)
        for name, series in results.items():
            series.append((wall / times[name][0], times[name][1] / cpu))
    for contender in contenders.values():
        contender.close()
    shutil.rmtree(directory, ignore_errors=True)
    return {name: _throughput(series, median(steps_alone)) for name, series in results.items()}


def _throughput(series: Sequence[tuple[float, float]], step: float) -> Throughput:
    ratios, cpus = [ratio for ratio, _ in series], [cpu for _, cpu in series]
    mean = statistics.fmean(ratios)
    spread = 2.0 * statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
    return Throughput(mean, mean - spread, mean + spread, statistics.fmean(cpus), step)


def in_new_process(work: Callable[..., Any], *arguments: object) -> Any:
    """What `work` returns in a process of its own, which has nothing of what was measured before in its memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _quiet, (torch.get_num_threads(),)) as pool:
        return pool.submit(work, *arguments).result()


def _quiet(threads: int) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)


def resident() -> int:
    """Bytes of memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
