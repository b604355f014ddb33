"""What people see of a training: the log and its file, the progress bar, TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from lastgood_sovits.train.ranks import Ranks

logger = logging.getLogger(__name__)
_LOGGERS = ("lastgood", "lastgood_sovits")
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


class Report:
    """Shows a training and writes it down; on the first rank only, but for the other ranks' warnings.

    Used in a ``with`` statement, which opens the log file and closes what was opened.

    Args:
        ranks: the processes.
        folder: where train.log and the folder ``tensorboard`` are written.
    """

    def __init__(self, ranks: Ranks, folder: Path) -> None:
        self._ranks, self._folder = ranks, folder
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._writer: Any = None
        self._handlers: list[logging.Handler] = []
        self._levels: dict[str, tuple[int, bool]] = {}

    def __enter__(self) -> Report:
        live = self._ranks.first and self._console.is_terminal
        shown: logging.Handler = (
            RichHandler(console=self._console, show_path=False) if live else logging.StreamHandler()
        )
        if not live:
            who = "" if self._ranks.first else f"rank {self._ranks.rank}: "
            shown.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s", "%H:%M:%S"))
        shown.setLevel(logging.INFO if self._ranks.first else logging.WARNING)
        self._handlers = [shown]
        if self._ranks.first:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(self._folder / "train.log", encoding="utf-8")
            file.setFormatter(logging.Formatter(_FORMAT))
            self._handlers.append(file)
        for name in _LOGGERS:
            log = logging.getLogger(name)
            self._levels[name] = (log.level, log.propagate)
            log.setLevel(logging.INFO)
            log.propagate = False
            for handler in self._handlers:
                log.addHandler(handler)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            self._writer.close()
        for name in _LOGGERS:
            log = logging.getLogger(name)
            for handler in self._handlers:
                log.removeHandler(handler)
            log.setLevel(self._levels[name][0])
            log.propagate = self._levels[name][1]
        for handler in self._handlers:
            handler.close()

    def begin(self, step: int, total: int) -> None:
        """Opens bar and TensorBoard, for a training that goes on from `step`."""
        if not self._ranks.first:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step)
        except ImportError:
            logger.warning("tensorboard is not installed, so nothing is written for it: pip install 'lastgood[sovits]'")
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task("", total=total, completed=step)
            self._bar.start()

    def advance(self, step: int, text: str) -> None:
        """Moves the bar to `step`."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)

    def losses(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """One log line, and a scalar for each value."""
        if not self._ranks.first:
            return
        logger.info("epoch %d, step %d: %s", epoch, step, ", ".join(f"{k} {v:.7g}" for k, v in values.items()))
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"train/{name}", value, step)

    def mel(self, step: int, name: str, mel: Tensor) -> None:
        """A mel spectrogram (bands, frames) as a picture: low bands at the bottom, loud is bright."""
        if self._writer is not None:
            grey = mel.detach().float().cpu().flip(0)
            span = (grey.max() - grey.min()).clamp(min=1e-6)
            self._picture(self._writer.add_image, f"mel/{name}", ((grey - grey.min()) / span).unsqueeze(0), step)

    def sound(self, step: int, name: str, wave: Tensor, sampling_rate: int) -> None:
        """A wave (n,) in -1 .. 1."""
        if self._writer is not None:
            clean = torch.nan_to_num(wave.detach().float().cpu()).clamp(-1, 1)
            self._picture(self._writer.add_audio, f"sound/{name}", clean.unsqueeze(0), step, sampling_rate)

    @staticmethod
    def _picture(write: Any, *arguments: Any) -> None:
        try:
            write(*arguments)
        except ImportError as error:  # Pillow, which tensorboard itself does not require
            logger.warning("a picture for TensorBoard was left out: %s", error)
