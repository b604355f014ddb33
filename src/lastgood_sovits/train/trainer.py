"""What both stages have in common: one loop over all epochs, saved through lastgood, and the weights that it writes."""

from __future__ import annotations

import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lastgood
from lastgood_sovits.errors import SovitsError
from lastgood_sovits.train.notes import Notes
from lastgood_sovits.train.options import Options
from lastgood_sovits.train.ranks import Ranks, seed_step
from lastgood_sovits.train.report import Report

logger = logging.getLogger(__name__)
_EPOCH = "whole_epoch"
"""Metric of a checkpoint from the end of an epoch whose checkpoint is wanted: the number of the epoch."""


class Trainer(ABC):
    """A training that can be stopped at any step and goes on exactly from there.

    A step is one batch of every rank. Epochs are counted from 1 for people and in file names, as upstream does.

    Args:
        ranks: the processes.
        options: from the command line.
        logs: folder of the log, of TensorBoard and of the checkpoints, which are in its folder ``lastgood``.
        weights: folder of the weights files.
        epochs: how many to train, in all.
        save_every_epoch: epochs between two weights files.
        every_weights: whether files are written before the last epoch.
        latest_only: whether only the newest checkpoints are kept.
        seed: of all random numbers.
        log_every: steps between two log lines.
    """

    def __init__(
        self,
        ranks: Ranks,
        options: Options,
        *,
        logs: Path,
        weights: Path,
        epochs: int,
        save_every_epoch: int,
        every_weights: bool,
        latest_only: bool,
        seed: int,
        log_every: int,
    ) -> None:
        self.ranks, self.options, self.logs, self.weights = ranks, options, logs, weights
        self.epochs, self.save_every_epoch, self.every_weights = epochs, save_every_epoch, every_weights
        self.latest_only, self.seed = latest_only, seed
        self.log_every = options.log_every or log_every
        self.written: Path | None = None
        """The newest weights file."""
        self.unwritten: dict[Path, str] = {}
        """Weights files that could not be written, and why."""
        self.notes = Notes()

    # -- what a stage defines -------------------------------------------------------------------------------------

    @abstractmethod
    def prepare(self) -> None:
        """Checks and reads the experiment and makes the networks. Raises SovitsError for what cannot be used."""

    @abstractmethod
    def objects(self) -> dict[str, Any]:
        """The state, by name, as `lastgood.Checkpointer` takes it."""

    @property
    @abstractmethod
    def epochs_done(self) -> int:
        """Whole epochs trained."""

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch."""

    @property
    @abstractmethod
    def position(self) -> int:
        """Clips of the present epoch that are done, over all ranks; 0 between two epochs."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the clips that are trained on."""

    @abstractmethod
    def steps_left_in_epoch(self) -> int:
        """Steps until the present epoch is over."""

    @abstractmethod
    def begin(self) -> int:
        """Gives a new run its first state; returns the steps already done elsewhere, for an imported run."""

    @abstractmethod
    def restored(self, ckpt: lastgood.Checkpointer) -> None:
        """Puts in order what follows from the restored state."""

    @abstractmethod
    def batches(self) -> Generator[Any, None, None]:
        """Batches without end, one epoch after the other; each is drawn only when the one before it was trained on."""

    @abstractmethod
    def train(self, batch: Any) -> Any:
        """Trains on a batch, and counts it. Returns what `measured` reads."""

    @abstractmethod
    def measured(self, result: Any) -> dict[str, float]:
        """The losses of a step over all ranks, by name; the first is the one that counts. Every rank calls it."""

    @abstractmethod
    def finish(self) -> None:
        """After the last step: uses what is left of gradients."""

    @abstractmethod
    def write_weights(self, path: Path, epoch: int, step: int) -> None:
        """Writes the present weights into `path`. Called on the first rank."""

    @abstractmethod
    def weights_path(self, epoch: int, step: int) -> Path:
        """Where the weights file of an epoch belongs."""

    @abstractmethod
    def write_upstream(self, folder: Path, step: int) -> list[Path]:
        """Writes into `folder` what upstream's own trainer continues from; returns the files."""

    def check_epoch_end(self) -> None:
        """Raises SovitsError where the state is from within an epoch, for upstream has none for that."""
        if self.position:
            raise SovitsError(
                f"the checkpoint is from within epoch {self.epochs_done + 1}, and upstream can only continue from the "
                "end of one: train to its end first, or choose an earlier one with --step"
            )

    def show(self, report: Report, step: int) -> None:
        """Adds pictures and sounds of the present state to TensorBoard. Called on the first rank."""
        return

    # -- the training ---------------------------------------------------------------------------------------------

    def checkpointer(self, **more: Any) -> lastgood.Checkpointer:
        """Opens the run's checkpoints."""
        # Only the ends of epochs have that metric, and all of them are among the best so many.
        all_epochs = lastgood.Keep(last=3, best=sys.maxsize, metric=_EPOCH, mode="max")
        return lastgood.Checkpointer(
            self.logs / "lastgood",
            keep=lastgood.Keep(last=3) if self.latest_only else all_epochs,
            every=self.options.save_every,
            minutes=self.options.save_minutes,
            mirror=self.mirror,
            **self.more(),
            **more,
            notes=self.notes,
            **self.objects(),
        )

    @property
    def mirror(self) -> Path | None:
        """Where this run's copies go: one directory may take those of several voices and of both stages."""
        logs = self.logs.resolve()
        return None if self.options.mirror is None else self.options.mirror / logs.parent.name / logs.name

    def more(self) -> dict[str, Any]:
        """Arguments for the Checkpointer that a stage adds."""
        return {}

    def run(self) -> int:
        """Trains to the end; returns the exit code. Raises SovitsError and `lastgood.LastGoodError`."""
        self._make_weights_folder()
        with Report(self.ranks, self.logs) as report:
            self.prepare()
            with self.checkpointer() as ckpt:
                self._run(ckpt, report)
        return self._conclude()

    def _run(self, ckpt: lastgood.Checkpointer, report: Report) -> None:
        here = any((self.logs / "lastgood").glob("step-*/manifest.json"))
        step = ckpt.restore()
        if step == 0:
            step = self.begin()
            self.notes.clips = self.fingerprint
            if step:
                self.notes.imported = self._import_source()
                ckpt.save(step, blocking=True).result()
        else:
            if not here:
                self._check_clips()
            self.notes.clips = self.fingerprint
            self._check_import()
            self._write_what_is_missing(ckpt, step)
            self.restored(ckpt)
        total = step + self._steps_left()
        report.begin(step, total)
        logger.info(
            "%s at step %d of %d, epoch %d of %d, with %d processes on %s",
            "training" if step < total else "nothing is left to train",
            step,
            total,
            min(self.epochs_done + 1, self.epochs),
            self.epochs,
            self.ranks.size,
            self.ranks.device.type,
        )
        if step >= total and self.ranks.first:
            self._write_again_if_missing(step)
        with closing(self.batches()) as batches:
            for number in ckpt.steps(total):
                self._step(next(batches), number + 1, total, ckpt, report)

    def _steps_left(self) -> int:
        left = self.epochs - self.epochs_done
        return 0 if left <= 0 else self.steps_left_in_epoch() + (left - 1) * self.steps_per_epoch

    def _step(self, batch: Any, step: int, total: int, ckpt: lastgood.Checkpointer, report: Report) -> None:
        seed_step(self.seed, step, self.ranks.rank)
        epoch = self.epochs_done + 1
        result = self.train(batch)
        if step % self.log_every == 0 or step == total:
            values = self.measured(result)
            ckpt.metrics["loss"] = next(iter(values.values()))
            report.losses(step, epoch, values)
        report.advance(step, f"epoch {epoch} of {self.epochs}")
        last = step == total
        if last:
            self.finish()
        if self.epochs_done == epoch and (last or epoch % self.save_every_epoch == 0):
            # The file before the checkpoint: a run that is killed between the two writes the same file again.
            if last or self.every_weights:
                self._write(epoch, step)
                if self.ranks.first:
                    self.show(report, step)
            if last:
                ckpt.metrics[_EPOCH] = epoch
            else:
                ckpt.save(step, metrics={**ckpt.metrics, _EPOCH: epoch})

    def _make_weights_folder(self) -> None:
        if self.ranks.first:
            try:
                self.weights.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SovitsError(f"the folder for weights cannot be made: {error}") from error

    def _import_source(self) -> str:
        return "" if self.options.import_from is None else str(self.options.import_from.resolve())

    def _check_import(self) -> None:
        source = self._import_source()
        if source and source == self.notes.imported:
            logger.info("%s was imported before: this run goes on from its own checkpoint", source)
        elif source:
            raise SovitsError(
                f"{self.logs / 'lastgood'} already has checkpoints, so --import would mix two runs: leave it out to "
                "continue this one, or move that folder away to begin with the imported one"
            )

    def _check_clips(self) -> None:
        """Raises SovitsError where what came from the mirror was trained on other clips."""
        if self.notes.clips != self.fingerprint:
            raise SovitsError(
                f"the copies in {self.mirror} are of a training on other clips than those of this experiment: to begin "
                "anew, move that folder away or give another --mirror; to go on with that training on these clips, "
                f"copy what is in it to {self.logs / 'lastgood'}"
            )

    # -- weights --------------------------------------------------------------------------------------------------

    def _write(self, epoch: int, step: int) -> None:
        """Writes the weights file of the present state, and notes where that failed. Every rank calls it."""
        failed = self.ranks.first and not self._try_to_write(epoch, step)
        if self.ranks.sum(torch.tensor(float(failed), device=self.ranks.device)):
            self.notes.unwritten[epoch] = step
        else:
            self.notes.unwritten.pop(epoch, None)

    def _try_to_write(self, epoch: int, step: int) -> bool:
        path = self.weights_path(epoch, step)
        try:
            if path.exists():
                logger.info("%s is there already, from before; it is replaced", path)
            self.write_weights(path, epoch, step)
        except (SovitsError, lastgood.LastGoodError, OSError) as error:
            # A full disk must not cost the training; the exit code tells.
            self.unwritten[path] = str(error)
            logger.error("%s was not written: %s", path, error)
            return False
        self.written = path
        self.unwritten.pop(path, None)
        logger.info("weights of epoch %d: %s", epoch, path)
        return True

    def _write_what_is_missing(self, ckpt: lastgood.Checkpointer, step: int) -> None:
        """Writes the files that an earlier start could not write, of the epochs whose checkpoints are still there."""
        moved = False
        for epoch, at in sorted(self.notes.unwritten.items()):
            if at != step:
                path, missing = self.weights_path(epoch, at), self.notes.unwritten
                if not any((self.logs / "lastgood").glob(f"step-{at:08d}*/manifest.json")):
                    self.unwritten[path] = f"it failed before, and the checkpoint of step {at} is not kept any more"
                    continue
                moved = True
                try:
                    ckpt.restore(at)
                except lastgood.LastGoodError as error:
                    self.unwritten[path] = f"it failed before, and now its checkpoint cannot be read: {error}"
                    continue
                finally:
                    self.notes.unwritten = missing
            self._write(epoch, at)
        if moved:
            missing = self.notes.unwritten
            for module in self.objects().values():
                if isinstance(module, nn.Module):
                    module.zero_grad()  # Of an open window; the newest checkpoint may have none.
            ckpt.restore()
            self.notes.unwritten, self.notes.clips = missing, self.fingerprint

    def _write_again_if_missing(self, step: int) -> None:
        path = self.weights_path(self.epochs_done, step)
        if path.is_file():
            self.written = path
        elif path not in self.unwritten:
            self._try_to_write(self.epochs_done, step)

    def _conclude(self) -> int:
        if not self.ranks.first:
            return 0
        for path, reason in self.unwritten.items():
            print(f"Not written: {path}: {reason}")
        if self.written is not None:
            print(f"Weights: {self.written}", flush=True)
        return 1 if self.unwritten else 0


def switch_off_dropout(model: nn.Module) -> None:
    """Makes every dropout in `model` do nothing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "p_dropout"):
            setattr(module, "p_dropout", 0.0)  # noqa: B010  # a plain number, which a Module's type does not allow


def replace(path: Path, write: Any) -> None:
    """`lastgood.replace_file`, as the writers of weights take it. Raises SovitsError where `path` is a folder."""
    if path.is_dir():  # Found out before anything is written, for what cannot be put in place stays beside it.
        raise SovitsError("a folder has this name")
    lastgood.replace_file(path, write)
