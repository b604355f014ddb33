"""How hostile files are read: every way that a program or a person may read them."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click
import torch

import lastgood
from lastgood import catalog, generation, random_state, torchfile
from lastgood.cli import main
from lastgood.errors import LastGoodError
from lastgood.loading import Loading
from lastgood.manifest import parse
from lastgood.program import read_events
from lastgood.world import World
from tests.faults import job as jobs
from tests.faults import mutations
from tests.faults.job import Job

Outcome = Literal["same", "other"]
"""Whether what was read is what had been written."""


def content() -> dict[str, Any]:
    """What the single files hold."""
    generator = torch.Generator().manual_seed(4)
    weights = {f"layer.{n}": torch.rand(16, 16, generator=generator) for n in range(3)}
    state = {"step": 5, "lr": 0.1, "betas": (0.9, 0.99), "names": ["a", "b"], "half": torch.ones(7).half()}
    return {"model": collections.OrderedDict(weights), "optimizer": state}


def tensors() -> dict[str, torch.Tensor]:
    return dict(content()["model"])


def digest(value: Any) -> bytes:
    return b"".join(jobs.leaves(value, ""))


def touch(value: Any, depth: int = 0) -> None:
    """Read every byte of every tensor: memory that is not there would end the process."""
    if isinstance(value, torch.Tensor):
        if value.layout == torch.strided and value.numel() < 1 << 20:
            value.detach().clone()
    elif depth < 20 and isinstance(value, dict | list | tuple):
        for item in list(value.values() if isinstance(value, dict) else value)[:1000]:
            touch(item, depth + 1)


def read_weights(expected: bytes, suffix: str) -> Callable[[bytes, Path], Outcome]:
    def read(data: bytes, place: Path) -> Outcome:
        path = place / f"file{suffix}"
        path.write_bytes(data)
        info = torchfile.inspect(path)
        try:
            lastgood.load(path)
        except LastGoodError:
            pass
        try:
            touch(torchfile.read(path, records="all"))
            touch(torchfile.read(path, mmap=True))
        except LastGoodError:
            pass
        result = torchfile.read(io.BytesIO(data))
        assert not info.damage, f"inspect says {info.damage}, and yet it is read"
        touch(result)
        return "same" if _same(result, expected) else "other"

    return read


def _same(result: Any, expected: bytes) -> bool:
    return isinstance(result, dict) and len(repr(result)) < 1 << 20 and digest(result) == expected


def read_manifest(template: Path) -> Callable[[bytes, Path], Outcome]:
    """The manifest, the quick check, and the loading of the whole state."""
    original = (template / "step-00000004" / "manifest.json").read_bytes()

    def read(data: bytes, place: Path) -> Outcome:
        entry = catalog.entry_of(place / "run", "step-00000004")
        assert entry is not None
        if not entry.path.exists():
            shutil.copytree(template, place / "run")
        (entry.path / "manifest.json").write_bytes(data)
        show(entry)
        manifest = parse(data, "altered")
        job = Job.build(0, "replicated")
        loading = Loading(entry, catalog.read_manifest(entry), job.objects, World(0, 1, True), strict=True)
        loading.prepare()
        loading.run()
        catalog.check_full(entry)
        return "same" if manifest == parse(original, "original") else "other"

    return read


def show(entry: catalog.Entry) -> None:
    """What the command line says of it."""
    for command in (["show", "--json", str(entry.path)], ["show", str(entry.path)], ["ls", str(entry.run)]):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                main(command, standalone_mode=False)
            except (LastGoodError, click.ClickException, click.exceptions.Exit, SystemExit):
                pass


def read_shard(template: Path) -> Callable[[bytes, Path], Outcome]:
    original = (template / "step-00000004" / "00000.safetensors").read_bytes()
    expected = jobs.reference("replicated", 0, 4)[4]

    def read(data: bytes, place: Path) -> Outcome:
        entry = catalog.entry_of(place / "run", "step-00000004")
        assert entry is not None
        if not entry.path.exists():
            shutil.copytree(template, place / "run")
        (entry.path / "00000.safetensors").write_bytes(data)
        job = Job.build(0, "replicated")
        loading = Loading(entry, catalog.read_manifest(entry), job.objects, World(0, 1, True), strict=True)
        loading.prepare()
        try:
            catalog.check_full(entry)
            whole = True
        except LastGoodError:
            whole = False
        assert whole == (data == original), "the full check does not notice it"
        loading.run()
        random_state.apply(loading.random())
        return "same" if job.digest() == expected else "other"

    return read


def read_log(original: bytes) -> Callable[[bytes, Path], Outcome]:
    def read(data: bytes, place: Path) -> Outcome:
        (place / "events.jsonl").write_bytes(data)
        found = read_events(place)
        assert all(isinstance(item, dict) for item in found)
        return "same" if data == original else "other"

    return read


def read_run(template: Path) -> Callable[[bytes, Path], Outcome]:
    """A job that takes a run in which one file is altered: `data` begins with the name of the file."""
    expected = jobs.reference("replicated", 0, 4)

    def read(data: bytes, place: Path) -> Outcome:
        run = place / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(template, run)
        name, _, altered = data.partition(b"\0")
        plant(run, name.decode(), altered)
        generation.holder(run, patience=0.01)
        entry = catalog.newest(run)
        if entry is not None:
            show(entry)
        job = Job.build(0, "replicated")
        with jobs.Checkpointer(run, stale=0.001, rank=0, world_size=1, **job.objects) as ckpt:
            step = ckpt.restore()
        assert job.digest() == expected[step], f"step {step} was restored with other bits"
        return "same" if step == 4 else "other"

    return read


PLANTS = ("a pipe", "a link out", "a link to itself", "a directory", "a link to a device", "nothing")


def plant(run: Path, name: str, data: bytes) -> None:
    """Put into the place of a file of a run what does not belong there."""
    target = run / name
    target.parent.mkdir(parents=True, exist_ok=True)
    kind = data.decode("latin1")
    if kind in PLANTS:
        target.unlink(missing_ok=True)
        if kind == "a pipe":
            os.mkfifo(target)
        elif kind == "a link out":
            target.symlink_to("/etc/passwd")
        elif kind == "a link to itself":
            target.symlink_to(target)
        elif kind == "a link to a device":
            target.symlink_to("/dev/zero")
        elif kind == "a directory":
            (target / "more").mkdir(parents=True)
    else:
        target.write_bytes(data)


def alter_run(template: Path) -> Callable[[bytes, random.Random], bytes]:
    """Chooses a file of the run, or a new name, and what it is to hold."""
    files = sorted(path for path in template.rglob("*") if path.is_file())
    new = ["generations/00000009.base", "generations/99999999999999999999.json", "generations/00000002.json",
           "step-00000009/manifest.json", "step-99999999999999999999/manifest.json", "step-00000004.g2/manifest.json",
           "step-00000004.g99999999999999999999.3/manifest.json", "stop", "generations/00000001.end",
           "step-00000009/x/y", "generations/00000002.beat", "generations/00000002.end"]  # fmt: skip

    def mutate(_: bytes, draw: random.Random) -> bytes:
        if draw.random() < 0.25:
            name, old = draw.choice(new), draw.choice(files).read_bytes()
        else:
            path = draw.choice(files)
            name, old = str(path.relative_to(template)), path.read_bytes()
        if draw.random() < 0.2:
            data = draw.choice(PLANTS).encode()
        elif old[:1] == b"{" and name.endswith(".json") and "manifest" not in name and draw.random() < 0.6:
            data = mutations.hostile_json(old, draw)
        elif name.endswith(".base"):
            data = draw.choice([b"step-00000009", b"step-00000001", b"../../x", b"", b"\xff" * 20, bytes(2000)])
        else:
            data = mutations.scramble(old, draw)
        return name.encode() + b"\0" + data

    return mutate
