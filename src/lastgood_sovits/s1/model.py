"""The stage 1 network: phones and text features to the next semantic code.

Names, shapes and order of the parameters are those of GPT-SoVITS checkpoints, `model.` prefix included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lastgood_sovits.s1.batch import Batch, Codes
from lastgood_sovits.s1.config import ModelConfig
from lastgood_sovits.s1.layout import Layout, PackedLayout, PaddedLayout

BERT_WIDTH = 1024
"""Width of the text features (chinese-roberta-wwm-ext-large)."""
DROPOUT = 0.1
"""Of positions and layers. Pretrained weights were trained with it; upstream has no setting for it either."""


class TokenEmbedding(nn.Module):
    """Rows of a table, with dropout."""

    def __init__(self, count: int, width: int, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(count, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.dropout(self.word_embeddings(ids))
        return rows


class SinePosition(nn.Module):
    """Adds `alpha` times the sine table of "Attention Is All You Need" (section 3.5) to each token, then dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.dropout = nn.Dropout(DROPOUT)
        # Not a buffer: DistributedDataParallel would send it to every rank in every forward.
        self._table = self._make_table(4000, width)

    @staticmethod
    def _make_table(length: int, width: int) -> Tensor:
        # In float32 whatever the model's dtype: that is the table that existing weights know.
        rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(10000.0) / width))
        angle = torch.arange(length, dtype=torch.float32).unsqueeze(1) * rate
        return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)

    def prepare(self, length: int) -> None:
        """Makes the table reach `length` positions at least, with the parameters' dtype and on their device."""
        rows, width = self._table.shape
        if rows < length or self._table.dtype != self.alpha.dtype or self._table.device != self.alpha.device:
            with torch.device("cpu"):
                table = self._make_table(max(rows, length), width)
            self._table = table.to(self.alpha)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """`tokens` (..., D) at `position` (...)."""
        placed: Tensor = self.dropout(tokens + self.alpha * self._table[position])
        return placed


class SelfAttention(nn.Module):
    """The projections around an attention; parameters are named as in `torch.nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(DROPOUT)  # of the attention weights; only its rate is used
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, tokens: Tensor) -> Tensor:
        """Queries, keys and values, one after the other in the last dimension."""
        return F.linear(tokens, self.in_proj_weight, self.in_proj_bias)

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        attended = layout.attend(self.project(tokens), self.heads, self.dropout.p if self.training else 0.0)
        out: Tensor = self.out_proj(attended)
        return out


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each followed by dropout, residual and norm (post-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, heads)
        self.linear1 = nn.Linear(width, 4 * width)
        self.linear2 = nn.Linear(4 * width, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(DROPOUT)

    def feed_forward(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention."""
        tokens = self.norm1(tokens + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(tokens)))
        out: Tensor = self.norm2(tokens + self.dropout(self.linear2(hidden)))
        return out

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        return self.feed_forward(tokens, self.self_attn(tokens, layout))


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))

    def stack(self) -> list[EncoderLayer]:
        """The layers, first to last."""
        return [layer for layer in self.layers if isinstance(layer, EncoderLayer)]

    def forward(self, tokens: Tensor, layout: Layout) -> Tensor:
        for layer in self.layers:
            tokens = layer(tokens, layout)
        return tokens


class Decoder(nn.Module):
    """Embeddings, encoder and prediction layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.eos = config.eos
        self.bert_proj = nn.Linear(BERT_WIDTH, width)
        self.ar_text_embedding = TokenEmbedding(config.phoneme_vocab_size, width, config.dropout)
        self.ar_text_position = SinePosition(width)
        self.ar_audio_embedding = TokenEmbedding(config.vocab_size, width, config.dropout)
        self.ar_audio_position = SinePosition(width)
        self.h = Encoder(width, config.head, config.n_layer)
        self.ar_predict_layer = nn.Linear(width, config.vocab_size, bias=False)

    def embed_phones(self, phones: Tensor, bert: Tensor, position: Tensor) -> Tensor:
        """(..., D) of phones (...), text features (..., 1024) and positions (...)."""
        placed: Tensor = self.ar_text_position(self.ar_text_embedding(phones) + self.bert_proj(bert), position)
        return placed

    def embed_codes(self, codes: Tensor, position: Tensor) -> Tensor:
        """(..., D) of codes (...) at positions (...)."""
        placed: Tensor = self.ar_audio_position(self.ar_audio_embedding(codes), position)
        return placed

    def forward(self, phones: Tensor, bert: Tensor, codes: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Outputs of the last layer (N, D) and logits (T, vocab_size), in the layout's order.

        `phones` (B, X), `bert` (B, 1024, X), input `codes` (B, Y). Logits are made only where a code is predicted.
        """
        self.ar_text_position.prepare(phones.shape[1])
        self.ar_audio_position.prepare(codes.shape[1])
        text = self.embed_phones(
            phones.flatten()[layout.phone_index],
            bert.transpose(1, 2).flatten(0, 1)[layout.phone_index],
            layout.phone_position,
        )
        audio = self.embed_codes(codes.flatten()[layout.code_index], layout.code_position)
        hidden = self.h(torch.cat([text, audio])[layout.order], layout)
        return hidden, self.ar_predict_layer(hidden[layout.predict_at])


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one pass over some sequences gives, per target; T targets in all, EOS included."""

    logits: Tensor
    """(T, vocab_size)."""
    targets: Tensor
    """(T,) int64."""
    counts: tuple[int, ...]
    """Targets of each clip, one clip after the other."""
    hidden: Tensor
    """(N, D), outputs of the last layer in the layout's order."""

    def negative_log_probs(self) -> Tensor:
        """(T,) float32 or wider, -log p(target)."""
        return F.cross_entropy(
            self.logits.float() if self.logits.dtype.itemsize < 4 else self.logits, self.targets, reduction="none"
        )

    def per_clip(self) -> Tensor:
        """(clips,) -log p of each whole sequence, summed in the same order every time, also on a GPU."""
        return torch.stack([part.sum() for part in torch.split(self.negative_log_probs(), list(self.counts))])

    def top3(self) -> Tensor:
        """(T,) bool: at most two codes are likelier than the target."""
        scores = self.logits.detach()
        return (scores > scores.gather(1, self.targets[:, None])).sum(dim=1) < 3


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of a micro-batch, as 0-dimensional tensors on the model's device: nothing waits for them unread."""

    total: Tensor
    """What is minimised: `cross_entropy` plus `preference`, the latter divided by the number of ranks."""
    cross_entropy: Tensor
    """Summed over all targets, so that a longer clip weighs more."""
    preference: Tensor
    """The DPO term, averaged over clips; 0 without rejected sequences."""
    top3_hits: Tensor
    """Targets other than EOS that are among the three likeliest codes."""
    top3_targets: Tensor
    """Targets other than EOS."""

    def top3_accuracy(self) -> float:
        """Between 0 and 1; 0 where there is no target. Waits for the device."""
        return float(self.top3_hits) / max(int(self.top3_targets), 1)


class Text2Semantic(nn.Module):
    """Stage 1 as a module whose forward is its loss, so that DistributedDataParallel can wrap it.

    By default a clip's loss is the same alone and in any batch. `upstream_compat=True` computes padded batches as
    upstream does (see `PaddedLayout`), to compare the two; weights trained either way have the same form.
    """

    def __init__(
        self, config: ModelConfig, *, upstream_compat: bool = False, beta: float = 0.2, ranks: int = 1
    ) -> None:
        """`beta` is the inverse temperature of the preference loss.

        `ranks` is the number of processes that train together, each with as many clips of a batch. The cross-entropy is
        a sum over clips and the preference loss a mean, so only a mean over the clips of all ranks makes what they
        minimise together the same for any number of them.
        """
        super().__init__()
        self.config = config
        self.upstream_compat = upstream_compat
        self.beta = beta
        self.ranks = ranks
        self.model = Decoder(config)

    def score(self, batch: Batch, codes: Sequence[Codes] | None = None) -> Scores:
        """Teacher-forced pass over `batch` (on the model's device) with its own codes, or with `codes`.

        Several `codes` of the same clips run in one pass: clip b of the k-th gets the number k*B + b.
        """
        codes = (batch.codes,) if codes is None else codes
        copies = len(codes)
        phones, bert = batch.phones, batch.bert
        y_width = max(c.ids.shape[1] for c in codes)
        ids = torch.cat([F.pad(c.ids, (0, y_width - c.ids.shape[1])) for c in codes])
        lengths = [n for c in codes for n in c.lengths]
        if copies > 1:
            phones, bert = phones.repeat(copies, 1), bert.repeat(copies, 1, 1)
        device = phones.device
        past_end = torch.arange(y_width + 1)[None] >= torch.tensor(lengths)[:, None]
        targets = F.pad(ids, (0, 1)).masked_fill(past_end.to(device, non_blocking=True), self.model.eos)
        make = PaddedLayout if self.upstream_compat else PackedLayout
        layout: Layout = make(
            batch.phone_lengths * copies,
            lengths,
            widths=(phones.shape[1], y_width),
            device=device,
            dtype=self._attention_dtype(device),
        )
        hidden, logits = self.model(phones, bert, targets[:, :-1], layout)
        return Scores(
            logits=logits, targets=targets.flatten()[layout.target_index], counts=layout.target_counts, hidden=hidden
        )

    def forward(self, batch: Batch) -> Losses:
        """The losses of a batch on the model's device; with `batch.rejected`, the preference loss too."""
        clips = len(batch)
        if batch.rejected is None:
            scores = self.score(batch)
            losses = scores.negative_log_probs()
            preference = losses.new_zeros(())
        elif self.upstream_compat:  # two paddings: each set of sequences is padded by its own longest
            scores, rejected = self.score(batch), self.score(batch, [batch.rejected])
            losses = scores.per_clip()
            preference = self._preference(losses, rejected.per_clip())
        else:
            both = self.score(batch, [batch.codes, batch.rejected])
            each = both.per_clip()
            losses = each[:clips]
            preference = self._preference(losses, each[clips:])
            own = sum(both.counts[:clips])
            scores = replace(both, logits=both.logits[:own], targets=both.targets[:own], counts=both.counts[:clips])
        counted = scores.targets != self.model.eos
        cross_entropy = losses.sum()
        return Losses(
            total=cross_entropy + preference / self.ranks,
            cross_entropy=cross_entropy.detach(),
            preference=preference.detach(),
            top3_hits=(scores.top3() & counted).sum(),
            top3_targets=counted.sum(),
        )

    def _preference(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The DPO loss without its reference terms (Rafailov et al. 2023, equation 7), averaged over clips.

        `chosen` and `rejected` are (B,) negative log-probabilities of whole sequences.
        """
        return -F.logsigmoid(self.beta * (rejected - chosen)).mean()

    def _attention_dtype(self, device: torch.device) -> torch.dtype:
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.model.bert_proj.weight.dtype
