"""Lightning: a callback that saves and restores the whole training, and safe ``.ckpt`` files.

::

    trainer = Trainer(..., callbacks=[LastGood("runs/voice", every_n_steps=500)])
    trainer.fit(model, data)        # a new run starts, an interrupted one goes on from its last good checkpoint

Data position is Lightning's: the end of an epoch is exact with any loader; in the middle of one, Lightning begins its
batches anew unless the loader has ``state_dict`` and ``load_state_dict`` (torchdata's ``StatefulDataLoader`` has).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint

from lastgood import Checkpointer, disk, files, random_state, torchfile
from lastgood.errors import DamagedError, LastGoodError
from lastgood.handle import SaveHandle
from lastgood.retain import Keep

__all__ = ["LastGood", "LastGoodCheckpointIO"]

_log = logging.getLogger("lastgood")
_UNSUPPORTED = {"FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy"}
_SUFFIXES = (".ckpt", ".pt", ".pth")


class LastGood(Checkpoint):
    """Saves every so many optimizer steps, and restores the last good checkpoint when ``fit`` starts.

    Saved and restored: the module, optimizers, schedulers, loops and their progress (a stateful loader's position
    too), the precision plugin (the scaler), the states of the other callbacks and of the data module, what the module's
    ``on_save_checkpoint`` adds, and every rank's random states. Lightning adds no ModelCheckpoint of its own beside it.
    On SIGTERM Lightning ends the training without a save; the next ``fit`` goes on from the last one.

    Args:
        run: the run directory; all ranks must see the same one.
        every_n_steps: optimizer steps between two saves. The end of the training is saved too.
        keep: which checkpoints are kept; metrics are the trainer's logged ones (``trainer.callback_metrics``).
        strict: False loads what fits and reports the rest in the log.
        options: any other argument of :class:`lastgood.Checkpointer`.

    Raises (when ``fit`` starts):
        LastGoodError: the strategy is not supported, or a ``ckpt_path`` was given for a run that has checkpoints.
    """

    def __init__(
        self,
        run: str | os.PathLike[str],
        every_n_steps: int,
        *,
        keep: Keep | None = None,
        strict: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if type(every_n_steps) is not int or every_n_steps < 1:
            raise LastGoodError(f"LastGood(every_n_steps={every_n_steps!r}): it is a number of steps, at least 1")
        self._run, self._every, self._keep, self._strict = Path(run), every_n_steps, keep, strict
        self._options = options
        self._random: Any = None
        self._reached = 0
        self._handle: SaveHandle | None = None
        """Of the last save of this ``fit``."""
        self.checkpointer: Checkpointer | None = None
        """The one in use, while ``fit`` runs."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = type(trainer.strategy).__name__
        if strategy in _UNSUPPORTED:
            raise LastGoodError(
                f"{strategy} hides the parameters from a save. Use DDPStrategy, or ModelParallelStrategy with FSDP2."
            )
        self._handle = None
        self.checkpointer = Checkpointer(
            self._run,
            keep=self._keep,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            **self._options,
            **_objects(trainer, pl_module),
        )
        from_file = getattr(trainer, "ckpt_path", None)
        if from_file:
            # Lightning loads a part of it after this hook: the state would be of two moments.
            if any(name.startswith("step-") for name in disk.names(self._run)):
                raise LastGoodError(
                    f"fit(ckpt_path={from_file!r}), but {self._run} has checkpoints to go on from. Leave ckpt_path "
                    "out, or give LastGood a new run directory."
                )
            return
        self._reached = self.checkpointer.restore(strict=self._strict)
        if self._reached:
            self._random = random_state.capture()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._random is not None:
            # The loader's iterators that fit() made since have drawn seeds.
            random_state.apply(self._random)
            loop = trainer.fit_loop
            if loop.epoch_loop.batch_progress.is_last_batch and loop._data_fetcher is not None:
                # An uninterrupted training makes one here, for the new epoch; after a restart Lightning does not.
                iter(loop._data_fetcher)
        self._random = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not a remainder: with several optimizers one batch is several steps.
        if trainer.global_step // self._every > self._reached // self._every:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # With busy="skip", the save of this very step may have been left out: no rank knows before its fate is decided.
        left_out = self._handle is not None and self._handle.wait() and self._handle.state == "skipped"
        if left_out or trainer.global_step > self._reached:
            self._save(trainer, last=True)

    def _save(self, trainer: Trainer, last: bool = False) -> None:
        assert self.checkpointer is not None
        self._reached = trainer.global_step
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        self._handle = self.checkpointer.save(self._reached, metrics=values, blocking=last)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait for the last save; raises SaveError where it failed."""
        if self.checkpointer is not None:
            checkpointer, self.checkpointer = self.checkpointer, None
            checkpointer.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.checkpointer is not None:
            checkpointer, self.checkpointer = self.checkpointer, None
            checkpointer.__exit__(type(exception), exception, exception.__traceback__)


def _objects(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """What the state consists of, by name."""
    wrapped = trainer.strategy.model
    objects: dict[str, Any] = {"model": module if wrapped is None else wrapped}
    objects |= {f"optimizer{i}": optimizer for i, optimizer in enumerate(trainer.optimizers)}
    objects |= {f"scheduler{i}": config.scheduler for i, config in enumerate(trainer.lr_scheduler_configs)}
    objects["loops"] = trainer.fit_loop
    objects["precision"] = trainer.precision_plugin
    objects["callbacks"] = _Callbacks(trainer)
    objects["module_extra"] = _ModuleExtra(trainer, module)
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None:
        objects["datamodule"] = datamodule
    return objects


class _Callbacks:
    """The states of the trainer's callbacks, by their keys."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def _stateful(self) -> dict[str, Any]:
        callbacks: list[Callback] = getattr(self._trainer, "callbacks")  # noqa: B009 - set by a connector, undeclared
        return {c.state_key: c for c in callbacks if not isinstance(c, LastGood)}

    def state_dict(self) -> dict[str, Any]:
        return {key: state for key, callback in self._stateful().items() if (state := callback.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        callbacks = self._stateful()
        for key, saved in state.items():
            if key in callbacks:
                callbacks[key].load_state_dict(saved)
            else:
                _log.warning("the checkpoint has the state of a callback that this trainer has not: %s", key)


class _ModuleExtra:
    """What ``on_save_checkpoint`` of the module adds to a checkpoint."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module

    def _frame(self) -> dict[str, Any]:
        trainer = self._trainer
        step, epoch = trainer.global_step, trainer.current_epoch
        return {"epoch": epoch, "global_step": step, "state_dict": self._module.state_dict()}

    def _overridden(self, hook: str) -> bool:
        return getattr(type(self._module), hook) is not getattr(LightningModule, hook)

    def state_dict(self) -> dict[str, Any]:
        if not self._overridden("on_save_checkpoint"):
            return {}
        frame = self._frame()
        known = set(frame)
        self._module.on_save_checkpoint(frame)
        return {key: value for key, value in frame.items() if key not in known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._overridden("on_load_checkpoint"):
            self._module.on_load_checkpoint({**self._frame(), **state})


class LastGoodCheckpointIO(CheckpointIO):
    """Lightning's own ``.ckpt`` files, written whole or not at all, and checked before they are read.

    ``Trainer(plugins=[LastGoodCheckpointIO()])``. The files are ordinary ones of ``torch.save``.

    Args:
        allow: classes that a file may name, beyond tensors and plain containers; nothing else in it is executed.
    """

    def __init__(self, *, allow: Iterable[Any] = ()) -> None:
        self._allow = tuple(allow)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Raises SaveError where the file could not be written; the one of that name before is then unchanged."""
        if storage_options is not None:
            raise LastGoodError("LastGoodCheckpointIO takes no storage_options: it writes to local file systems")
        target = _local(path)
        disk.make_dirs(target.parent)
        files.save(checkpoint, target, rank=0)  # Lightning calls this on the one rank that writes.

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Check every byte, then load.

        Args:
            path: the file.
            map_location: device; a function or a dict means the CPU, from where Lightning moves the tensors.
            weights_only: False trusts the file and runs what it names, as ``torch.load`` does, once it is known whole.

        Raises:
            FileNotFoundError: there is no such file.
            DamagedError: the file is short or altered; the message names the newest intact file beside it.
            RefusedError: reading it would run code from it.
        """
        source = _local(path)
        if not disk.exists(source):
            raise FileNotFoundError(f"{source}: there is no such checkpoint file")
        damage = torchfile.verify(source)
        if damage:
            intact = _newest_intact(source)
            hint = f"The newest intact file beside it is {intact}." if intact else "No file beside it is intact."
            raise DamagedError(f"{source} is damaged: {'; '.join(damage)}. {hint}")
        device = map_location if isinstance(map_location, str | torch.device) else "cpu"
        if weights_only is False:
            with disk.open_read(source) as file:
                loaded = torch.load(file, map_location=device, weights_only=False)
        else:
            loaded = torchfile.read(source, map_location=device, allow=self._allow)
        return dict(loaded)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        disk.remove(_local(path), missing_ok=True)


def _local(path: str | os.PathLike[str]) -> Path:
    if "://" in os.fspath(path):
        raise LastGoodError(f"{path}: LastGoodCheckpointIO reads and writes local file systems only")
    return Path(path)


def _newest_intact(damaged: Path) -> Path | None:
    """The newest whole file beside a damaged one."""
    beside = [damaged.with_name(name) for name in disk.names(damaged.parent) if name.endswith(_SUFFIXES)]
    others = [path for path in beside if path != damaged and path.is_file()]
    newest_first = sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
    return next((path for path in newest_first if not torchfile.verify(path)), None)
