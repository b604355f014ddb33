"""One micro-batch of stage 1, and the corrupted sequences that the preference loss compares it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, kw_only=True)
class Codes:
    """Semantic codes of B sequences, padded on the right."""

    ids: Tensor
    """(B, Y) int64; what stands in the padding does not matter."""
    lengths: tuple[int, ...]
    """Real codes of each sequence. Kept on the host, so that no step waits for the device to learn a shape."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B clips, padded on the right to X phones and Y codes."""

    phones: Tensor
    """(B, X) int64 phone ids; padding 0."""
    phone_lengths: tuple[int, ...]
    """Real phones of each clip, on the host."""
    bert: Tensor
    """(B, 1024, X) float32 text features; zero in the padding and for clips without features."""
    codes: Codes
    """The semantic codes to be learnt, 25 a second."""
    rejected: Codes | None = None
    """Corrupted codes for the preference loss, or None without it."""
    names: tuple[str, ...] = ()
    """The clips' names, for messages."""

    def __len__(self) -> int:
        return len(self.phone_lengths)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which `to` copies without waiting; `DataLoader` calls this."""
        return self._with_tensors(torch.Tensor.pin_memory)

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            phones=change(self.phones),
            bert=change(self.bert),
            codes=replace(self.codes, ids=change(self.codes.ids)),
            rejected=None if self.rejected is None else replace(self.rejected, ids=change(self.rejected.ids)),
        )

    def with_rejected(self, generators: Sequence[torch.Generator], *, upstream_compat: bool = False) -> Batch:
        """The batch with a corrupted copy of every clip's codes.

        `generators`, one of each clip, are of the CPU, so the draws are the same on every device. With
        `upstream_compat` the padding counts as part of each sequence, as it does upstream; otherwise only real codes
        are repeated or deleted.
        """
        width = self.codes.ids.shape[1]
        lengths = (width,) * len(self) if upstream_compat else self.codes.lengths
        return replace(self, rejected=corrupt(self.codes.ids, lengths, generators))


def corrupt(ids: Tensor, lengths: Sequence[int], generators: Sequence[torch.Generator]) -> Codes:
    """Each sequence with one random span either repeated or deleted, drawn from the generator of its own.

    A fair coin chooses between the two; the span's ends are two uniform positions, sorted, so that it may be empty (the
    sequence is then its own rejected copy, which contributes no preference gradient). At least one code always remains.
    """
    changed: list[Tensor] = []
    for row, length, generator in zip(ids, lengths, generators, strict=True):
        delete = bool(torch.randint(0, 2, (1,), generator=generator).item())
        start, end = sorted(torch.randint(0, length, (2,), generator=generator).tolist())
        resume_at = end if delete else start
        changed.append(torch.cat([row[:end] if not delete else row[:start], row[resume_at:length]]))
    return Codes(ids=pad_sequence(changed, batch_first=True), lengths=tuple(len(row) for row in changed))
