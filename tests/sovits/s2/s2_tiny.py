"""Tiny models of stage 2."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lastgood_sovits.s2.config import Config, parse_config

Prepare = Callable[..., Path]


def tiny_config(version: str = "v2", **changes: dict[str, object]) -> Config:
    """Models of a few thousand parameters that train in milliseconds."""
    values: dict[str, dict[str, object]] = {
        "data": {"sampling_rate": 32000, "n_mel_channels": 16},
        "model": {
            "version": version,
            "inter_channels": 8,
            "hidden_channels": 8,
            "filter_channels": 16,
            "n_layers": 2,
            "upsample_initial_channel": 32,
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3]],
            "gin_channels": 16,
            "ssl_channels": 12,
            "codebook_size": 16,
            "mrte_channels": 16,
            "style_channels": 8,
            "posterior_layers": 2,
            "flow_couplings": 2,
            "flow_layers": 1,
            "sv_channels": 20,
            "discriminator_channels": 64,
            "discriminator_periods": [2, 3],
        },
        "train": {"segment_size": 3200, "batch_size": 2, "fp16_run": False},
    }
    for section, entries in changes.items():
        values[section] |= entries
    return parse_config(values)


def start_ranks(count: int, action: Callable[..., None], *arguments: Any) -> None:
    """Run `action(rank, *arguments)` in so many processes: forks of this one, which has imported torch already.

    Where torch sees CUDA, no fork of a process that has done a backward pass can do one.
    """
    method = "fork" if hasattr(os, "fork") and not torch.cuda.is_available() else "spawn"
    torch.multiprocessing.start_processes(_rank, (action, *arguments), nprocs=count, start_method=method)


def _rank(rank: int, action: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)  # The pool of threads that a fork remembers is not there.
    action(rank, *arguments)
