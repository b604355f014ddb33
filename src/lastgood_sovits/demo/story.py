"""What ``lastgood sovits demo`` does, and what it sees: train, kill, resume, compare, for both stages."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from safetensors.torch import load_file

from lastgood_sovits.demo.experiment import Experiment, build, s1_config, s2_config
from lastgood_sovits.errors import SovitsError
from lastgood_sovits.semantic import write_semantic
from lastgood_sovits.weights import read_weights

Stage = Literal["s1", "s2"]
EPOCHS = 2
SAVE_EVERY = 2
KILL_AT = 5
"""The training is killed as soon as this many steps are logged; the newest checkpoint is then of an earlier step."""


@dataclass(frozen=True)
class Finding:
    """Something that was wanted, what was seen of it, and whether it was so."""

    wanted: str
    seen: str
    good: bool


@dataclass(frozen=True)
class Told:
    """What came of the demo."""

    findings: list[Finding]
    weights: list[Path]
    """The weights files of the runs that were killed and resumed."""


def tell(root: Path, nproc: int, say: Callable[[str], None], mirror: Path | None = None) -> Told:
    """Plays the story in the folder `root` with `nproc` processes. `mirror` is a folder for copies of checkpoints.

    Raises:
        SovitsError: there is no speech on this machine, or a training failed where it should not.
    """
    experiment = build(root)
    say(f"{experiment.clips} clips, {experiment.seconds:.0f} s, from {experiment.source}; features are stand-ins")
    findings = _stage(experiment, "s2", nproc, say, mirror)
    weights = _weights(root / "run", "s2")
    if weights is None:
        raise SovitsError("stage 2 ended well and wrote no weights file")
    written = write_semantic(experiment.folder, weights)
    say(f"semantic codes of {written.clips} clips, from the stage 2 just trained")
    findings += _stage(experiment, "s1", nproc, say, mirror)
    files = [_weights(root / "run", stage) for stage in ("s2", "s1")]
    return Told(findings, [path for path in files if path is not None])


def _stage(
    experiment: Experiment, stage: Stage, nproc: int, say: Callable[[str], None], mirror: Path | None
) -> list[Finding]:
    make = s2_config if stage == "s2" else s1_config
    name = f"stage {stage[1]}"
    say(f"{name}: {EPOCHS} epochs in {nproc} processes, undisturbed, as the reference")
    _train(stage, make(experiment, "reference", EPOCHS, nproc), nproc)
    config = make(experiment, "run", EPOCHS, nproc)
    logs = experiment.root / "run" / f"logs_{stage}_v2"
    say(f"{name}: the same again, every process killed with SIGKILL in the middle")
    _train(stage, config, nproc, mirror=mirror, kill_when=lambda: _last_step(logs) >= KILL_AT)
    killed_at = _last_step(logs)
    say(f"{name}: the same command once more: it resumes and finishes")
    output = _train(stage, config, nproc, mirror=mirror)
    resumed = re.search(r"restored step (\d+)", output)
    resumed_at = int(resumed[1]) if resumed else 0
    mine, theirs = (_newest(experiment.root / run / logs.name / "lastgood") for run in ("run", "reference"))
    equal, total = _equal(mine, theirs)
    findings = [
        Finding(
            f"{name}: resumes at the last checkpoint",
            f"killed after step {killed_at}, resumed at step {resumed_at}",
            0 < resumed_at <= killed_at and killed_at - resumed_at <= 2 * SAVE_EVERY,
        ),
        Finding(
            f"{name}: resumes exactly",
            f"{equal} of {total} tensors (weights, moments) equal the undisturbed run's bit by bit",
            equal == total > 0,
        ),
        _exported(experiment.root, stage, name),
        learns(logs, name, "mel" if stage == "s2" else "loss"),
    ]
    if mirror is not None:
        copied, total = _equal(mine, _newest(mirror / "run" / logs.name))
        findings.append(Finding(f"{name}: copies elsewhere", f"{copied} of {total} tensors", copied == total > 0))
    return findings


def _exported(root: Path, stage: Stage, name: str) -> Finding:
    paths = [_weights(root / run, stage) for run in ("run", "reference")]
    if paths[0] is None or paths[1] is None:
        return Finding(f"{name}: writes weights", "a file is missing", False)
    exported, reference = (read_weights(path) for path in paths if path is not None)
    same = all(torch.equal(exported.tensors[key], value) for key, value in reference.tensors.items())
    return Finding(
        f"{name}: writes weights",
        f"{exported.kind} {exported.version}, epoch {exported.epoch}, {exported.size:,} bytes, "
        f"{'equal to' if same else 'DIFFERENT FROM'} the undisturbed run's",
        same and exported.epoch == EPOCHS,
    )


def _train(
    stage: Stage,
    config: Path,
    nproc: int,
    *,
    mirror: Path | None = None,
    kill_when: Callable[[], bool] | None = None,
) -> str:
    """Runs the training as torchrun would start it; returns what the first rank printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lastgood_sovits", "train", stage, "--config", str(config), "--device", "cpu"]
    command += ["--save-every", str(SAVE_EVERY), "--log-every", "1"]
    command += [] if mirror is None else ["--mirror", str(mirror)]
    processes = []
    for rank in range(nproc):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
        log = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True))
    if kill_when is not None:
        while all(process.poll() is None for process in processes) and not kill_when():
            time.sleep(0.02)
        finished = [process.poll() is not None for process in processes]
        for process in processes:
            process.kill()
        outputs = [process.communicate()[0] for process in processes]
        if any(finished):
            raise SovitsError("the training ended before it could be killed:\n" + "\n".join(outputs))
        return outputs[0]
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    if codes := [process.returncode for process in processes if process.returncode]:
        raise SovitsError(f"the training ended with {codes}:\n" + "\n".join(outputs))
    return outputs[0]


def _last_step(logs: Path) -> int:
    log = logs / "train.log"
    found = re.findall(r"epoch \d+, step (\d+):", log.read_text(encoding="utf-8")) if log.is_file() else []
    return int(found[-1]) if found else 0


def learns(logs: Path, name: str, loss: str) -> Finding:
    """Whether a loss in ``logs/train.log`` fell from the first epoch to the last, each of which sees the same clips."""
    text = (logs / "train.log").read_text(encoding="utf-8")
    found = re.findall(rf"epoch (\d+), step (\d+): .*?\b{loss} (\S+?)(?:,|$)", text, re.MULTILINE)
    values = {(int(epoch), int(step)): float(value) for epoch, step, value in found}  # a resumed run repeats steps
    if len({epoch for epoch, _ in values}) < 2:
        return Finding(f"{name}: learns", f"no {loss} of two epochs in the log", False)
    first, last = (fmean(v for (e, _), v in values.items() if e == choose(values)[0]) for choose in (min, max))
    return Finding(
        f"{name}: learns", f"{loss} {first:.2f} on average in the first epoch, {last:.2f} in the last", last < first
    )


def _newest(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of the newest checkpoint, read as any program could: with the safetensors library."""
    folder = max(path.parent for path in run.glob("step-*/manifest.json"))
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[int, int]:
    names = a.keys() | b.keys()
    return sum(name in a and name in b and torch.equal(a[name], b[name]) for name in names), len(names)


def _weights(run: Path, stage: Stage) -> Path | None:
    """The weights file of a stage: the demo's configurations want one, of the last epoch."""
    pattern = "SoVITS_weights_v2/*.pth" if stage == "s2" else "GPT_weights_v2/*.ckpt"
    return next(run.glob(pattern), None)
