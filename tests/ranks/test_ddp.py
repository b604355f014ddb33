"""What belongs to whom under DDP, FSDP2 and in a bare world, and resuming to the last bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import Rank, checkpoints, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lastgood import LastGoodError, MismatchError, SaveError, catalog
from lastgood.loading import read_tensors
from lastgood.manifest import Manifest
from test_composed import Coarse, Descent

warnings.filterwarnings("ignore")


def manifest_of(run: Path) -> tuple[catalog.Entry, Manifest]:
    entry = catalog.newest(run)
    assert entry is not None
    return entry, catalog.check_full(entry)


def net(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(30, 300), nn.BatchNorm1d(300), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 1))


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(torch.randn(8, 30)).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss)


# -- buffers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broadcast", [True, False])
def test_buffers_are_rank_0s_or_each_ranks_own_as_ddp_was_told(tmp_path: Path, broadcast: bool) -> None:
    def main(rank: Rank) -> Any:
        rank.group()
        model = DistributedDataParallel(net(), broadcast_buffers=broadcast)
        optimizer = torch.optim.AdamW(model.parameters())
        torch.manual_seed(50 + rank.rank)
        for _ in range(3):
            step_once(model, optimizer)
        before = model.module[1].running_mean.clone()
        with rank.checkpointer(model=model, optimizer=optimizer) as ckpt:
            ckpt.save(3, blocking=True).result()
            model.module[1].running_mean.fill_(7)
            with torch.no_grad():
                model.module[0].weight.fill_(7)
            optimizer.state.clear()
            assert ckpt.restore() == 3
        return before.tolist(), model.module[1].running_mean.tolist(), len(optimizer.state)

    values = [e.ok() for e in run_ranks(2, main, tmp_path)]
    assert values[0][0] != values[1][0], "they do differ when a save happens"
    for rank in range(2):
        assert values[rank][1] == values[rank if not broadcast else 0][0]
        assert values[rank][2] == 8
    _, manifest = manifest_of(tmp_path / "run")
    own = [name for name in manifest.tensors if name.startswith("rank1/")]
    if broadcast:
        assert own == []
    else:
        assert set(own) == {f"rank1/model.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    owners = {manifest.shards[c.shard].file for t in manifest.tensors.values() for c in t.chunks}
    assert {"00000.safetensors", "00001.safetensors"} <= owners, "parameters are shared out"


def test_composed_state_and_layouts_are_shared_out_and_restored_by_other_numbers_of_ranks(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 64, 5), nn.Flatten(), nn.Linear(64, 700)).to(
            memory_format=torch.channels_last
        )
        return model, torch.optim.Adam(model[0].parameters()), Descent(model[2].parameters())

    def train(model: nn.Module, *optimizers: torch.optim.Optimizer) -> list[Any]:
        torch.manual_seed(7)
        for _ in range(2):
            model(torch.randn(2, 3, 5, 5)).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return [parameter.tolist() for parameter in model.parameters()]

    def save(rank: Rank) -> Any:
        rank.group()
        model, adam, descent = build()
        wrapped = DistributedDataParallel(model)
        train(wrapped, adam, descent)
        with rank.checkpointer(model=wrapped, adam=adam, descent=descent) as ckpt:
            ckpt.save(2, blocking=True).result()
        return train(wrapped, adam, descent)

    def restore(rank: Rank) -> Any:
        model, adam, descent = build()
        with rank.checkpointer(model=model, adam=adam, descent=descent) as ckpt:
            assert ckpt.restore() == 2
        assert adam.state[model[0].weight]["exp_avg"].is_contiguous(memory_format=torch.channels_last)
        assert type(descent.state[model[2].weight]["mean"]) is Coarse
        return train(model, adam, descent)

    wanted = [ended.ok() for ended in run_ranks(2, save, tmp_path / "save", run=tmp_path / "run")]
    for size in (1, 3):
        assert [e.ok() for e in run_ranks(size, restore, tmp_path / str(size), run=tmp_path / "run")] == [
            wanted[0]
        ] * size
    _, manifest = manifest_of(tmp_path / "run")
    assert not [name for name in manifest.tensors if name.startswith("rank1/")]
    codes = manifest.tensors["descent.state.model.2.weight.mean.codes"]
    assert codes.dtype == "I8" and sum(chunk.end - chunk.begin for chunk in codes.chunks) == 64 * 700
    owners = {manifest.shards[c.shard].file for t in manifest.tensors.values() for c in t.chunks}
    assert owners == {"00000.safetensors", "00001.safetensors"}


# -- replicas that drifted apart --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["0.weight", "2.weight", "4.bias"])
def test_replicas_that_drifted_apart_are_named_and_rank_0s_is_saved_whole(tmp_path: Path, name: str, size: int) -> None:
    """Wherever the tensor lies in the shares: within as many saves as there are ranks."""

    def main(rank: Rank) -> Any:
        rank.group()
        model = DistributedDataParallel(net())
        if rank.rank == size - 1:
            with torch.no_grad():
                model.module.get_parameter(name).add_(1)
        # Large tensors that no optimizer changes count as frozen: rank 0 alone writes those.
        with rank.checkpointer(model=model, sgd=torch.optim.SGD(model.parameters())) as ckpt:
            for step in range(1, size + 1):
                ckpt.save(step, blocking=True).result()
        return {key: value.clone() for key, value in model.module.state_dict().items()}

    ended = run_ranks(size, main, tmp_path)
    saved = ended[0].ok()
    named = ended[0].logged("drifted apart")
    assert named and all(f"model.{name}" in line and f"rank {size - 1}" in line for line in named)
    for entry in catalog.committed(tmp_path / "run"):
        manifest = catalog.check_full(entry)
        values = read_tensors(entry, manifest, list(manifest.tensors))
        assert all(torch.equal(values[f"model.{key}"], value) for key, value in saved.items())


def test_replicas_that_agree_are_not_reported(tmp_path: Path) -> None:
    def main(rank: Rank) -> None:
        rank.group()
        model = DistributedDataParallel(net())
        optimizer = torch.optim.AdamW(model.parameters())
        with rank.checkpointer(model=model, optimizer=optimizer) as ckpt:
            for step in range(1, 5):
                step_once(model, optimizer)
                ckpt.save(step)

    ended = run_ranks(3, main, tmp_path)
    for e in ended:
        e.ok()
        assert not e.logged("WARNING") and not e.logged("ERROR")
    _, manifest = manifest_of(tmp_path / "run")
    assert sorted(s.file for s in manifest.shards) == [f"{n:05d}.safetensors" for n in range(3)]


# -- bare modules, and what the caller declares ------------------------------------------------------------------------


def test_a_bare_module_that_is_equal_on_all_ranks_is_written_once(tmp_path: Path) -> None:
    def main(rank: Rank) -> None:
        with rank.checkpointer(model=net(), value={"epoch": 3}) as ckpt:
            ckpt.save(1)

    for e in run_ranks(3, main, tmp_path):
        e.ok()
    _, manifest = manifest_of(tmp_path / "run")
    assert not [name for name in manifest.tensors if name.startswith("rank")]
    assert {s.file for s in manifest.shards} <= {"00000.safetensors", "00000-frozen.safetensors"}, "rank 0's alone"


def bare(rank: Rank, seed: int) -> dict[str, Any]:
    return {"model": net(seed + rank.rank), "value": {"mine": seed + rank.rank, "common": 5}}


def test_a_bare_module_that_differs_is_each_ranks_own(tmp_path: Path) -> None:
    def save(rank: Rank) -> Any:
        objects = bare(rank, 10)
        with rank.checkpointer(**objects) as ckpt:
            ckpt.save(1)
        return [p.tolist() for p in objects["model"].parameters()], objects["value"]

    def load(rank: Rank) -> Any:
        objects = bare(rank, 500)
        with rank.checkpointer(**objects) as ckpt:
            ckpt.restore()
            objects["value"] = ckpt["value"]
        return [p.tolist() for p in objects["model"].parameters()], objects["value"]

    saved = [e.ok() for e in run_ranks(3, save, tmp_path / "1", run=tmp_path / "run")]
    loaded = [e.ok() for e in run_ranks(3, load, tmp_path / "2", run=tmp_path / "run")]
    assert loaded == saved
    # Another number of ranks cannot continue each one's own: that is said, and nothing is changed.
    other = run_ranks(2, load, tmp_path / "3", run=tmp_path / "run")
    assert all(isinstance(e.error, LastGoodError) and "model.0.weight" in str(e.error) for e in other)
    assert isinstance(other[0].error, MismatchError)


def test_declared_placements(tmp_path: Path) -> None:
    def main(rank: Rank) -> None:
        state = {"same": torch.ones(400, 400), "mine": torch.full((3,), float(rank.rank)), "rest": torch.ones(5)}
        with rank.checkpointer(state=state, replicated=["state.same"], local=["*.mine"]) as ckpt:
            ckpt.save(1, blocking=True).result()
            state["mine"].fill_(99)
            ckpt.restore()
        assert state["mine"].tolist() == [float(rank.rank)] * 3

    for e in run_ranks(3, main, tmp_path):
        e.ok()
    _, manifest = manifest_of(tmp_path / "run")
    assert set(manifest.tensors) == {"state.same", "state.mine", "state.rest", "rank1/state.mine", "rank2/state.mine"}


# -- sharded ----------------------------------------------------------------------------------------------------------


def sharded(rank: Rank, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 33), nn.ReLU(), nn.Linear(33, 1))
    mesh = init_device_mesh("cpu", (rank.size,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[float]]:
    from torch.distributed.tensor import DTensor

    found = list(model.parameters())
    found += [t for p in model.parameters() for t in optimizer.state[p].values()]
    return [(t.full_tensor() if isinstance(t, DTensor) else t).tolist() for t in found]


def test_fsdp2_saved_and_restored_by_other_numbers_of_ranks(tmp_path: Path) -> None:
    def save(rank: Rank) -> Any:
        rank.group()
        model, optimizer = sharded(rank, 1)
        for _ in range(2):
            optimizer.zero_grad()
            torch.manual_seed(3)
            model(torch.randn(4, 7)).square().mean().backward()
            optimizer.step()
        with rank.checkpointer(model=model, optimizer=optimizer) as ckpt:
            ckpt.save(2)
        return whole(model, optimizer)

    def load(rank: Rank) -> Any:
        rank.group()
        model, optimizer = sharded(rank, 2)
        with rank.checkpointer(model=model, optimizer=optimizer) as ckpt:
            assert ckpt.restore() == 2
        return whole(model, optimizer)

    saved = [e.ok() for e in run_ranks(2, save, tmp_path / "2", run=tmp_path / "run")]
    _, manifest = manifest_of(tmp_path / "run")
    files = {manifest.shards[c.shard].file for c in manifest.tensors["model.0.weight"].chunks}
    assert len(files) == 2, "every rank wrote its part"
    assert not [name for name in manifest.tensors if name.startswith("rank")]
    for number, size in enumerate((2, 1, 3)):
        for e in run_ranks(size, load, tmp_path / f"load-{number}", run=tmp_path / "run"):
            assert e.ok() == saved[0]


def test_a_lost_rank_of_fsdp2_is_named(tmp_path: Path) -> None:
    def main(rank: Rank) -> str:
        rank.group()
        model, optimizer = sharded(rank, 1)
        ckpt = rank.checkpointer(model=model, optimizer=optimizer)
        ckpt.save(1, blocking=True).result()
        if rank.rank == 1:
            import os

            os._exit(9)
        with pytest.raises(SaveError, match=r"rank 1 is gone.*model\.0\.weight"):
            ckpt.save(2, blocking=True).result()
        ckpt.close()
        return "named"

    assert run_ranks(2, main, tmp_path)[0].ok() == "named"
    assert checkpoints(tmp_path / "run") == ["step-00000001"]


def test_fsdp1_and_zero_redundancy_are_refused_with_a_sentence(tmp_path: Path) -> None:
    def main(rank: Rank) -> list[str]:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.optim import ZeroRedundancyOptimizer

        rank.group()
        model = net()
        zero = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW)
        # FSDP1 wants an accelerator: only its class counts here.
        wrapped = nn.Sequential(nn.Linear(2, 2))
        wrapped[0].__class__ = type("FullyShardedDataParallel", (nn.Linear,), {})
        assert FullyShardedDataParallel.__name__ == "FullyShardedDataParallel"
        said = []
        for objects in ({"model": model, "optimizer": zero}, {"model": wrapped}):
            with pytest.raises(LastGoodError) as caught:
                rank.checkpointer(**objects)
            said.append(str(caught.value))
        return said

    for e in run_ranks(2, main, tmp_path):
        zero, wrapped = e.ok()
        assert "ZeroRedundancyOptimizer" in zero and "FSDP2" in zero
        assert "FSDP1" in wrapped and "fully_shard" in wrapped
    assert not (tmp_path / "run").exists()


# -- to the last bit --------------------------------------------------------------------------------------------------


def training(rank: Rank, total: int, stop_at: int | None, ddp: dict[str, Any], model: nn.Module, warm: int) -> Any:
    """Train with AdamW under DDP, with dropout and per-rank data drawn at random; return all losses and weights."""
    rank.group()
    torch.manual_seed(rank.rank)
    wrapped = DistributedDataParallel(model, **ddp)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    losses = {}
    wrapped.eval()
    for _ in range(warm):
        wrapped(torch.zeros(8, 30)).sum().backward()
    optimizer.zero_grad()
    wrapped.train()
    with rank.checkpointer(model=wrapped, optimizer=optimizer) as ckpt:
        for step in range(ckpt.restore(), total):
            losses[step] = step_once(wrapped, optimizer)
            if step + 1 == stop_at:
                ckpt.save(step + 1, blocking=True).result()
                break
    weights = {name: value.clone() for name, value in wrapped.module.state_dict().items()}
    dist.destroy_process_group()
    return losses, weights


def large(seed: int) -> nn.Module:
    """More than one bucket of DDP (the first has 1 MiB)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(30, 700), nn.Dropout(0.2), nn.Linear(700, 700), nn.BatchNorm1d(700), nn.ReLU(), nn.Linear(700, 1)
    )


def differs(tmp_path: Path, size: int, build: Any, ddp: dict[str, Any], warm: int = 0) -> int:
    """How many tensors differ between a run that was interrupted and one that was not."""

    def straight(rank: Rank) -> Any:
        return training(rank, 8, None, ddp, build(1), warm)

    def first(rank: Rank) -> Any:
        return training(rank, 8, 4, ddp, build(1), warm)

    def second(rank: Rank) -> Any:
        return training(rank, 8, None, ddp, build(2), warm)

    through = [e.ok() for e in run_ranks(size, straight, tmp_path / "straight")]
    begun = [e.ok() for e in run_ranks(size, first, tmp_path / "1", run=tmp_path / "run")]
    ended = [e.ok() for e in run_ranks(size, second, tmp_path / "2", run=tmp_path / "run")]
    count = 0
    for one, two, three in zip(through, begun, ended, strict=True):
        assert [one[0][step] for step in range(4)] == list(two[0].values())
        count += sum(one[0][step] != three[0][step] for step in range(4, 8))
        count += sum(not torch.equal(one[1][name], three[1][name]) for name in one[1])
    return count


def test_two_ddp_ranks_resume_to_the_last_bit(tmp_path: Path) -> None:
    assert differs(tmp_path, 2, large, {"bucket_cap_mb": 1}) == 0


STABLE: dict[str, tuple[dict[str, Any], int]] = {
    "find_unused_parameters": ({"find_unused_parameters": True, "bucket_cap_mb": 1}, 0),
    "a backward before": ({"bucket_cap_mb": 1}, 2),
}


@pytest.mark.parametrize("size", [3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("configuration", STABLE)
def test_more_ddp_ranks_resume_to_the_last_bit_in_a_stable_configuration(
    tmp_path: Path, size: int, configuration: str
) -> None:
    ddp, warm = STABLE[configuration]
    assert differs(tmp_path, size, large, ddp, warm) == 0
