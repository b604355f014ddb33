"""Semantic codes from text: autoregressive decoding with cached keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lastgood_sovits.s1.model import Decoder

MIN_CODES = 11
"""The end is barred from the first 11 codes (0.44 s): shorter answers are failures."""


@torch.no_grad()
def generate(
    decoder: Decoder,
    phones: Sequence[Tensor],
    bert: Sequence[Tensor],
    prompt: Tensor,
    *,
    max_codes: int,
    top_k: int | None = 15,
    top_p: float = 1.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.35,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Codes that continue `prompt` for each of B texts.

    `phones`: B tensors (x,) int64; `bert`: B tensors (1024, x); `prompt`: (B, P) int64 codes of the voice, P > 0.
    Decoding ends at the end code, which is not returned, or after `max_codes` new codes. `top_k=1` is greedy. A code
    that occurred before has its logit divided (if positive) or multiplied (if negative) by `repetition_penalty`.
    Returns B tensors (P + new,). The model should be in eval mode.
    """
    grid = _Grid(decoder, phones, bert, prompt)
    codes = prompt
    ended = torch.zeros(len(phones), dtype=torch.bool, device=prompt.device)
    lengths = torch.full_like(ended, prompt.shape[1] + max_codes, dtype=torch.long)
    logits = grid.start()
    for step in range(max_codes):
        if step < MIN_CODES:
            logits = logits[:, : decoder.eos]
        logits = _penalised(logits, codes, repetition_penalty)
        chosen = _sample(logits, top_k, top_p, temperature, generator)
        ends = (chosen == decoder.eos) | (logits.argmax(dim=1) == decoder.eos)
        lengths = torch.where(ends & ~ended, codes.shape[1], lengths)
        ended = ended | ends
        codes = torch.cat([codes, chosen[:, None]], dim=1)
        if ended.all() or step + 1 == max_codes:
            break
        logits = grid.next(chosen)
    return [row[:length] for row, length in zip(codes, lengths.tolist(), strict=True)]


class _Grid:
    """The padded (B, X + P + ...) tokens of a decoding, with the keys and values of every layer."""

    def __init__(self, decoder: Decoder, phones: Sequence[Tensor], bert: Sequence[Tensor], prompt: Tensor) -> None:
        self._decoder = decoder
        self._layers = decoder.h.stack()
        self._caches: list[tuple[Tensor, Tensor]] = []
        self._prompt = prompt
        self._position = prompt.shape[1]
        self._width = max(len(item) for item in phones)
        decoder.ar_text_position.prepare(self._width)
        embedded = [
            decoder.embed_phones(ids, features.T, torch.arange(len(ids), device=ids.device))
            for ids, features in zip(phones, bert, strict=True)
        ]
        self._text = torch.stack([F.pad(item, (0, 0, 0, self._width - len(item))) for item in embedded])
        lengths = torch.tensor([len(item) for item in phones], device=prompt.device)
        self._real_phones = torch.arange(self._width, device=prompt.device)[None] < lengths[:, None]

    def start(self) -> Tensor:
        """Logits (B, vocab_size) after text and prompt."""
        length = self._position
        self._decoder.ar_audio_position.prepare(length)
        position = torch.arange(length, device=self._prompt.device)
        tokens = torch.cat([self._text, self._decoder.embed_codes(self._prompt, position)], dim=1)
        total = self._width + length
        mask = torch.ones(total, total, dtype=torch.bool, device=tokens.device).tril()
        mask[:, : self._width] = True
        keys = F.pad(self._real_phones, (0, length), value=True)
        return self._run(tokens, mask & keys[:, None, None, :])

    def next(self, codes: Tensor) -> Tensor:
        """Logits (B, vocab_size) after one more code for every text."""
        self._decoder.ar_audio_position.prepare(self._position + 1)
        position = torch.tensor([self._position], device=codes.device)
        tokens = self._decoder.embed_codes(codes[:, None], position)
        self._position += 1
        keys = F.pad(self._real_phones, (0, self._position), value=True)
        return self._run(tokens, keys[:, None, None, :])

    def _run(self, tokens: Tensor, mask: Tensor) -> Tensor:
        first = not self._caches
        for number, layer in enumerate(self._layers):
            batch, length, width = tokens.shape
            heads = layer.self_attn.heads
            qkv = layer.self_attn.project(tokens).view(batch, length, 3, heads, width // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            if first:
                self._caches.append((k, v))
            else:
                k, v = (torch.cat([old, new], dim=2) for old, new in zip(self._caches[number], (k, v), strict=True))
                self._caches[number] = (k, v)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            attended = layer.self_attn.out_proj(attended.transpose(1, 2).reshape(batch, length, width))
            tokens = layer.feed_forward(tokens, attended)
        logits: Tensor = self._decoder.ar_predict_layer(tokens[:, -1])
        return logits


def _penalised(logits: Tensor, codes: Tensor, penalty: float) -> Tensor:
    if penalty == 1.0:
        return logits
    seen = codes.clamp(max=logits.shape[1] - 1)  # a text that has ended may hold the end code where it is barred
    scores = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def _sample(
    logits: Tensor, top_k: int | None, top_p: float, temperature: float, generator: torch.Generator | None
) -> Tensor:
    """(B,) codes drawn from the `top_k` likeliest within the likeliest `top_p` of the mass."""
    if top_k == 1:
        return logits.argmax(dim=1)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=1, descending=True)
        outside = ordered.softmax(dim=1).cumsum(dim=1) > top_p
        outside[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), float("-inf"))
    logits = logits / max(temperature, 1e-5)
    if top_k is not None and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=1)[0][:, -1:], float("-inf"))
    return torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
