"""Vector quantisation with a codebook that follows the data by moving averages (van den Oord et al., 2017)."""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lastgood_sovits.errors import SovitsError

DECAY = 0.99
SMOOTHING = 1e-5
DEAD_BELOW = 2.0
"""A code whose average number of vectors per batch falls below this is replaced by a vector of the batch."""
KMEANS_ITERATIONS = 50
KMEANS_SAMPLES = 10_000
_CHUNK = 2048  # vectors compared with the codebook at a time: 8 MiB of distances for 1024 codes


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenates the rows (n, d) of all ranks, in the order of the ranks; n may differ from rank to rank.

    A collective call: every rank must make it.
    """
    if not _distributed():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([rows.shape[0]], device=rows.device))
    sizes = [int(count) for count in counts]
    padded = F.pad(rows, (0, 0, 0, max(sizes) - rows.shape[0])).contiguous()
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def _draw(rows: Tensor, count: int) -> Tensor:
    """Draws `count` rows, without repetition where there are enough."""
    n = rows.shape[0]
    index = torch.randperm(n)[:count] if n >= count else torch.randint(n, (count,))
    return rows[index.to(rows.device)]


def nearest(rows: Tensor, codebook: Tensor) -> Tensor:
    """Finds for each of the rows (n, d) the nearest of the codes (k, d), by Euclidean distance. Returns (n,) int64."""
    half_norms = codebook.square().sum(1) / 2
    return torch.cat([(chunk @ codebook.T - half_norms).argmax(1) for chunk in torch.split(rows, _CHUNK)])


def kmeans(rows: Tensor, n_clusters: int, iterations: int = KMEANS_ITERATIONS) -> tuple[Tensor, Tensor]:
    """Clusters rows (n, d) with Lloyd's algorithm, from a random start.

    Returns:
        The centres (n_clusters, d) and how many rows belong to each (n_clusters,), both of the dtype of the rows.
        A centre that lost all its rows stays where it was.
    """
    if rows.shape[0] > KMEANS_SAMPLES:
        rows = _draw(rows, KMEANS_SAMPLES)
    centres = _draw(rows, n_clusters)
    sizes = rows.new_zeros(n_clusters)
    before: Tensor | None = None
    for _ in range(iterations):
        owner = nearest(rows, centres)
        if before is not None and torch.equal(owner, before):
            break  # no centre will move any more
        before = owner
        sizes = torch.bincount(owner, minlength=n_clusters).to(rows.dtype)
        sums = torch.zeros_like(centres).index_add_(0, owner, rows)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centres)
    return centres, sizes


class Codebook(nn.Module):
    """The codes and their moving averages, all of them buffers: a codebook is learned without gradients.

    Args:
        n_codes: number of codes.
        channels: length of each.
    """

    inited: Tensor
    cluster_size: Tensor
    embed: Tensor
    embed_avg: Tensor

    def __init__(self, n_codes: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("inited", torch.zeros(1))
        self.register_buffer("cluster_size", torch.zeros(n_codes))
        self.register_buffer("embed", torch.zeros(n_codes, channels))
        self.register_buffer("embed_avg", torch.zeros(n_codes, channels))
        self._known_ready_at = -1

    def is_ready(self) -> bool:
        """Whether the codes hold something. Asks the device only if the flag was written to since it was found set."""
        if self._known_ready_at != self.inited._version:
            self._known_ready_at = self.inited._version if bool(self.inited.item()) else -1
        return self._known_ready_at >= 0

    @torch.no_grad()
    def initialise(self, rows: Tensor) -> None:
        """Sets the codes to the centres of the rows (n, channels) of all ranks. A collective call."""
        rows = gather_rows(rows)
        # One rank computes, for a sum in another order would give each rank a codebook of its own.
        if _distributed() and dist.get_rank() != 0:
            centres, sizes = torch.empty_like(self.embed), torch.empty_like(self.cluster_size)
        else:
            centres, sizes = kmeans(rows, self.embed.shape[0])
        if _distributed():
            dist.broadcast(centres, src=0)
            dist.broadcast(sizes, src=0)
        self.embed.copy_(centres)
        # The average is of the sums of the vectors, so that it and the sizes give the codes back.
        self.embed_avg.copy_(centres * sizes[:, None])
        self.cluster_size.copy_(sizes)
        self.inited.fill_(1)

    @torch.no_grad()
    def update(self, rows: Tensor, codes: Tensor) -> None:
        """Moves the codes towards the rows (n, channels) of all ranks that chose them. A collective call."""
        sizes = torch.bincount(codes, minlength=self.embed.shape[0]).to(rows.dtype)
        sums = torch.zeros_like(self.embed).index_add_(0, codes, rows)
        if _distributed():
            dist.all_reduce(sizes)
            dist.all_reduce(sums)
        self.cluster_size.lerp_(sizes, 1 - DECAY)
        self.embed_avg.lerp_(sums, 1 - DECAY)
        total, n_codes = self.cluster_size.sum(), self.embed.shape[0]
        smoothed = (self.cluster_size + SMOOTHING) / (total + n_codes * SMOOTHING) * total
        self.embed.copy_(self.embed_avg / smoothed[:, None])
        self._replace_dead(rows)

    def _replace_dead(self, rows: Tensor) -> None:
        dead = self.cluster_size < DEAD_BELOW
        count = int(dead.sum())  # the same on every rank, since the sizes are
        if not count:
            return
        rows = gather_rows(rows)
        fresh = _draw(rows, count).contiguous()
        if _distributed():
            dist.broadcast(fresh, src=0)
        self.embed[dead] = fresh
        # The averages too: otherwise the next update would bring the dead code back.
        self.embed_avg[dead] = fresh * DEAD_BELOW
        self.cluster_size[dead] = DEAD_BELOW


class Quantizer(nn.Module):
    """Replaces each vector of a (batch, channels, n) tensor by the nearest code.

    In training mode the codes follow the data and gradients pass straight through; in eval mode it is a plain lookup.

    Args:
        n_codes: size of the codebook.
        channels: length of a code.
    """

    def __init__(self, n_codes: int, channels: int) -> None:
        super().__init__()
        # The published models have a residual quantizer of one layer; its nesting is in the names of the buffers.
        layer, residual = nn.Module(), nn.Module()
        layer.add_module("_codebook", Codebook(n_codes, channels))
        residual.add_module("layers", nn.ModuleList([layer]))
        self.vq = residual

    @property
    def codebook(self) -> Codebook:
        """The only codebook."""
        return cast(Codebook, self.vq.get_submodule("layers.0._codebook"))

    def initialise_if_new(self, x: Tensor, mask: Tensor) -> None:
        """Learns the codebook from the valid positions of a batch if nothing was loaded into it. A collective call.

        Args:
            x: (batch, channels, n).
            mask: (batch, 1, n).
        """
        if not self.codebook.is_ready():
            self.codebook.initialise(_valid_rows(x, mask))

    def encode(self, x: Tensor) -> Tensor:
        """Gives the codes (batch, n), int64, of vectors (batch, channels, n).

        Raises:
            SovitsError: if the codebook is empty.
        """
        if not self.codebook.is_ready():
            raise SovitsError(
                "the codebook of the quantizer is empty: load trained weights first, or train on at least one batch"
            )
        with torch.no_grad():
            return nearest(x.transpose(1, 2).flatten(0, 1), self.codebook.embed).view(x.shape[0], x.shape[2])

    def decode(self, codes: Tensor) -> Tensor:
        """Gives the vectors (batch, channels, n) of codes (batch, n)."""
        return F.embedding(codes, self.codebook.embed).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantises a batch.

        Args:
            x: (batch, channels, n).
            mask: (batch, 1, n). Padding neither moves the codes nor counts in the loss.

        Returns:
            The codes' vectors (batch, channels, n), the codes (batch, n), and the commitment loss, 0 in eval mode.
        """
        codes = self.encode(x)
        quantized = self.decode(codes)
        if not self.training:
            return quantized, codes, x.new_zeros(())
        commitment = ((x - quantized.detach()).square() * mask).sum() / (mask.sum() * x.shape[1])
        straight_through = x + (quantized - x).detach()
        self.codebook.update(_valid_rows(x.detach(), mask), codes[mask.squeeze(1).bool()])
        return straight_through, codes, commitment


def _valid_rows(x: Tensor, mask: Tensor) -> Tensor:
    return x.transpose(1, 2)[mask.squeeze(1).bool()]
