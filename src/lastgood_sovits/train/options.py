"""What the command line adds to upstream's configuration files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lastgood_sovits.errors import SovitsError

Stage = Literal["s1", "s2"]
Precision = Literal["32", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to train, beside what is trained. None leaves a choice to the configuration or the machine."""

    global_batch: int | None = None
    """Clips per step over all ranks; without it, the configured batch size is that of each rank."""
    precision: Precision | None = None
    """Instead of the configured one."""
    device: str | None = None
    """"cpu" or "cuda"."""
    workers: int | None = None
    """Processes per rank that load clips; 0 loads them in the training process."""
    save_every: int | None = None
    """Save after each so many steps."""
    save_minutes: float = 10.0
    """Save after each so many minutes. At the end of every save_every_epoch-th epoch, it is always saved."""
    mirror: Path | None = None
    """A second directory that receives copies of the checkpoints, in a folder for each voice and stage."""
    import_from: Path | None = None
    """A folder of upstream's, or a file in it, whose training goes on here."""
    log_every: int | None = None
    """Steps between two log lines."""
    deterministic: bool = False
    """Only kernels that give the same bits every time: a resumed run is then exact on CUDA too, and slower."""
    dropout: bool = True
    """False trains without dropout, so that losses can be compared between numbers of processes."""
    upstream_compat: bool = False
    """Stage 1: compute padded batches as upstream does, with its mask on the wrong side."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "save_every", "save_minutes", "log_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SovitsError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
        if self.workers is not None and self.workers < 0:
            raise SovitsError(f"--workers is {self.workers}; it must be 0 or more")
        if self.device not in (None, "cpu", "cuda"):
            raise SovitsError(f'--device is {self.device}; it must be "cpu" or "cuda"')

    def rank_batch(self, configured: int, world_size: int) -> int:
        """Clips per rank and step. Raises SovitsError where the global batch cannot be shared out evenly."""
        if self.global_batch is None:
            return configured
        if self.global_batch % world_size:
            raise SovitsError(
                f"--global-batch {self.global_batch} cannot be shared out evenly to {world_size} processes; "
                f"take a multiple of {world_size}"
            )
        return self.global_batch // world_size
