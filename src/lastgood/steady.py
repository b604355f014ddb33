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

from lastgood.composed import plain_parts

OVERLAP_BYTES = 32 << 10
"""Smaller tensors are copied at once: that takes no longer than to arrange for the copy."""
_TENSORS = {torch.Tensor, torch.nn.Parameter}
_HOOKS = "_optimizer_step_pre_hooks", "_optimizer_load_state_dict_pre_hooks"


class Steady:
    """Watches the registered optimizers of one rank.

    Args:
        wait: returns when the tensors may change.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self._steps: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()
        self._graphed: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        """Those whose step was captured into a CUDA graph."""
        self._hooks: list[RemovableHandle] = []

    def watch(self, objects: Mapping[str, Any]) -> None:
        """Hook onto the optimizers that are not watched yet.

        Modules get no hook: it would travel with every copy and pickle of them.
        """
        for value in objects.values():
            # A wrapper that only looks like an optimizer has no hooks, or some; what it wraps may be registered, too.
            if isinstance(value, torch.optim.Optimizer) and all(hasattr(value, hooks) for hooks in _HOOKS):
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
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            states = [state for state in optimizer.state.values() if isinstance(state, dict)]
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            trained += [key for key in optimizer.state if isinstance(key, torch.Tensor)]
            trained += [
                t for state in states for t in state.values() if type(t) in _TENSORS or isinstance(t, torch.Tensor)
            ]
            changing = _storages(trained)
            held |= changing
            graphed = optimizer in self._graphed or any(group.get("capturable") for group in optimizer.param_groups)
            if steps and not graphed:
                steady |= changing | _storages(p for p in parameters if not p.requires_grad)
            self._steps[optimizer] = 0
        return frozenset(held), frozenset(steady)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if _captures():
            # Nothing is changed now, and what replays the graph will call no hook.
            self._graphed.add(optimizer)
            return
        self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        self._wait()

    def _before_load(self, *_: Any) -> None:
        self._wait()


def _captures() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    # Where the storage begins, without an object made for each.
    found = list(tensors)
    if not set(map(type, found)) <= _TENSORS:
        found = [part for t in found if type(t).__name__ != "DTensor" for part in plain_parts(t)]
    return {t.data_ptr() - int(t.storage_offset()) * t.element_size() for t in found if t.nbytes >= OVERLAP_BYTES}
