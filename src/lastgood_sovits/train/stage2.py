"""Stage 2 as a program: from upstream's tmp_s2.json to weights."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import torch
from torch.amp.grad_scaler import GradScaler

import lastgood
from lastgood_sovits.audio import mel_from_spectrogram, spectrogram
from lastgood_sovits.errors import SovitsError
from lastgood_sovits.resume import resume_names, write_resume
from lastgood_sovits.s2.config import read_config
from lastgood_sovits.s2.dataset import ClipDataset
from lastgood_sovits.s2.discriminator import Discriminator
from lastgood_sovits.s2.optimization import build_optimizers, published_state, set_learning_rates
from lastgood_sovits.s2.sampler import BucketSampler
from lastgood_sovits.s2.step import StepResult, TrainStep
from lastgood_sovits.s2.synthesizer import Synthesizer
from lastgood_sovits.train.drawn import Draw, Drawn
from lastgood_sovits.train.initial import check_given, find_pair, load_optimizer, load_pretrained, load_tensors
from lastgood_sovits.train.keyed import KeyedClips, KeyedSampler
from lastgood_sovits.train.loader import batches
from lastgood_sovits.train.options import Options
from lastgood_sovits.train.ranks import Ranks, bare, seed_step
from lastgood_sovits.train.report import Report
from lastgood_sovits.train.trainer import Trainer, replace, switch_off_dropout
from lastgood_sovits.weights_format import Version, s2_name
from lastgood_sovits.weights_write import write_s2_weights

logger = logging.getLogger(__name__)
CODEBOOK_CLIPS = 64
"""Clips from which an empty codebook is learnt."""


class Stage2(Trainer):
    """Trains the generator and its discriminator.

    Args:
        path: the configuration file, as upstream's page writes it.
        ranks: the processes.
        options: from the command line.

    Raises:
        SovitsError: the configuration or the experiment cannot be used.
    """

    def __init__(self, path: Path, ranks: Ranks, options: Options) -> None:
        config = self.config = read_config(path)
        self.values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        folder = config.data.exp_dir or config.s2_ckpt_dir
        if not folder or not config.save_weight_dir or not config.name:
            raise SovitsError(
                f"{path} lacks data.exp_dir, save_weight_dir or name, which upstream's page writes: these are the "
                "prepared experiment, the folder of the weights and the name of the voice"
            )
        train, model = config.train, config.model
        self._rate = 0.0
        self.version = cast(Version, model.version)
        super().__init__(
            ranks,
            options,
            logs=Path(config.s2_ckpt_dir or folder) / f"logs_s2_{model.version}",
            weights=Path(config.save_weight_dir),
            epochs=train.epochs,
            save_every_epoch=train.save_every_epoch,
            every_weights=train.if_save_every_weights,
            latest_only=train.if_save_latest,
            seed=train.seed,
            log_every=train.log_interval,
        )
        self._folder = Path(folder)

    def prepare(self) -> None:
        config, ranks, options = self.config, self.ranks, self.options
        train, model = config.train, config.model
        self.dataset = ClipDataset(self._folder, config)
        self.sampler = BucketSampler(
            self.dataset.lengths,
            options.rank_batch(train.batch_size, ranks.size),
            rank=ranks.rank,
            world_size=ranks.size,
        )
        torch.manual_seed(train.seed)
        generator = Synthesizer(model, config.data.spec_channels, config.segment_frames)
        discriminator = Discriminator(model.periods, model.discriminator_channels)
        if not options.dropout:
            switch_off_dropout(generator)
        self.generator, self.discriminator = ranks.wrap(generator.train()), ranks.wrap(discriminator.train())
        self.optimizer_g, self.optimizer_d = build_optimizers(generator, self.discriminator, train)
        amp = self._amp(options, train.fp16_run)
        self.scaler = GradScaler(ranks.device.type, enabled=amp is torch.float16)
        self.training = TrainStep(
            self.generator,
            self.discriminator,
            self.optimizer_g,
            self.optimizer_d,
            config,
            scaler=self.scaler,
            amp_dtype=amp,
        )

    def _amp(self, options: Options, fp16_run: bool) -> torch.dtype | None:
        wanted = options.precision or ("fp16" if fp16_run and self.ranks.device.type == "cuda" else "32")
        if wanted == "fp16" and self.ranks.device.type != "cuda":
            raise SovitsError("--precision fp16 needs CUDA; on the processor, take 32 or bf16")
        return {"32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[wanted]

    # -- state ----------------------------------------------------------------------------------------------------

    def objects(self) -> dict[str, Any]:
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "optimizer_g": self.optimizer_g,
            "optimizer_d": self.optimizer_d,
            "scaler": _ScalerState(self.scaler),
            "sampler": _SamplerState(self.sampler),
        }

    def begin(self) -> int:
        generator, discriminator = bare(self.generator), bare(self.discriminator)
        if self.options.import_from is not None:
            g_path, d_path, g, d = find_pair(self.options.import_from)
            load_tensors(generator, g.tensors, g_path, may_lack=None)
            load_tensors(discriminator, d.tensors, d_path, may_lack=None)
            load_optimizer(self.optimizer_g, g.optimizer, g_path)
            load_optimizer(self.optimizer_d, d.optimizer, d_path)
            epoch = g.epoch or 0
            self._start_epoch(epoch + 1)
            logger.info("imported %s and %s: %d epochs", g_path, d_path, epoch)
            return max(g.step or 0, epoch * self.steps_per_epoch, 1)
        train = self.config.train
        g_given = check_given(train.pretrained_s2G, "train.pretrained_s2G")
        d_given = check_given(train.pretrained_s2D, "train.pretrained_s2D")
        if g_given is not None:
            load_pretrained(generator, g_given, ("s2", "s2G-resume"), may_lack="enc_q.")
        if d_given is not None:
            load_pretrained(discriminator, d_given, ("s2D", "s2D-resume"))
        self._learn_codebook(cast(Synthesizer, generator))
        self._start_epoch(1)
        return 0

    def _learn_codebook(self, generator: Synthesizer) -> None:
        """Fills an empty codebook from the first clips, alike for every number of ranks."""
        codebook = generator.quantizer.codebook
        if codebook.is_ready():
            return
        seed_step(self.seed, 0, 0)
        names = list(dict.fromkeys(self.dataset.names))
        with torch.no_grad():
            clips = [self.dataset[self.dataset.names.index(name)] for name in names[:CODEBOOK_CLIPS]]
            rows = [generator.ssl_proj(clip.ssl.unsqueeze(0).to(self.ranks.device))[0].T for clip in clips]
        codebook.initialise(torch.cat(rows)[: None if self.ranks.first else 0])
        logger.info("the codebook was learnt from %d clips, since no pretrained generator was given", len(clips))

    def restored(self, ckpt: lastgood.Checkpointer) -> None:
        if len(self.sampler) == 0:
            self._start_epoch(self.sampler.epoch + 1)
        self._set_rates()

    def _start_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)
        self._set_rates()

    def _set_rates(self) -> None:
        # A pure function of the epoch: nothing that a resumed run could decay twice.
        set_learning_rates(self.optimizer_g, self.optimizer_d, self.config.train, self.sampler.epoch)

    @property
    def epochs_done(self) -> int:
        return self.sampler.epoch - 1

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    @property
    def position(self) -> int:
        return self.sampler.position

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr(self.dataset.clips).encode()).hexdigest()

    def steps_left_in_epoch(self) -> int:
        return len(self.sampler)

    # -- steps ----------------------------------------------------------------------------------------------------

    def batches(self) -> Generator[Drawn, None, None]:
        workers = self.options.workers
        if workers is None:
            workers = 5 if self.ranks.device.type == "cuda" else 0
        clips, sampler = KeyedClips(self.dataset), KeyedSampler(self.sampler)
        draw = Draw(self.seed, self.config.model.inter_channels, self.config.segment_frames)
        return batches(clips, sampler, draw, workers=workers, device=self.ranks.device)

    def train(self, batch: Drawn) -> StepResult:
        batch = batch.to(self.ranks.device)
        self._rate = self.optimizer_g.param_groups[0]["lr"]
        result = self.training(batch.batch, noise=batch.noise, starts=batch.starts)
        self.sampler.advance()
        if len(self.sampler) == 0:
            self._start_epoch(self.sampler.epoch + 1)
        return result

    def measured(self, result: StepResult) -> dict[str, float]:
        names = ("generator", "discriminator", "mel", "kl", "adversarial", "feature", "commitment")
        nothing = torch.full((), float("nan"), device=self.ranks.device)
        losses = [result.losses.get(name, nothing).detach().double() for name in names]
        norms = [result.grad_norms.get(name, nothing).detach().double() for name in ("generator", "discriminator")]
        means = self.ranks.mean(torch.stack([*losses, *norms])).tolist()
        values = dict(zip((*names, "gradient_g", "gradient_d"), means, strict=True))
        values["learning_rate"] = self._rate
        if self.scaler.is_enabled():
            values["loss_scale"] = self.scaler.get_scale()
        return values

    def finish(self) -> None:
        """Nothing is accumulated over steps."""

    def show(self, report: Report, step: int) -> None:
        """The first clip, spoken again: its sound, and both mel spectrograms."""
        clip, data = self.dataset[0], self.config.data
        generator = cast(Synthesizer, bare(self.generator))
        generator.eval()
        device = self.ranks.device
        spec, sv = clip.spec.unsqueeze(0).to(device), None if clip.sv is None else clip.sv.unsqueeze(0).to(device)
        frames = spec.shape[2] // 2 * 2
        lengths = torch.tensor([frames], device=device)
        ssl = clip.ssl.unsqueeze(0)[..., :frames].to(device)
        text = clip.text.unsqueeze(0).to(device)
        wave = generator.infer(ssl, spec[..., :frames], lengths, text, sv)[0]
        generator.train()
        bands = (data.sampling_rate, data.filter_length, data.n_mel_channels, data.mel_fmin, data.mel_fmax)
        again = spectrogram(wave.float(), data.filter_length, data.hop_length, data.win_length)
        report.mel(step, "real", mel_from_spectrogram(spec.float(), *bands)[0])
        report.mel(step, "made", mel_from_spectrogram(again, *bands)[0])
        report.sound(step, "real", clip.wave, data.sampling_rate)
        report.sound(step, "made", wave[0], data.sampling_rate)

    # -- files ----------------------------------------------------------------------------------------------------

    def weights_path(self, epoch: int, step: int) -> Path:
        return self.weights / s2_name(self.config.name, epoch, step)

    def write_weights(self, path: Path, epoch: int, step: int) -> None:
        write_s2_weights(
            path,
            bare(self.generator).state_dict(),
            self.values,
            version=self.version,
            epoch=epoch,
            step=step,
            replace_file=replace,
        )

    def write_upstream(self, folder: Path, step: int) -> list[Path]:
        """Writes G_<step>.pth and D_<step>.pth into `folder`, from which upstream's own trainer goes on.

        Raises SovitsError within an epoch, for upstream has no state for that.
        """
        self.check_epoch_end()
        g_name, d_name = resume_names(step)
        rate, epoch = self.config.train.learning_rate, self.epochs_done
        pairs = ((d_name, self.discriminator, self.optimizer_d), (g_name, self.generator, self.optimizer_g))
        for name, model, optimizer in pairs:
            state = bare(model).state_dict()
            write_resume(
                folder / name, state, published_state(optimizer), epoch=epoch, learning_rate=rate, replace_file=replace
            )
        return [folder / d_name, folder / g_name]


class _ScalerState:
    """The loss scale. A run may go on in another precision: then there is none to restore."""

    def __init__(self, scaler: GradScaler) -> None:
        self._scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and self._scaler.is_enabled():
            self._scaler.load_state_dict(state)


class _SamplerState:
    """The place in the epoch. Where the clips are not the same any more, their epoch begins again."""

    def __init__(self, sampler: BucketSampler) -> None:
        self._sampler = sampler

    def state_dict(self) -> dict[str, Any]:
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        try:
            self._sampler.load_state_dict(state)
        except SovitsError:
            epoch = int(state["epoch"])
            logger.warning("the clips have changed since the checkpoint: epoch %d begins again", epoch)
            self._sampler.set_epoch(epoch)
