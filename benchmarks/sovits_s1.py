"""Steps per second of stage 1 at its default size, against a straightforward port, in one run.

The port is what one writes first: a padded batch through torch.nn.TransformerEncoder with one float mask per clip and
head, logits from the last phone on, summed cross-entropy, and the accuracy by topk. Both run the same clips in the same
order, with the same dropout, the same optimizer class and the same window of 4 micro-batches, taking turns.

    python benchmarks/sovits_s1.py                      # CPU, float32, default size
    python benchmarks/sovits_s1.py --device cuda --precision 16-mixed --steps 60
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32", choices=("32", "16-mixed", "bf16-mixed"))
    parser.add_argument("--steps", type=int, default=8, help="micro-batches of each, in multiples of 4")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    config = ModelConfig(n_layer=options.layers)
    clips = make_clips(options.clips, seed=1)
    sampler = BucketBatchSampler([clip.seconds for clip in clips], batch_size=options.batch_size)
    batches = [
        collate([(clips[i], torch.zeros(1024, len(clips[i].phones))) for i in indices])
        for indices in list(sampler)[: options.steps + 4]
    ]
    ours_model, port_model = Text2Semantic(config).to(device).train(), Port(config).to(device).train()
    optimizer = make_optimizer(ours_model)
    ours = TrainStep(ours_model, optimizer, LockedRate(optimizer), precision=options.precision)
    port = port_step(port_model, device, options.precision)
    times: dict[str, list[float]] = {"ours": [], "port": []}
    for start in range(0, len(batches) - 3, 4):
        for name, step in (("ours", ours), ("port", port)):
            begin = time.perf_counter()
            for batch in batches[start : start + 4]:
                step(batch)  # type: ignore[operator]
            if device.type == "cuda":
                torch.cuda.synchronize()
            if start:  # the first window warms up
                times[name].append((time.perf_counter() - begin) / 4)
    real = sum(sum(b.phone_lengths) + sum(b.codes.lengths) for b in batches)
    padded = sum(b.phones.numel() + b.codes.ids.numel() for b in batches)
    print(f"{device}, {options.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{sum(p.numel() for p in ours_model.parameters()):,} parameters, batch {options.batch_size}; ", end="")
    print(f"{real / padded:.0%} of the padded positions are real")
    for name, seconds in times.items():
        print(
            f"{name}: median {statistics.median(seconds):.3f} s, total {sum(seconds):.2f} s per {len(seconds)} windows"
        )
    print(f"steps/s, ours over port: {sum(times['port']) / sum(times['ours']):.2f}")


if __name__ == "__main__":
    main()
