"""Which tensors do not change from save to save: what :mod:`lastgood.frozen` writes to a file of its own."""

from __future__ import annotations

from collections.abc import Sequence

from lastgood.placement import Placement
from lastgood.state import State
from lastgood.watch import is_plain, sample, version

FROZEN_BYTES = 256 << 10
"""Smaller tensors are written with the others: that takes no longer than to find out that they are frozen."""
_CALM = 3
"""Saves for which a tensor that changed must stand still, before it counts as frozen again."""


class Still:
    """Finds, in the training thread and at little cost, the tensors that have not changed since the last save."""

    def __init__(self) -> None:
        self._signs: dict[str, tuple[int, int, bytes]] = {}
        self._calm: dict[str, int] = {}
        """Saves since a tensor was last seen to change; one that never was has the benefit of the doubt."""
        self._token: object = None
        self._large: list[str] = []
        """The tensors that can be frozen at all, of the state with that token."""
        self._free: tuple[object, object, list[str]] = None, None, []
        """Those of them that no optimizer changes, for which places of all tensors, and which held ones."""

    def take(
        self, state: State, held: frozenset[int], announced: Sequence[str] | None
    ) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the tensors that count as frozen, and of those among them that were there at the last save.

        Whether the second really are what they were is for their checksum to say.

        Args:
            held: addresses of the storages that registered optimizers change.
            announced: what rank 0 took for frozen at its last save; None on rank 0, and where it said nothing yet.
        """
        names, unchanged = set(), set()
        signs: dict[str, tuple[int, int, bytes]] = {}
        if state.token is None or state.token is not self._token:
            self._token = state.token
            self._large = [
                name
                for name, part in state.tensors.items()
                if part.tensor.nbytes >= FROZEN_BYTES and part.placement not in (Placement.SHARDED, Placement.LOCAL)
            ]
        sources, index = state.sources, state.index
        if state.places is None or self._free[0] is not state.places or self._free[1] is not held:
            free = [name for name in self._large if sources[index[name]].untyped_storage().data_ptr() not in held]
            self._free = state.places, held, free
        for name in self._free[2]:
            tensor = sources[index[name]]
            if not is_plain(tensor):
                continue
            sign = (
                tensor.data_ptr(),
                version(tensor),
                sample(tensor.data_ptr(), tensor.nbytes) if tensor.is_cpu else b"",
            )
            known = self._signs.get(name)
            signs[name] = sign
            calm = 0 if known is not None and known != sign else self._calm.get(name, _CALM) + 1
            self._calm[name] = calm
            if calm >= _CALM:  # An average of the weights, for example, never is.
                names.add(name)
                if known is not None and not tensor.is_inference():  # One made in inference mode counts no versions.
                    unchanged.add(name)
        self._signs = signs
        if announced is not None:
            names &= set(announced)
        return frozenset(names), frozenset(unchanged & names)
