"""One training step of stage 1: forward, backward into the window, and the optimizer step when the window is full."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.s1.batch import Batch
from lastgood_sovits.s1.config import Precision
from lastgood_sovits.s1.model import Losses, Text2Semantic
from lastgood_sovits.s1.scaled_adam import ScaledAdam
from lastgood_sovits.s1.schedule import LockedRate

logger = logging.getLogger(__name__)


def make_optimizer(model: Text2Semantic) -> ScaledAdam:
    """The optimizer of stage 1, with upstream's settings; its state has the layout of upstream's checkpoints."""
    return ScaledAdam(
        model.model.parameters(), lr=0.01, betas=(0.9, 0.95), clipping_scale=2.0, clipping_update_period=1000
    )


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one micro-batch did."""

    losses: Losses
    """Of this rank's micro-batch."""
    lr: float
    """The rate that this window's optimizer step uses."""
    window_ended: bool
    """Whether this micro-batch filled the window."""
    stepped: bool
    """Whether the parameters were changed; a full window that is not finite changes nothing."""
    grad_norm: float | None
    """Norm of the whole gradient, before the optimizer's own scaling; None while the window is open."""


class TrainStep:
    """Trains a `Text2Semantic` (or DistributedDataParallel around one), micro-batch by micro-batch.

    The parameters change after every `window` micro-batches, counted over the whole run: a window that is open at the
    end of an epoch goes on in the next, so every optimizer step sums the gradients of exactly as many micro-batches.
    Upstream counts within the epoch and takes five for the first step of each; what is left over reaches the next epoch
    too, except after a resume, which loses it. No weights depend on which clips share a step, so upstream's way is not
    offered. The sum is not divided: ScaledAdam's steps do not depend on the size of the gradient.

    To resume exactly in an open window, save `state_dict()` and the parameters' gradients. Before the last export,
    `flush` puts an open window to use.

    A window with a loss that is not finite is thrown away whole, by all ranks alike, and logged with the names of the
    clips; after `max_skips` of them in a row SovitsError is raised. Under "16-mixed", gradients that overflow skip the
    step too while the scale adapts.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LockedRate,
        *,
        window: int = 4,
        precision: Precision = "32",
        local_gradients: bool = True,
        max_skips: int = 25,
    ) -> None:
        """
        `precision`: "16-mixed" and "bf16-mixed" use autocast; "16-mixed" needs CUDA and is "32" elsewhere.
        `local_gradients`: ranks exchange gradients once per window. Their sums then differ between ranks while a window
        is open; False exchanges them after every micro-batch, so that any number of ranks can resume in mid-window.

        Raises SovitsError when `window` is not positive.
        """
        if window < 1:
            raise SovitsError(f"An accumulation window of {window} micro-batches is impossible; use 1 or more.")
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        if not isinstance(inner, Text2Semantic):
            raise SovitsError(f"Stage 1 trains a Text2Semantic, not a {type(inner).__name__}.")
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.window = window
        self.micro_batches = 0
        """Micro-batches seen by this rank in the whole run."""
        self.position = 0
        """Micro-batches in the open window."""
        self.skips = 0
        """Windows thrown away in a row."""
        self.gradient_factor = 1.0
        """What the gradients of a restored open window are to be multiplied with; see `load_state_dict`."""
        self._max_skips = max_skips
        self._local_gradients = local_gradients
        self.device = inner.model.bert_proj.weight.device
        if precision == "16-mixed" and self.device.type != "cuda":
            logger.info("16-mixed needs CUDA; training in float32 on %s", self.device)
            precision = "32"
        self._autocast_dtype = {"32": None, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}[precision]
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "16-mixed")
        self._seen: list[tuple[Tensor, tuple[str, ...]]] = []

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps taken in the whole run."""
        return self.schedule.steps

    def __call__(self, batch: Batch) -> StepResult:
        """Trains on one micro-batch, on any device. Raises SovitsError after too many skips in a row."""
        self._check_open_window()
        last = self.position + 1 == self.window
        self.model.train()
        with self._gradient_exchange(last):
            with self._autocast():
                losses: Losses = self.model(batch.to(self.device))
            self._scaler.scale(losses.total).backward()  # type: ignore[no-untyped-call]
        self._seen.append((losses.total.detach(), batch.names))
        self.micro_batches += 1
        self.position += 1
        lr = self.schedule.lr
        norm, stepped = self._end_window() if last else (None, False)
        return StepResult(losses=losses, lr=lr, window_ended=last, stepped=stepped, grad_norm=norm)

    def flush(self) -> bool:
        """Ends an open window early, at the end of training; True when the parameters were changed.

        All ranks must call it, as they are all at the same position.
        """
        self._check_open_window()
        if self.position == 0:
            return False
        if isinstance(self.model, DistributedDataParallel) and self._local_gradients:
            group = self.model.process_group
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=group)
                    parameter.grad.div_(dist.get_world_size(group))
        return self._end_window()[1]

    def _end_window(self) -> tuple[float, bool]:
        self._scaler.unscale_(self.optimizer)
        # An infinite limit clips nothing; what is wanted is the norm.
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), float("inf"))
        losses_finite = self._losses_finite()
        finite = losses_finite and bool(norm.isfinite())
        if finite:
            self._scaler.step(self.optimizer)
            self.schedule.step()
            self.skips = 0
        if self._scaler.is_enabled():
            self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        names = [" ".join(names) for loss, names in self._seen if not loss.isfinite()] if not losses_finite else []
        self._seen.clear()
        self.position = 0
        if not finite:
            self._skipped(losses_finite, names)
        return float(norm), finite

    def _losses_finite(self) -> bool:
        """Whether the losses of this window are finite on all ranks; every rank gets the same answer."""
        # Losses from before a resume are not known here; theirs would show in the restored gradients.
        flags = [loss.isfinite() for loss, _ in self._seen] or [torch.ones((), device=self.device)]
        finite = torch.stack(flags).all().float()
        if isinstance(self.model, DistributedDataParallel):
            dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=self.model.process_group)
        return bool(finite)

    def _skipped(self, losses_finite: bool, names: list[str]) -> None:
        self.skips += 1
        if losses_finite and self._scaler.is_enabled():
            logger.info("Gradients overflowed; the loss scale is now %g.", self._scaler.get_scale())
        else:
            logger.warning(
                "%s not finite up to micro-batch %d; its window is thrown away.%s",
                "The gradients are" if losses_finite else "A loss is",
                self.micro_batches,
                f" Clips: {'; '.join(names)}" if any(names) else "",
            )
        if self.skips >= self._max_skips:
            raise SovitsError(
                f"{self.skips} windows in a row were not finite, so training stopped; the parameters are those from "
                "before. Go back to an earlier checkpoint, or look at the clips that the log names."
            )

    def _gradient_exchange(self, last: bool) -> AbstractContextManager[None]:
        if last or not self._local_gradients or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast_dtype)

    def state_dict(self) -> dict[str, Any]:
        """Position in the window, counters and loss scale; the same on every rank. Gradients are not part of it."""
        return {
            "position": self.position,
            "micro_batches": self.micro_batches,
            "skips": self.skips,
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Gradients may be restored before or after. If there are none when training goes on, the open window starts
        again. They hold the loss scale of the run that computed them: where this one has another, because its precision
        is another, `gradient_factor` says by how much.
        """
        self.position = int(state["position"])
        self.micro_batches = int(state["micro_batches"])
        self.skips = int(state["skips"])
        if state["scaler"] and self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        scale_before = float(state["scaler"]["scale"]) if state["scaler"] else 1.0
        self.gradient_factor = self._scaler.get_scale() / scale_before
        self._seen.clear()

    def _check_open_window(self) -> None:
        if self.position and not self._seen and all(p.grad is None for p in self.model.parameters()):
            logger.warning(
                "The gradients of %d micro-batches of an open window were not restored; the window starts again.",
                self.position,
            )
            self.position = 0
