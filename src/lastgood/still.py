"""Which tensors do not change from save to save: what :mod:`lastgood.frozen` writes to a file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lastgood.placement import LocalTensor, Placement
from lastgood.snapshot import sample
from lastgood.steady import OVERLAP_BYTES

_CALM = 3
"""Saves for which a tensor that changed must stand still, before it counts as frozen again."""


class Still:
    """Finds, in the training thread and at little cost, the tensors that have not changed since the last save."""

    def __init__(self) -> None:
        self._signs: dict[str, tuple[int, int, bytes]] = {}
        self._calm: dict[str, int] = {}
        """Saves since a tensor was last seen to change; one that never was has the benefit of the doubt."""

    def take(
        self, tensors: Mapping[str, LocalTensor], held: frozenset[int], announced: Sequence[str] | None
    ) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the tensors that count as frozen, and of those among them that were there at the last save.

        Whether the second really are what they were is for their checksum to say.

        Args:
            held: addresses of the storages that registered optimizers change.
            announced: what rank 0 took for frozen at its last save; None on rank 0, and where it said nothing yet.
        """
        names, unchanged = set(), set()
        signs: dict[str, tuple[int, int, bytes]] = {}
        for name, part in tensors.items():
            tensor = part.tensor
            if (
                tensor.nbytes < OVERLAP_BYTES
                or part.placement in (Placement.SHARDED, Placement.LOCAL)
                or tensor.untyped_storage().data_ptr() in held
                or not tensor.is_contiguous()
            ):
                continue
            sign = (
                tensor.data_ptr(),
                tensor._version,
                sample(tensor.data_ptr(), tensor.nbytes) if tensor.is_cpu else b"",
            )
            known = self._signs.get(name)
            signs[name] = sign
            calm = 0 if known is not None and known != sign else self._calm.get(name, _CALM) + 1
            self._calm[name] = calm
            if calm >= _CALM:  # An average of the weights, for example, never is.
                names.add(name)
                if known is not None:
                    unchanged.add(name)
        self._signs = signs
        if announced is not None:
            names &= set(announced)
        return frozenset(names), frozenset(unchanged & names)
