"""State on a GPU: copied behind the program's back, and of one moment all the same."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import lastgood

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def build(seed: int = 0, **options: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(1024, 1024), nn.BatchNorm1d(1024), nn.Dropout(0.1)]
    model = nn.Sequential(*layers).cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, **options)  # type: ignore[arg-type]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.randn(64, 1024, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}])
def test_a_checkpoint_is_of_one_moment_while_training_goes_on(tmp_path: Path, options: dict[str, object]) -> None:
    model, optimizer = build(**options)
    wanted = {}
    with lastgood.Checkpointer(tmp_path, model=model, optimizer=optimizer, keep=lastgood.Keep(last=99)) as ckpt:
        for step in range(1, 9):
            train(model, optimizer, 3)
            wanted[step] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            ckpt.save(step)
            train(model, optimizer, 3)  # At once: the copies are still queued.
    model, optimizer = build(seed=1, **options)
    with lastgood.Checkpointer(tmp_path, model=model, optimizer=optimizer) as ckpt:
        for step, (weights, moments) in reversed(wanted.items()):
            assert ckpt.restore(step) == step
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, weights[name]), (step, name)
            for index, state in optimizer.state_dict()["state"].items():
                for name, tensor in state.items():
                    assert torch.equal(tensor, moments["state"][index][name]), (step, index, name)


def test_a_resumed_run_draws_the_same_random_numbers(tmp_path: Path) -> None:
    model, optimizer = build()
    with lastgood.Checkpointer(tmp_path, model=model, optimizer=optimizer) as ckpt:
        train(model, optimizer, 2)
        ckpt.save(2)
        train(model, optimizer, 3)
    wanted = [parameter.detach().clone() for parameter in model.parameters()]
    model, optimizer = build(seed=7)
    with lastgood.Checkpointer(tmp_path, model=model, optimizer=optimizer) as ckpt:
        assert ckpt.restore() == 2
        train(model, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(wanted, model.parameters(), strict=True))


def test_a_scaler_goes_on_where_it_was(tmp_path: Path) -> None:
    model, optimizer = build()
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**20, growth_interval=2)
    with lastgood.Checkpointer(tmp_path, model=model, optimizer=optimizer, scaler=scaler) as ckpt:
        for _ in range(5):
            with torch.autocast("cuda", torch.float16):
                loss = model(torch.randn(64, 1024, device="cuda")).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ckpt.save(5)
    wanted = scaler.state_dict()
    fresh = torch.amp.GradScaler("cuda")
    model, optimizer = build(seed=1)
    with lastgood.Checkpointer(tmp_path, model=model, optimizer=optimizer, scaler=fresh) as ckpt:
        ckpt.restore()
    assert fresh.state_dict() == wanted


def test_a_captured_graph_whose_replay_skips_hooks_is_copied_at_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(6)]).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, capturable=True)
    batch = torch.randn(64, 1024, device="cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model(batch).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    wanted = {}
    with lastgood.Checkpointer(tmp_path, model=model, optimizer=optimizer, keep=lastgood.Keep(last=99)) as ckpt:
        for number in range(1, 6):
            graph.replay()
            wanted[number] = copy.deepcopy(model.state_dict())
            ckpt.save(number)
            for _ in range(3):
                graph.replay()
        for number, weights in reversed(wanted.items()):
            ckpt.restore(number)
            assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()), number


def test_saved_on_a_gpu_restored_on_the_cpu(tmp_path: Path) -> None:
    model, optimizer = build()
    train(model, optimizer, 2)
    with lastgood.Checkpointer(tmp_path, model=model, optimizer=optimizer) as ckpt:
        ckpt.save(2)
    wanted = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    model, optimizer = build(seed=1)
    model = model.cpu()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with lastgood.Checkpointer(tmp_path, model=model, optimizer=optimizer) as ckpt:
        ckpt.restore()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert all(state["exp_avg"].device.type == "cpu" for state in optimizer.state.values())


def test_two_ranks_on_one_gpu_without_a_process_group_write_one_copy(tmp_path: Path) -> None:
    # NCCL takes one rank a device; what is tested is the writing, which needs no process group.
    import threading

    results: dict[int, int] = {}

    def rank(number: int) -> None:
        model, optimizer = build()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        ckpt = lastgood.Checkpointer(
            tmp_path, model=model, optimizer=optimizer, replicated=["*"], rank=number, world_size=2
        )
        path = ckpt.save(1).result(60)
        results[number] = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        ckpt.close()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    model, _ = build()
    elements = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    copies = elements + 8 * parameters + 4 * len(list(model.parameters()))
    assert results[0] == results[1]
    assert copies <= results[0] < copies + 64 * 1024


def test_a_graph_that_is_captured_while_lastgood_watches_is_copied_at_once(tmp_path: Path) -> None:
    """SGD has no option that says that its step is captured."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(6)]).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    batch = torch.randn(64, 1024, device="cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model(batch).square().mean().backward()
        optimizer.step()

    wanted = {}
    with lastgood.Checkpointer(tmp_path, model=model, optimizer=optimizer, keep=lastgood.Keep(last=99)) as ckpt:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for number in range(1, 6):
            graph.replay()
            wanted[number] = copy.deepcopy(model.state_dict())
            ckpt.save(number)
            for _ in range(3):
                graph.replay()
        for number, weights in reversed(wanted.items()):
            ckpt.restore(number)
            assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items()), number


def test_an_average_that_begins_to_change_past_the_version_counter_is_saved_as_it_is(tmp_path: Path) -> None:
    average = torch.ones(1 << 20, device="cuda")
    with lastgood.Checkpointer(tmp_path, state={"average": average}, keep=lastgood.Keep(last=99)) as ckpt:
        for number in range(1, 9):
            if number > 5:
                average.data.mul_(0.5)
            ckpt.save(number, blocking=True)
        for number in range(8, 4, -1):
            ckpt.restore(number)
            assert average[0].item() == 0.5 ** (number - 5)
