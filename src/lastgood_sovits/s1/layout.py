"""Where the tokens of a batch lie, and who attends to whom.

A clip is its phones followed by its codes. Phones attend to all phones of the clip; a code attends to all phones, to
itself and to the codes before it. Two layouts compute this:

`PackedLayout` keeps the real tokens only, clip after clip, so that no linear layer, norm or dropout ever sees padding.
`PaddedLayout` keeps every position of the padded batch and masks keys; it reproduces upstream's padded batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Layout(Protocol):
    """The order of tokens in an (N, D) activation, and its attention."""

    phone_index: Tensor
    """(P,) rows of the flattened (B*X) phones that are used, in order."""
    code_index: Tensor
    """(C,) rows of the flattened (B*Y) input codes that are used, in order."""
    phone_position: Tensor
    """(P,) position of each phone in its clip."""
    code_position: Tensor
    """(C,) position of each code in its clip."""
    order: Tensor
    """(N,) rows of [phones; codes] in the order of the activation, N = P + C."""
    predict_at: Tensor
    """(T,) rows of the activation whose outputs predict a code."""
    target_index: Tensor
    """(T,) rows of the flattened (B, Y+1) targets that they predict."""
    target_counts: tuple[int, ...]
    """Targets of each clip, one clip after the other; T in all."""

    def attend(self, qkv: Tensor, heads: int, dropout: float) -> Tensor:
        """Attention of (N, 3*D) projections, with `dropout` on the attention weights; returns (N, D)."""
        ...


def _ranges(starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The integers start, start+1, ... of every range, one range after the other."""
    return torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])


def _clip_mask(phones: int, codes: int) -> Tensor:
    """(X+Y, X+Y) bool: True where the row's token attends to the column's."""
    mask = torch.ones(phones + codes, phones + codes, dtype=torch.bool).tril()
    mask[:, :phones] = True
    return mask


def _additive(mask: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`mask` as 0 and -inf. Made once for all layers: attention would convert a bool mask in every one of them."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf")).to(device, non_blocking=True)


def _attends_per_clip(device: torch.device) -> bool:
    """Where a kernel launch costs next to nothing."""
    return device.type == "cpu"


class PackedLayout:
    """Real tokens only: phones and codes of clip 0, then of clip 1, and so on.

    On the CPU each clip attends on its own, in two unpadded blocks. On other devices a kernel launch costs
    more than padding, so the projections are spread into a padded (B, L) grid for the attention alone, with one mask
    for all heads.
    """

    def __init__(
        self,
        phone_lengths: Sequence[int],
        code_lengths: Sequence[int],
        *,
        widths: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`widths` are X and Y of the padded tensors; `dtype` is that of the attention's inputs."""
        clips = len(phone_lengths)
        x_width, y_width = widths
        phones, codes = list(phone_lengths), list(code_lengths)
        totals = [x + y for x, y in zip(phones, codes, strict=True)]
        starts = [sum(totals[:b]) for b in range(clips)]
        phone_starts = [sum(phones[:b]) for b in range(clips)]
        code_starts = [sum(phones) + sum(codes[:b]) for b in range(clips)]
        targets = [y + 1 for y in codes]  # every code, and the end

        def put(index: Tensor) -> Tensor:
            return index.to(device, non_blocking=True)

        self.phone_index = put(_ranges([b * x_width for b in range(clips)], phones))
        self.code_index = put(_ranges([b * y_width for b in range(clips)], codes))
        self.phone_position = put(_ranges([0] * clips, phones))
        self.code_position = put(_ranges([0] * clips, codes))
        interleaved = [s for pair in zip(phone_starts, code_starts, strict=True) for s in pair]
        self.order = put(_ranges(interleaved, [n for pair in zip(phones, codes, strict=True) for n in pair]))
        self.predict_at = put(_ranges([s + x - 1 for s, x in zip(starts, phones, strict=True)], targets))
        self.target_index = put(_ranges([b * (y_width + 1) for b in range(clips)], targets))
        self.target_counts = tuple(targets)
        self._phones, self._totals = phones, totals
        self._per_clip = _attends_per_clip(device)
        if self._per_clip:
            self._masks = [_additive(_clip_mask(x, y)[x:], device, dtype) for x, y in zip(phones, codes, strict=True)]
        else:
            # Fused attention kernels want rows of the mask aligned to 16 bytes.
            self._grid = (clips, -(-max(totals) // 8) * 8)
            length = self._grid[1]
            mask = torch.zeros(clips, 1, length, length, dtype=torch.bool)
            mask[..., 0] = True  # rows of padding attend to something, or their softmax is nan
            for b, (x, y) in enumerate(zip(phones, codes, strict=True)):
                mask[b, 0, : x + y, : x + y] = _clip_mask(x, y)
            self._mask = _additive(mask, device, dtype)
            self._cells = put(_ranges([b * length for b in range(clips)], totals))

    def attend(self, qkv: Tensor, heads: int, dropout: float) -> Tensor:
        return self._attend_per_clip(qkv, heads, dropout) if self._per_clip else self._attend_grid(qkv, heads, dropout)

    def _attend_per_clip(self, qkv: Tensor, heads: int, dropout: float) -> Tensor:
        width = qkv.shape[1] // 3
        outputs: list[Tensor] = []
        for clip, phones, mask in zip(torch.split(qkv, self._totals), self._phones, self._masks, strict=True):
            q, k, v = clip.view(1, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            text = F.scaled_dot_product_attention(
                q[:, :, :phones], k[:, :, :phones], v[:, :, :phones], dropout_p=dropout
            )
            code = F.scaled_dot_product_attention(q[:, :, phones:], k, v, attn_mask=mask, dropout_p=dropout)
            outputs.append(torch.cat([text, code], dim=2).transpose(1, 2).reshape(-1, width))
        return torch.cat(outputs)

    def _attend_grid(self, qkv: Tensor, heads: int, dropout: float) -> Tensor:
        clips, length = self._grid
        width = qkv.shape[1] // 3
        grid = qkv.new_zeros(clips * length, 3 * width).index_copy(0, self._cells, qkv)
        q, k, v = grid.view(clips, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask.to(q.dtype), dropout_p=dropout)
        return out.transpose(1, 2).reshape(clips * length, width).index_select(0, self._cells)


class PaddedLayout:
    """Every position of the padded batch, masked as upstream masks it.

    Upstream pads phones on the right but masks as many keys on the left, predicts the first code from position X-1 of
    every clip, and counts the end code at every padded position as a target. For a clip shorter than the longest this
    hides its first phones and teaches it to answer the end code with more of them.
    """

    def __init__(
        self,
        phone_lengths: Sequence[int],
        code_lengths: Sequence[int],
        *,
        widths: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        clips = len(phone_lengths)
        x, y = widths
        self.phone_index = torch.arange(clips * x, device=device)
        self.code_index = torch.arange(clips * y, device=device)
        self.phone_position = torch.arange(x, device=device).repeat(clips)
        self.code_position = torch.arange(y, device=device).repeat(clips)
        rows = torch.cat(
            [torch.arange(clips * x).view(clips, x), clips * x + torch.arange(clips * y).view(clips, y)], dim=1
        )
        self.order = rows.flatten().to(device)
        self.predict_at = _ranges([b * (x + y) + x - 1 for b in range(clips)], [y + 1] * clips).to(device)
        self.target_index = torch.arange(clips * (y + 1), device=device)
        self.target_counts = (y + 1,) * clips
        keys = torch.ones(clips, x + y, dtype=torch.bool)
        for b, (phones, codes) in enumerate(zip(phone_lengths, code_lengths, strict=True)):
            keys[b, : x - phones] = False
            keys[b, x + codes :] = False
        mask = _clip_mask(x, y) & keys[:, None, None, :]
        self._mask = _additive(mask, device, dtype)
        self._grid = (clips, x + y)

    def attend(self, qkv: Tensor, heads: int, dropout: float) -> Tensor:
        width = qkv.shape[1] // 3
        q, k, v = qkv.view(*self._grid, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask.to(q.dtype), dropout_p=dropout)
        return out.transpose(1, 2).reshape(-1, width)
