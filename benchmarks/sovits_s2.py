"""Steps per second and memory of stage 2 at its default size, against a straightforward port of upstream's step.

Both run the same clips in the same order with the same noise and slices, from the same weights, taking turns. The port
is in `benchmarks/sovits_port.py`. Memory is the largest that a process of its own has used.

    python -m benchmarks.sovits_s2                      # CPU, float32, default size, batch 4
    python -m benchmarks.sovits_s2 --batch-size 8 --steps 10 --version v2Pro
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.memory import peak_of_this_process
from benchmarks.sovits_port import PortStep
from lastgood_sovits.s2.batch import Batch, Clip, collate
from lastgood_sovits.s2.config import Config, ModelConfig, TrainConfig
from lastgood_sovits.s2.discriminator import Discriminator
from lastgood_sovits.s2.optimization import build_optimizers
from lastgood_sovits.s2.step import TrainStep
from lastgood_sovits.s2.synthesizer import Synthesizer

Step = Callable[[Batch], tuple[float, float]]
"""Does one step; returns the losses of discriminator and generator."""


def default_config(version: str, batch_size: int) -> Config:
    """Upstream's configuration of a version."""
    model = ModelConfig(version=version)
    if model.is_pro:
        model = replace(model, gin_channels=1024, p_dropout=0.0)
    if version == "v2ProPlus":
        model = replace(model, upsample_initial_channel=768, upsample_kernel_sizes=(20, 16, 8, 2, 2))
    return Config(model=model, train=TrainConfig(batch_size=batch_size))


def make_batches(config: Config, count: int, seed: int = 0) -> list[Batch]:
    """Batches of clips that last 4 to 6 seconds, which share a bucket of the sampler."""
    draw = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        clips = []
        for number in range(config.train.batch_size):
            frames = int(torch.randint(201, 301, (), generator=draw))
            phones = frames // 5
            clips.append(
                Clip(
                    name=str(number),
                    ssl=torch.randn(config.model.ssl_channels, frames, generator=draw),
                    spec=torch.rand(config.data.spec_channels, frames, generator=draw) * 4,
                    wave=torch.randn(frames * config.data.hop_length, generator=draw) * 0.1,
                    text=torch.randint(config.model.n_symbols, (phones,), generator=draw),
                    sv=torch.randn(config.model.sv_channels, generator=draw) if config.model.is_pro else None,
                )
            )
        batches.append(collate(clips))
    return batches


def make_step(name: str, config: Config, device: torch.device) -> Step:
    """`name` is ours or port; both begin with the same weights and draw the same random numbers at each step."""
    torch.manual_seed(0)
    generator = Synthesizer(config.model, config.data.spec_channels, config.segment_frames)
    generator.quantizer.codebook.initialise(torch.randn(config.model.codebook_size, config.model.ssl_channels))
    discriminator = Discriminator(config.model.periods, config.model.discriminator_channels)
    generator.to(device).train(), discriminator.to(device).train()
    done = 0
    if name == "port":
        port = PortStep(generator, discriminator, config)
    else:
        ours = TrainStep(generator, discriminator, *build_optimizers(generator, discriminator, config.train), config)

    def step(batch: Batch) -> tuple[float, float]:
        nonlocal done
        done += 1
        torch.manual_seed(done)
        losses = port(batch.to(device)) if name == "port" else ours(batch.to(device)).losses
        return float(losses["discriminator"]), float(losses["generator"])

    return step


@dataclass(frozen=True)
class Speed:
    """Seconds per step, one for each round after the first."""

    ours: list[float]
    port: list[float]
    difference: float
    """Largest relative difference of the losses of the first step."""

    @property
    def ratio(self) -> float:
        """Steps per second, ours over the port's: the median over the rounds, in which each had its turn."""
        return statistics.median(port / ours for ours, port in zip(self.ours, self.port, strict=True))


def measure_speed(config: Config, rounds: int, device: torch.device, clock: Callable[[], float]) -> Speed:
    steps = {name: make_step(name, config, device) for name in ("ours", "port")}
    times: dict[str, list[float]] = {name: [] for name in steps}
    difference = 0.0
    for number, batch in enumerate(make_batches(config, rounds + 1)):
        losses = {}
        order = list(steps) if number % 2 else list(reversed(steps))
        for name in order:
            begin = clock()
            losses[name] = steps[name](batch)
            if number:  # the first warms up
                times[name].append(clock() - begin)
        if not number:
            difference = max(abs(a - b) / abs(b) for a, b in zip(losses["ours"], losses["port"], strict=True))
    return Speed(times["ours"], times["port"], difference)


def peak_memory(name: str, version: str, batch_size: int) -> int:
    """Bytes that a process of its own has used at most, in two steps of `name`."""
    command = [sys.executable, "-m", "benchmarks.sovits_s2", "--peak-of", name, "--version", version]
    command += ["--batch-size", str(batch_size), "--threads", str(torch.get_num_threads())]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _own_peak(name: str, config: Config) -> int:
    step = make_step(name, config, torch.device("cpu"))
    for batch in make_batches(config, 2):
        step(batch)
    return peak_of_this_process()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--version", default="v2", choices=("v1", "v2", "v2Pro", "v2ProPlus"))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="steps of each, beside one to warm up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="of this process, instead of the clock on the wall")
    parser.add_argument("--peak-of", choices=("ours", "port"), help="print the bytes that one needs, and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = default_config(options.version, options.batch_size)
    if options.peak_of:
        print(_own_peak(options.peak_of, config))
        return
    device = torch.device(options.device)
    clock = time.process_time if options.cpu_time else time.perf_counter
    speed = measure_speed(config, options.steps, device, clock)
    print(
        f"{device}, {options.version}, batch {options.batch_size}, {options.threads} threads, torch {torch.__version__}"
    )
    for name, seconds in (("ours", speed.ours), ("port", speed.port)):
        print(f"{name}: median {statistics.median(seconds):.2f} s a step, {[round(s, 2) for s in seconds]}")
    print(f"first losses differ by {speed.difference:.1e}; steps/s, ours over port: {speed.ratio:.3f}")


if __name__ == "__main__":
    main()
