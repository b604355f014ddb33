"""Stage 1 as a program: from upstream's tmp_s1.yaml to weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import lastgood
from lastgood_sovits.errors import SovitsError
from lastgood_sovits.resume import write_checkpoint
from lastgood_sovits.s1 import (
    Batch,
    BucketBatchSampler,
    Clip,
    LockedRate,
    S1Dataset,
    StepResult,
    Text2Semantic,
    TrainStep,
    collate,
    make_optimizer,
    read_config,
)
from lastgood_sovits.s1.config import Precision
from lastgood_sovits.text import symbol_ids
from lastgood_sovits.train.initial import check_given, find_checkpoint, load_optimizer, load_pretrained, load_tensors
from lastgood_sovits.train.keyed import Key, KeyedClips, KeyedSampler, generator_of
from lastgood_sovits.train.loader import batches
from lastgood_sovits.train.options import Options
from lastgood_sovits.train.ranks import Ranks, bare
from lastgood_sovits.train.trainer import Trainer, replace, switch_off_dropout
from lastgood_sovits.weights_format import s1_name
from lastgood_sovits.weights_write import write_s1_weights

logger = logging.getLogger(__name__)
WINDOW = 4
"""Micro-batches whose gradients are summed for one optimizer step, as upstream has it in its code."""
_PRECISIONS: dict[str, Precision] = {"32": "32", "fp16": "16-mixed", "bf16": "bf16-mixed"}


@dataclass(frozen=True)
class Collate:
    """Makes a batch of clips, with corrupted codes for the preference loss where `seed` is given."""

    seed: int | None
    upstream_compat: bool

    def __call__(self, items: list[tuple[Key, tuple[Clip, Tensor]]]) -> Batch:
        batch = collate([item for _, item in items])
        if self.seed is None:
            return batch
        generators = [generator_of(self.seed, key) for key, _ in items]
        return batch.with_rejected(generators, upstream_compat=self.upstream_compat)


class Stage1(Trainer):
    """Trains text to semantic codes. A step is one micro-batch; the optimizer steps after every fourth.

    Args:
        path: the configuration file, as upstream's page writes it.
        ranks: the processes.
        options: from the command line.

    Raises:
        SovitsError: the configuration or the experiment cannot be used.
    """

    def __init__(self, path: Path, ranks: Ranks, options: Options) -> None:
        config = self.config = read_config(path)
        self.values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        if config.version in ("v3", "v4"):
            # Upstream trains stage 1 alike for all versions after v1.
            logger.info("stage 1 of %s is that of v2", config.version)
        super().__init__(
            ranks,
            options,
            logs=config.output_dir,
            weights=Path(config.train.half_weights_save_dir),
            epochs=config.train.epochs,
            save_every_epoch=config.train.save_every_n_epoch,
            every_weights=config.train.if_save_every_weights,
            latest_only=config.train.if_save_latest,
            seed=config.train.seed,
            log_every=50,
        )

    def prepare(self) -> None:
        config, ranks, options = self.config, self.ranks, self.options
        self.dataset = S1Dataset(
            config.train_phoneme_path,
            config.train_semantic_path,
            symbol_ids(config.symbols),
            max_sec=config.data.max_sec,
        )
        batch = self.dataset.batch_size(config.clip_batch_size)
        self.sampler = BucketBatchSampler(
            self.dataset.seconds,
            batch_size=options.rank_batch(batch, ranks.size),
            rank=ranks.rank,
            world_size=ranks.size,
        )
        torch.manual_seed(config.train.seed)
        model = Text2Semantic(config.model, upstream_compat=options.upstream_compat, ranks=ranks.size)
        if not options.dropout:
            switch_off_dropout(model)
        self.model = ranks.wrap(model)
        self.optimizer = make_optimizer(model)
        self.schedule = LockedRate(self.optimizer)
        if options.precision == "fp16" and ranks.device.type != "cuda":
            raise SovitsError("--precision fp16 needs CUDA; on the processor, take 32 or bf16")
        precision = config.train.precision if options.precision is None else _PRECISIONS[options.precision]
        # Gradients are exchanged after every micro-batch, so that a window that is open in a checkpoint holds the same
        # on every rank, and any number of ranks can go on with it.
        self.training = TrainStep(
            self.model,
            self.optimizer,
            self.schedule,
            window=WINDOW,
            precision=precision,
            local_gradients=False,
        )

    # -- state ----------------------------------------------------------------------------------------------------

    def objects(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "training": self.training,
            "sampler": self.sampler,
            "ranks": self.ranks.size,
        }

    def more(self) -> dict[str, Any]:
        return {"gradients": True, "replicated": ("model.*.grad",)}

    def begin(self) -> int:
        source = self.options.import_from
        if source is None:
            path = check_given(self.config.pretrained_s1, "pretrained_s1")
            if path is not None:
                load_pretrained(bare(self.model), path, ("s1",))
            return 0
        path, found = find_checkpoint(source)
        load_tensors(bare(self.model), found.tensors, path, may_lack=None)
        load_optimizer(self.optimizer, found.optimizer, path)
        steps, epoch = found.step or 0, found.epoch or 0
        self.schedule.load_state_dict({"steps": steps})
        self.training.micro_batches = epoch * self.steps_per_epoch
        self.sampler.set_epoch(epoch)
        logger.info("imported %s: %d epochs, %d optimizer steps", path, epoch, steps)
        return max(epoch * self.steps_per_epoch, 1)

    def restored(self, ckpt: lastgood.Checkpointer) -> None:
        # DDP averages over the ranks: what an open window holds was divided by the number of them then.
        factor = int(ckpt["ranks"]) / self.ranks.size * self.training.gradient_factor
        if factor != 1:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        ckpt["ranks"] = self.ranks.size

    @property
    def epochs_done(self) -> int:
        return self.sampler.epoch

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.dataset) // self.sampler.group)

    @property
    def position(self) -> int:
        return self.sampler.position

    @property
    def fingerprint(self) -> str:
        clips = [(clip.name, clip.phones, clip.seconds) for clip in self.dataset.clips]
        return hashlib.sha256(repr(clips).encode()).hexdigest()

    def steps_left_in_epoch(self) -> int:
        return len(self.sampler)

    # -- steps ----------------------------------------------------------------------------------------------------

    def batches(self) -> Generator[Batch, None, None]:
        workers = self.options.workers
        if workers is None:
            workers = self.config.data.num_workers if self.ranks.device.type == "cuda" else 0
        seed = self.config.train.seed if self.config.train.if_dpo else None
        made = Collate(seed, self.options.upstream_compat)
        clips, sampler = KeyedClips(self.dataset), KeyedSampler(self.sampler)
        return batches(clips, sampler, made, workers=workers, device=self.ranks.device)

    def train(self, batch: Batch) -> StepResult:
        result = self.training(batch)
        self.sampler.advance()
        return result

    def measured(self, result: StepResult) -> dict[str, float]:
        losses = result.losses
        parts = (losses.total, losses.cross_entropy, losses.preference, losses.top3_hits, losses.top3_targets)
        summed = self.ranks.sum(torch.stack([part.detach().double() for part in parts])).tolist()
        values = {"loss": summed[0], "top3_accuracy": summed[3] / max(summed[4], 1), "learning_rate": result.lr}
        if self.config.train.if_dpo:
            values |= {"cross_entropy": summed[1], "preference": summed[2] / self.ranks.size}
        if result.grad_norm is not None:
            values["gradient"] = result.grad_norm
        return values

    def finish(self) -> None:
        self.training.flush()

    # -- files ----------------------------------------------------------------------------------------------------

    def weights_path(self, epoch: int, step: int) -> Path:
        return self.weights / s1_name(self.config.train.exp_name, epoch)

    def write_weights(self, path: Path, epoch: int, step: int) -> None:
        write_s1_weights(
            path,
            bare(self.model).state_dict(),
            self.values,
            epoch=epoch,
            replace_file=replace,
        )

    def write_upstream(self, folder: Path, step: int) -> list[Path]:
        """Writes a Lightning checkpoint into `folder`, from which upstream's own trainer goes on.

        Raises SovitsError within an epoch, for upstream has no state for that.
        """
        self.check_epoch_end()
        path = folder / f"epoch={self.epochs_done - 1}-step={self.schedule.steps}.ckpt"
        write_checkpoint(
            path,
            bare(self.model).state_dict(),
            self.optimizer.state_dict(),
            {"last_epoch": self.schedule.steps, "_step_count": self.schedule.steps},
            self.values,
            epoch=self.epochs_done,
            step=self.schedule.steps,
            batches=self.training.micro_batches,
            replace_file=replace,
        )
        return [path]
