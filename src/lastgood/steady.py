"""Which tensors change in optimizer steps only, and the hooks that hold a step back until they are copied.

Version counters do not show every change, so what is trusted is the hook: a tensor is steady when it belongs to a
registered optimizer whose step hook was seen to run since the last save. A loop that steps in some way that skips
hooks (a captured CUDA graph, a compiled step, another optimizer over the same weights) has no steady tensors, and
everything is copied at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from lastgood.composed import plain_parts

OVERLAP_BYTES = 32 << 10
"""Smaller tensors are copied at once: that takes no longer than to arrange for the copy."""
_TENSORS = {torch.Tensor, torch.nn.Parameter}
_REQUIRES_GRAD = attrgetter("requires_grad")
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
        self._found: tuple[object, object, tuple[frozenset[int], frozenset[int]]] = None, None, (frozenset(),) * 2
        """What was found last, for which places of the tensors, and what else it followed from."""

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

    @property
    def watched(self) -> list[torch.optim.Optimizer]:
        return list(self._steps)

    def close(self) -> None:
        """Take the hooks off again: an optimizer may live longer, and must not hold our memory."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._steps.clear()
        self._found = None, None, (frozenset(),) * 2

    def look(self, places: object = None) -> tuple[frozenset[int], frozenset[int]]:
        """Addresses of storages that registered optimizers change; begins a new count of steps.

        Args:
            places: the same object as at the last look, if all tensors of the optimizers lie where they did. None: not
                known.

        Returns:
            Those that change in optimizer steps, whether one was seen or not; and those that were seen to change only
            in steps that our hook sees.
        """
        signs = []
        watched = list(self._steps.items())
        for optimizer, steps in watched:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            graphed = optimizer in self._graphed or any(group.get("capturable") for group in optimizer.param_groups)
            signs.append((id(optimizer), list(map(_REQUIRES_GRAD, parameters)), bool(steps) and not graphed))
            self._steps[optimizer] = 0
        if places is None or self._found[0] is not places or self._found[1] != signs:
            self._found = (
                places,
                signs,
                _look([(optimizer, *sign[1:]) for (optimizer, _), sign in zip(watched, signs, strict=True)]),
            )
        return self._found[2]

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if _captures():
            # Nothing is changed now, and what replays the graph will call no hook.
            self._graphed.add(optimizer)
            return
        self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        self._wait()

    def _before_load(self, *_: Any) -> None:
        self._wait()


def _look(watched: Iterable[tuple[torch.optim.Optimizer, list[bool], bool]]) -> tuple[frozenset[int], frozenset[int]]:
    """For each optimizer, which of its parameters it trains, and whether its steps are seen."""
    held: set[int] = set()
    steady: set[int] = set()
    for optimizer, trains, seen in watched:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = [state for state in optimizer.state.values() if isinstance(state, dict)]
        trained = [parameter for parameter, does in zip(parameters, trains, strict=True) if does]
        trained += [key for key in optimizer.state if isinstance(key, torch.Tensor)]
        trained += [t for state in states for t in state.values() if type(t) in _TENSORS or isinstance(t, torch.Tensor)]
        changing = _storages(trained)
        held |= changing
        if seen:
            steady |= changing | _storages(parameters)
    return frozenset(held), frozenset(steady)


def _captures() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    found = list(tensors)
    if not set(map(type, found)) <= _TENSORS:
        found = [part for t in found if type(t).__name__ != "DTensor" for part in plain_parts(t)]
    # Where the storage begins, without an object made for each.
    return {t.data_ptr() - int(t.storage_offset()) * t.element_size() for t in found if t.nbytes >= OVERLAP_BYTES}
