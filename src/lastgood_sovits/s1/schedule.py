"""The learning rate of stage 1."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from lastgood_sovits.errors import SovitsError


class LockedRate:
    """The first optimizer step of a run uses one learning rate and every later step another.

    GPT-SoVITS configures a warm-up and a cosine, then sets 0.002 over the result after every step; only the first step
    keeps the rate the optimizer was made with. The rate depends on the number of steps alone and is set again when the
    state is loaded, so it is the same whether the optimizer's or this state is loaded first.
    """

    def __init__(self, optimizer: Optimizer, *, first: float = 0.01, locked: float = 0.002) -> None:
        """`first` and `locked` are relative changes per step, as ScaledAdam means them."""
        if first <= 0 or locked <= 0:
            raise SovitsError(f"Learning rates must be positive; first is {first}, locked is {locked}.")
        self._optimizer = optimizer
        self._rates = (first, locked)
        self.steps = 0
        """Optimizer steps taken."""
        self._apply()

    @property
    def lr(self) -> float:
        """The rate that the next optimizer step uses."""
        return self._rates[min(self.steps, 1)]

    def step(self) -> None:
        """To be called after every optimizer step that was taken."""
        self.steps += 1
        self._apply()

    def _apply(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        self._apply()
