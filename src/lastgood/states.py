"""The states in a checkpoint, without the objects that they belong to: for evaluation, and to carry them elsewhere.

Nothing here takes a run: a job may save into it, and delete what is old, meanwhile.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from lastgood import catalog, values
from lastgood.catalog import Entry
from lastgood.errors import DamagedError, LastGoodError, MismatchError
from lastgood.loading import read_tensors
from lastgood.manifest import Manifest

_log = logging.getLogger("lastgood")


def read_states(path: Path, device: torch.device) -> dict[str, Any]:
    """By name, the state of every object of a checkpoint; where `path` is a run, of the newest one that verifies.

    Raises:
        DamagedError: the checkpoint, or every one of the run, is damaged.
        LastGoodError: there is none.
    """
    path = path.absolute()
    named = catalog.entry_at(path)
    if named is not None:
        return _read(named, device)
    tried: dict[str, str] = {}
    while True:
        left = [entry for entry in catalog.committed(path) if entry.name not in tried]
        if not left:
            break
        entry = left[-1]
        try:
            return _read(entry, device)
        except MismatchError:
            raise  # It is this program that lacks something, and an older one would be no better.
        except (LastGoodError, OSError) as error:
            tried[entry.name] = str(error)
            if entry.is_committed():  # Else retention has deleted it while it was read.
                _log.warning("%s is skipped: %s", entry.path, error)
    if tried:
        raise DamagedError(f"{path} has no checkpoint that can be loaded: {'; '.join(tried.values())}")
    raise LastGoodError(f"{path} was not loaded: it is a directory. There is no checkpoint of lastgood in it.")


def _read(entry: Entry, device: torch.device) -> dict[str, Any]:
    manifest = catalog.check_quick(entry)
    return {name: state_of(entry, manifest, name, device) for name in manifest.objects}


def state_of(entry: Entry, manifest: Manifest, name: str, device: torch.device | None = None) -> Any:
    """An object of a checkpoint as its ``load_state_dict`` takes it; of a plain value, the value.

    What differs between ranks is rank 0's. Tied tensors are one tensor.
    """
    tree = catalog.main_tree(manifest, name)
    held = read_tensors(entry, manifest, set(values.tensor_names(tree)))
    if device is not None:
        held = {key: tensor.to(device) for key, tensor in held.items()}
    state = values.decode(tree, lambda tensor: held[tensor])
    if manifest.kinds.get(name) != "optimizer":
        return state
    try:
        labels = [label for group in state["groups"] for label in group["params"]]
        index_of = {label: index for index, label in enumerate(labels)}
        return {
            **state["extra"],
            "state": {index_of.get(label, label): item for label, item in state["state"].items()},
            "param_groups": [
                {**group["options"], "params": [index_of[label] for label in group["params"]]}
                for group in state["groups"]
            ],
        }
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{entry.path}: the state of {name} has no valid form: {error!r}") from error
