"""The codebook: learned from the data, the same on every rank, and left alone when frozen."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from s2_tiny import start_ranks, tiny_config
from torch import Tensor

from lastgood_sovits.errors import SovitsError
from lastgood_sovits.s2.quantizer import DECAY, Codebook, Quantizer, gather_rows, kmeans, nearest
from lastgood_sovits.s2.synthesizer import Synthesizer


def clusters(n: int, seed: int = 0) -> Tensor:
    """n rows around each of four distant points of the plane."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[10.0, 10.0], [-10.0, 10.0], [10.0, -10.0], [-10.0, -10.0]])
    return (centres.repeat(n, 1) + torch.randn(4 * n, 2, generator=generator) * 0.1).contiguous()


def test_kmeans_finds_the_clusters_and_their_sizes() -> None:
    torch.manual_seed(1)
    rows = clusters(50)
    centres, sizes = kmeans(rows, 8)
    assert float(sizes.sum()) == 200
    assert float((rows - centres[nearest(rows, centres)]).norm(dim=1).max()) < 1


def test_kmeans_with_fewer_rows_than_clusters() -> None:
    centres, sizes = kmeans(clusters(1), 16)
    assert centres.shape == (16, 2) and torch.isfinite(centres).all() and float(sizes.sum()) == 4


def test_nearest_is_exact_across_chunks() -> None:
    rows, codebook = torch.randn(5000, 3), torch.randn(40, 3)
    assert torch.equal(nearest(rows, codebook), torch.cdist(rows, codebook).argmin(1))


def test_initialisation_leaves_averages_that_give_the_codes_back() -> None:
    codebook = Codebook(4, 2)
    assert not codebook.is_ready()
    torch.manual_seed(0)
    codebook.initialise(clusters(25))
    assert codebook.is_ready()
    used = codebook.cluster_size > 0
    again = codebook.embed_avg[used] / codebook.cluster_size[used, None]
    assert torch.allclose(again, codebook.embed[used], atol=1e-5)


def test_update_moves_codes_towards_their_rows_and_padding_does_not_count() -> None:
    quantizer = Quantizer(2, 1).train()
    book = quantizer.codebook
    book.embed.copy_(torch.tensor([[0.0], [10.0]]))
    book.embed_avg.copy_(book.embed * 100)
    book.cluster_size.fill_(100)
    book.inited.fill_(1)
    x = torch.tensor([[[1.0, 11.0, 99.0]]], requires_grad=True)
    quantized, codes, commitment = quantizer(x, torch.tensor([[[1.0, 1.0, 0.0]]]))
    assert codes.tolist() == [[0, 1, 1]]
    assert quantized.detach().flatten().tolist() == [0.0, 10.0, 10.0]
    assert float(commitment.detach()) == pytest.approx(1.0)
    assert book.cluster_size.tolist() == pytest.approx([100 * DECAY + 0.01] * 2)
    expected = [0.01 / 99.01, (1000 * DECAY + 0.11) / 99.01]
    assert book.embed.flatten().tolist() == pytest.approx(expected, rel=1e-4)
    quantized.sum().backward()
    assert x.grad is not None and x.grad.flatten().tolist() == [1, 1, 1]


def test_a_dead_code_is_replaced_and_stays_replaced() -> None:
    quantizer = Quantizer(2, 1).train()
    book = quantizer.codebook
    book.embed.copy_(torch.tensor([[0.0], [1000.0]]))
    book.embed_avg.copy_(book.embed)
    book.cluster_size.copy_(torch.tensor([100.0, 1.0]))
    book.inited.fill_(1)
    x, mask = torch.tensor([[[3.0, 3.0, 3.0]]]), torch.ones(1, 1, 3)
    for _ in range(2):
        quantizer(x, mask)
        assert float(book.embed[1]) == pytest.approx(3.0, rel=1e-3)


def test_an_empty_codebook_is_not_used_silently() -> None:
    with pytest.raises(SovitsError, match="codebook of the quantizer is empty"):
        Quantizer(4, 2).encode(torch.zeros(1, 2, 3))


def test_readiness_follows_a_loaded_state() -> None:
    codebook, empty = Codebook(4, 2), Codebook(4, 2).state_dict()
    codebook.initialise(clusters(5))
    assert codebook.is_ready()
    codebook.load_state_dict(empty)
    assert not codebook.is_ready()


@pytest.mark.parametrize("frozen", [True, False])
def test_freezing_decides_whether_codes_and_projection_learn(frozen: bool) -> None:
    torch.manual_seed(0)
    config = tiny_config(model={"freeze_quantizer": frozen})
    g = Synthesizer(config.model, segment_frames=5).train()
    lengths = torch.tensor([20, 16])
    ssl, spec, text = torch.randn(2, 12, 20), torch.rand(2, 1025, 20), torch.randint(0, 700, (2, 6))
    before = None
    for _ in range(2):
        made = g(ssl, spec, lengths, text, torch.tensor([6, 4]))
        if before is not None:
            assert torch.equal(before, g.quantizer.codebook.embed) == frozen
        before = g.quantizer.codebook.embed.clone()
    (made.wave.sum() + made.m_p.sum() + made.commitment).backward()
    assert (g.ssl_proj.weight.grad is None) == frozen
    assert (float(made.commitment.detach()) == 0) == frozen


def _one_rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        torch.manual_seed(100 + rank)  # ranks draw different numbers
        rows = clusters(20 + 7 * rank, seed=rank)
        assert gather_rows(rows).shape[0] == sum(4 * (20 + 7 * r) for r in range(world))
        quantizer = Quantizer(6, 2).train()
        for step in range(3):  # batches of another length on every rank
            x = clusters(5 + rank + step, seed=10 * rank + step).T.unsqueeze(0)
            mask = torch.ones(1, 1, x.shape[2])
            mask[:, :, x.shape[2] - rank :] = 0
            quantizer.initialise_if_new(x, mask)
            quantizer(x, mask)
        torch.save(quantizer.state_dict(), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_ranks_with_batches_of_different_length_get_one_codebook(tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    start_ranks(3, _one_rank, 3, str(tmp_path))
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    for key, value in states[0].items():
        assert all(torch.equal(value, state[key]) for state in states[1:]), key
    embed = states[0]["vq.layers.0._codebook.embed"]
    rows = clusters(5)
    assert float((rows - embed[nearest(rows, embed)]).norm(dim=1).max()) < 2
