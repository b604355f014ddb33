"""Which tensors change in optimizer steps only, and the hooks that hold a step back until they are copied.

Version counters do not show every change, so what is trusted is the hook: a tensor is steady when it belongs to a
registered optimizer whose step hook was seen to run since the last save. A loop that steps in some way that skips
hooks (a captured CUDA graph, a compiled step, another optimizer over the same weights) has no steady tensors, and
everything is copied at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

OVERLAP_BYTES = 256 << 10
"""Smaller tensors are copied at once: that takes no longer than to arrange for the copy."""


class Steady:
    """Watches the registered optimizers of one rank.

    Args:
        wait: returns when the tensors may change.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self._steps: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
        self._hooks: list[RemovableHandle] = []

    def watch(self, objects: Mapping[str, Any]) -> None:
        """Hook onto the optimizers that are not watched yet.

        Modules get no hook: it would travel with every copy and pickle of them.
        """
        for value in objects.values():
            # A wrapper that only looks like an optimizer has no hooks; what it wraps may be registered, too.
            if isinstance(value, torch.optim.Optimizer) and hasattr(value, "_optimizer_step_pre_hooks"):
                if value in self._steps:
                    continue
                self._steps[value] = 0
                self._hooks.append(value.register_step_pre_hook(self._before_step))
                self._hooks.append(value.register_load_state_dict_pre_hook(self._before_load))

    def close(self) -> None:
        """Take the hooks off again: an optimizer may live longer, and must not hold our memory."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._steps.clear()

    def look(self) -> tuple[frozenset[int], frozenset[int]]:
        """Addresses of storages that registered optimizers change; begins a new count of steps.

        Returns:
            Those that change in optimizer steps, whether one was seen or not; and those that were seen to change only
            in steps that our hook sees.
        """
        held: set[int] = set()
        steady: set[int] = set()
        for optimizer, steps in list(self._steps.items()):
            everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            states = [state for state in optimizer.state.values() if isinstance(state, dict)]
            trained = _storages(p for p in everything if p.requires_grad or p in optimizer.state)
            trained |= _storages(t for state in states for t in state.values() if isinstance(t, torch.Tensor))
            held |= trained
            if steps and not any(group.get("capturable") for group in optimizer.param_groups):
                steady |= trained | _storages(everything)
            self._steps[optimizer] = 0
        return frozenset(held), frozenset(steady)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        self._wait()

    def _before_load(self, *_: Any) -> None:
        self._wait()


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {
        t.untyped_storage().data_ptr() for t in tensors if t.nbytes >= OVERLAP_BYTES and type(t).__name__ != "DTensor"
    }
