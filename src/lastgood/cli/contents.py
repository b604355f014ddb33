"""What is in a checkpoint or a single file, under one set of names, so that any two of them can be compared.

The tensors of a module have the names that its ``state_dict`` gives them, after the name of the object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lastgood import catalog, disk, values
from lastgood.catalog import Entry
from lastgood.cli import places
from lastgood.cli.i18n import _
from lastgood.errors import DamagedError, LastGoodError
from lastgood.manifest import NAME, Manifest
from lastgood.values import Json

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")
_BATCH_BYTES = 256 << 20
"""How much of a checkpoint is in memory at a time."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor, not read yet."""

    dtype: str
    """By the name that safetensors gives it."""
    shape: tuple[int, ...]
    checksums: object
    """Equal for two tensors with the same bytes, cut in the same way; None where there are none."""
    source: str
    """The name under which the place holds it."""


class Contents:
    """The tensors and the other values of one place."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, Json] = {}
        """As :mod:`lastgood.values` encodes them."""

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Some of the tensors, checked. Raises DamagedError."""
        raise NotImplementedError

    def _walk(self, tree: Json, path: str) -> Iterator[tuple[str, str]]:
        """File the values of a tree, and yield the names and sources of its tensors."""
        if isinstance(tree, dict) and tree.get("$") in ("tensor", "ndarray"):
            yield path, tree["v"]
        elif isinstance(tree, dict) and "$" not in tree:
            for key, item in tree.items():
                yield from self._walk(item, f"{path}.{key}" if path else key)
        elif isinstance(tree, list):
            for index, item in enumerate(tree):
                yield from self._walk(item, f"{path}[{index}]")
        elif isinstance(tree, dict) and list(values.tensor_names(tree)):
            yield from self._walk(tree["v"], path)
        else:
            self.values[path] = tree


class CheckpointContents(Contents):
    """A checkpoint, or one object of it."""

    def __init__(self, entry: Entry, part: str | None) -> None:
        super().__init__()
        self._entry, self._manifest = entry, catalog.check_quick(entry)
        for name in check_parts(self._manifest, entry.path, [part] if part is not None else []):
            found = list(self._walk(catalog.main_tree(self._manifest, name), "" if part is not None else name))
            for rank, record in self._manifest.ranks.items():
                if name in record.objects:
                    list(self._walk(record.objects[name], f"rank{rank}/{name}"))
                for _key, source in list(found):
                    if source in record.local:
                        found.append((record.local[source], record.local[source]))
            for key, source in found:
                try:
                    tensor = self._manifest.tensors[source]
                except KeyError as error:
                    raise DamagedError(f"{entry.path}: {name} names a tensor that is not there: {error}") from error
                sums = [(chunk.offsets, chunk.shape, chunk.checksum) for chunk in tensor.chunks]
                self.tensors[key] = Tensor(tensor.dtype, tensor.shape, sorted(sums), source)

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        from lastgood.loading import read_tensors

        read = read_tensors(self._entry, self._manifest, {self.tensors[name].source for name in names})
        return {name: read[self.tensors[name].source] for name in names}


class FileContents(Contents):
    """A .pth or .safetensors file, or what one key of it holds."""

    def __init__(self, path: Path, part: str | None) -> None:
        super().__init__()
        from lastgood.dtypes import dtype_name
        from lastgood.files import load

        whole = load(path)
        if part is not None and isinstance(whole, dict) and part in whole:
            whole = whole[part]
        self._held: dict[str, torch.Tensor] = {}

        def put(name: str, tensor: torch.Tensor) -> str:
            self._held[name] = tensor
            return name

        for key, source in self._walk(values.encode(whole, "", put), ""):
            tensor = self._held[source]
            self.tensors[key] = Tensor(dtype_name(tensor.dtype, key), tuple(tensor.shape), None, source)

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: self._held[self.tensors[name].source] for name in names}


def read_contents(path: Path, part: str | None, use: Callable[[Contents], _T], *, against_file: bool = False) -> _T:
    """What `use` makes of what is at `path`.

    Args:
        part: only this object of a checkpoint, or what this key of a file holds, with names that begin inside of it.
        use: called again, with what is the newest then, where a job deletes the newest checkpoint of a run meanwhile.
        against_file: of a checkpoint without `part`, take the model, since a file mostly holds nothing else.
    """
    if disk.is_file(path) and path.name != NAME:
        return use(FileContents(path, part))

    def read(entry: Entry) -> _T:
        model = model_of(catalog.read_manifest(entry), entry.path) if part is None and against_file else part
        return use(CheckpointContents(entry, model))

    return places.read_checkpoint(path, read)


def model_of(manifest: Manifest, path: Path) -> str:
    """The object that is meant where none is named: the one called "model", else the only module.

    Raises:
        LastGoodError: there is none, or there are several.
    """
    modules = [name for name, kind in manifest.kinds.items() if kind == "module"]
    if "model" in manifest.objects:
        return "model"
    if len(modules) != 1:
        names = ", ".join(manifest.objects)
        raise LastGoodError(_("{path} holds {names}: choose one with --part", path=path, names=names))
    return modules[0]


def check_parts(manifest: Manifest, path: Path, parts: Sequence[str]) -> list[str]:
    """`parts`, or all objects where there are none. Raises LastGoodError for one that is not there."""
    for part in parts:
        if part not in manifest.objects:
            names = ", ".join(manifest.objects)
            raise LastGoodError(_("{path} has no part {part}; it has {names}", path=path, part=part, names=names))
    return list(parts) or list(manifest.objects)


def batches(names: Iterable[str], tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    """`names` in groups whose tensors fit into memory together."""
    import math

    batch: list[str] = []
    total = 0
    for name in names:
        batch.append(name)
        total += 8 * math.prod(tensors[name].shape)
        if total > _BATCH_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
