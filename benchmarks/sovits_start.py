"""Seconds from the command to the first step of stage 2, against upstream's way, from scratch at the default size.

Both begin as new processes and end where the first forward pass would begin: imports, experiment, networks, optimizers,
first batch, codebook. Upstream's way, written anew: the training process is started by another one; five workers load
ahead; each clip is decoded by a process of its own (ffmpeg where there is one, else `cat`, which is cheaper); k-means
compares each vector with each code by their differences.

    python -m benchmarks.sovits_start --clips 200
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.sovits_data import make_experiment, write_config
from lastgood_sovits.s2.batch import Clip, collate
from lastgood_sovits.s2.config import read_config
from lastgood_sovits.s2.dataset import ClipDataset
from lastgood_sovits.s2.discriminator import Discriminator
from lastgood_sovits.s2.sampler import BucketSampler
from lastgood_sovits.s2.synthesizer import Synthesizer


def _decode(path: Path) -> Tensor:
    if shutil.which("ffmpeg"):
        command = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "f32le", "-ac", "1", "-ar", "32000", "-"]
        return torch.from_numpy(np.frombuffer(subprocess.run(command, capture_output=True).stdout, np.float32).copy())
    data = subprocess.run(["cat", str(path)], capture_output=True).stdout
    return torch.from_numpy(np.frombuffer(data[44:], np.int16).astype(np.float32) / 32768)


class _OneProcessAClip(ClipDataset):
    """Sees only that files exist before the training, and decodes each clip in a process."""

    def _check(self, name: str) -> int:
        return int(self._paths(name)[1].stat().st_size // 1280)

    def __getitem__(self, index: int) -> Clip:
        clip = super().__getitem__(index)
        _decode(self._paths(clip.name)[1])
        return clip


def _kmeans(rows: Tensor, count: int, iterations: int = 50) -> Tensor:
    centres = rows[torch.randint(len(rows), (count,))]
    for _ in range(iterations):
        distances = (rows[:, None] - centres[None]).square().sum(-1)
        owner = distances.argmin(1)
        sizes = torch.bincount(owner, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, owner, rows)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centres)
    return centres


def _port_rank(_: int, path: Path, began: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path.parent}/store", rank=0, world_size=1)
    config = read_config(path)
    dataset = _OneProcessAClip(Path(config.data.exp_dir or ""), config)
    sampler = BucketSampler(dataset.lengths, config.train.batch_size)
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=5, persistent_workers=True, prefetch_factor=3
    )
    generator = Synthesizer(config.model)
    discriminator = Discriminator(config.model.periods)
    for network in (generator, discriminator):
        torch.optim.AdamW(network.parameters())
    batch = next(iter(loader))
    with torch.no_grad():
        _kmeans(generator.ssl_proj(batch.ssl).transpose(1, 2).flatten(0, 1), config.model.codebook_size)
    print(f"seconds {time.time() - began}", flush=True)
    dist.destroy_process_group()


def _ours(path: Path, began: float) -> None:
    from lastgood_sovits.train.options import Options
    from lastgood_sovits.train.ranks import Ranks
    from lastgood_sovits.train.report import Report
    from lastgood_sovits.train.stage2 import Stage2

    trainer = Stage2(path, Ranks(0, 1, torch.device("cpu")), Options(device="cpu"))
    with Report(trainer.ranks, trainer.logs):
        trainer.prepare()
        with trainer.checkpointer() as ckpt:
            assert ckpt.restore() == 0
            trainer.begin()
            next(trainer.batches())
            print(f"seconds {time.time() - began}", flush=True)


def measure_start(name: str, folder: Path, batch_size: int) -> float:
    """Seconds that `name` (ours or port) needs, in a new process."""
    with tempfile.TemporaryDirectory() as run:
        path = write_config(folder, Path(run), batch_size, {}, {})
        command = [sys.executable, "-m", "benchmarks.sovits_start", "--child", name, "--config", str(path)]
        done = subprocess.run([*command, "--began", str(time.time())], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split("seconds ")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", choices=("ours", "port"), help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "ours":
        torch.set_num_threads(1)
        _ours(options.config, options.began)
    elif options.child == "port":
        mp.spawn(_port_rank, (options.config, options.began))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            make_experiment(Path(temporary) / "voice", options.clips)
            for _ in range(options.rounds):
                for name in ("ours", "port"):
                    seconds = measure_start(name, Path(temporary) / "voice", options.batch_size)
                    print(f"{name}: {seconds:.1f} s until the first step", flush=True)


if __name__ == "__main__":
    main()
