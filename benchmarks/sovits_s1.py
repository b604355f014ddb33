"""Steps per second and memory of stage 1 at its default size, against a straightforward port, in one run.

The port is what one writes first: a padded batch through torch.nn.TransformerEncoder with one float mask per clip and
head, logits from the last phone on, summed cross-entropy, and the accuracy by topk. Both run the same clips in the same
order, with the same dropout, the same optimizer class and the same window of 4 micro-batches, taking turns.

    python -m benchmarks.sovits_s1                      # CPU, float32, default size
    python -m benchmarks.sovits_s1 --device cuda --precision 16-mixed --steps 60
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory import peak_of_this_process
from lastgood_sovits.s1 import Batch, BucketBatchSampler, LockedRate, Text2Semantic, TrainStep, collate, make_optimizer
from lastgood_sovits.s1.config import ModelConfig
from lastgood_sovits.s1.dataset import Clip


class Port(nn.Module):
    """The straightforward port, around the parameters of a `Text2Semantic`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = Text2Semantic(config)
        self.model = inner.model
        self.config = config
        layer = nn.TransformerEncoderLayer(
            config.hidden_dim, config.head, 4 * config.hidden_dim, dropout=0.1, batch_first=True
        )
        self.model.h = nn.TransformerEncoder(layer, config.n_layer, enable_nested_tensor=False)  # type: ignore[assignment]

    def forward(self, batch: Batch) -> tuple[Tensor, float]:
        model, eos = self.model, self.config.eos
        clips, x = batch.phones.shape
        y = batch.codes.ids.shape[1]
        device = batch.phones.device
        x_lens = torch.tensor(batch.phone_lengths, device=device)
        y_lens = torch.tensor(batch.codes.lengths, device=device)
        model.ar_text_position.prepare(x)
        model.ar_audio_position.prepare(y)
        text = model.ar_text_embedding(batch.phones) + model.bert_proj(batch.bert.transpose(1, 2))
        text = model.ar_text_position(text, torch.arange(x, device=device))
        past_end = torch.arange(y, device=device)[None] >= y_lens[:, None]
        codes = batch.codes.ids.masked_fill(past_end, eos)
        targets = F.pad(codes, (0, 1), value=eos)
        audio = model.ar_audio_position(model.ar_audio_embedding(codes), torch.arange(y, device=device))
        blocked = torch.ones(x + y, x + y, dtype=torch.bool, device=device).triu(1)
        blocked[:, :x] = False
        keys = torch.cat([torch.arange(x, device=device)[None] >= x_lens[:, None], past_end], dim=1)
        heads = self.config.head
        padding = keys.view(clips, 1, 1, x + y).expand(-1, heads, -1, -1).reshape(clips * heads, 1, x + y)
        blocked = blocked | padding
        mask = torch.zeros(blocked.shape, dtype=text.dtype, device=device).masked_fill_(blocked, float("-inf"))
        hidden = model.h(torch.cat([text, audio], dim=1), mask)
        logits = model.ar_predict_layer(hidden[:, x - 1 :]).permute(0, 2, 1)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        hits = (logits.detach().topk(3, dim=1)[1] == targets[:, None]).any(dim=1) & (targets != eos)
        return loss, (hits.sum() / (targets != eos).sum()).item()


def make_clips(count: int, seed: int) -> list[Clip]:
    """Clips of 1.25 to 10 seconds and 8 to 20 phones a second, as in an hour of slicer output."""
    draw = random.Random(seed)
    clips = []
    for number in range(count):
        seconds = draw.uniform(1.25, 10.0)
        codes = tuple(draw.randrange(1024) for _ in range(int(seconds * 25)))
        phones = tuple(draw.randrange(700) for _ in range(int(seconds * draw.uniform(8, 20))))
        clips.append(Clip(name=str(number), phones=phones, codes=codes))
    return clips


def port_step(model: Port, device: torch.device, precision: str) -> Callable[[Batch], None]:
    optimizer = make_optimizer(model)  # type: ignore[arg-type]
    schedule = LockedRate(optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "16-mixed")
    dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(precision)
    seen = 0

    def step(batch: Batch) -> None:
        nonlocal seen
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss, _ = model(batch.to(device))
        scaler.scale(loss).backward()
        seen += 1
        if seen % 4 == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()

    return step


def make_step(name: str, config: ModelConfig, device: torch.device, precision: str) -> Callable[[Batch], object]:
    """`name` is ours or port. Each does one micro-batch when called."""
    torch.manual_seed(0)
    if name == "port":
        return port_step(Port(config).to(device).train(), device, precision)
    model = Text2Semantic(config).to(device).train()
    optimizer = make_optimizer(model)
    return TrainStep(model, optimizer, LockedRate(optimizer), precision=precision)  # type: ignore[arg-type]


def make_batches(count: int, batch_size: int, clips: int) -> list[Batch]:
    made = make_clips(clips, seed=1)
    sampler = BucketBatchSampler([clip.seconds for clip in made], batch_size=batch_size)
    return [
        collate([(made[i], torch.zeros(1024, len(made[i].phones))) for i in indices])
        for indices in list(sampler)[:count]
    ]


@dataclass(frozen=True)
class Speed:
    """Seconds per micro-batch, one for each window of 4 after the first."""

    ours: list[float]
    port: list[float]

    @property
    def ratio(self) -> float:
        """Steps per second, ours over the port's, over all windows."""
        return sum(self.port) / sum(self.ours)


def measure_speed(config: ModelConfig, batches: list[Batch], device: torch.device, precision: str) -> Speed:
    steps = {name: make_step(name, config, device, precision) for name in ("ours", "port")}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for start in range(0, len(batches) - 3, 4):
        for name, step in steps.items():
            begin = time.perf_counter()
            for batch in batches[start : start + 4]:
                step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if start:  # the first window warms up
                times[name].append((time.perf_counter() - begin) / 4)
    return Speed(times["ours"], times["port"])


def peak_memory(name: str, batch_size: int) -> int:
    """Bytes that a process of its own has used at most, in one window of `name`."""
    command = [sys.executable, "-m", "benchmarks.sovits_s1", "--peak-of", name, "--batch-size", str(batch_size)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32", choices=("32", "16-mixed", "bf16-mixed"))
    parser.add_argument("--steps", type=int, default=8, help="micro-batches of each, in multiples of 4")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak-of", choices=("ours", "port"), help="print the bytes that one needs, and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    config = ModelConfig(n_layer=options.layers)
    if options.peak_of:
        step = make_step(options.peak_of, config, device, options.precision)
        for batch in make_batches(4, options.batch_size, options.clips):
            step(batch)
        print(peak_of_this_process())
        return
    batches = make_batches(options.steps + 4, options.batch_size, options.clips)
    speed = measure_speed(config, batches, device, options.precision)
    real = sum(sum(b.phone_lengths) + sum(b.codes.lengths) for b in batches)
    padded = sum(b.phones.numel() + b.codes.ids.numel() for b in batches)
    print(f"{device}, {options.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"batch {options.batch_size}; {real / padded:.0%} of the padded positions are real")
    for name, seconds in (("ours", speed.ours), ("port", speed.port)):
        print(
            f"{name}: median {statistics.median(seconds):.3f} s, total {sum(seconds):.2f} s per {len(seconds)} windows"
        )
    print(f"steps/s, ours over port: {speed.ratio:.2f}")


if __name__ == "__main__":
    main()
