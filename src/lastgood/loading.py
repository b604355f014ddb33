"""From a verified checkpoint into live objects: in place, in parallel, every byte checked while it is read.

Nothing is changed before all names, types and shapes were compared; then tensors are read straight into the memory
where training uses them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lastgood import generators, values
from lastgood.catalog import Entry
from lastgood.composed import find, is_composed, name_of, take_apart
from lastgood.dtypes import DTYPES
from lastgood.errors import DamagedError, LastGoodError, MismatchError
from lastgood.live import into_value, is_plain, is_value, keep_left_out, uncast
from lastgood.manifest import DTYPE_BYTES, Manifest, RankRecord
from lastgood.placement import LocalTensor
from lastgood.reading import Want, read_wanted
from lastgood.state import (
    Flattener,
    clean,
    clean_names,
    kind_of,
    local_part,
    matches,
    memory_key,
    optimizer_names,
    parameter_names,
    unwrap,
)
from lastgood.values import Json, tensor_names
from lastgood.world import World


@dataclass(slots=True)
class Loading:
    """A checkpoint on its way into the objects of one rank."""

    entry: Entry
    manifest: Manifest
    objects: dict[str, Any]
    world: World
    strict: bool
    leave_out: Sequence[str] = ()
    """Patterns of state paths that keep their present values."""
    replicated: Sequence[str] = ()
    """Patterns of what the caller wants to be the same on every rank."""
    notes: list[str] = field(default_factory=list)
    """What was not carried over, in sentences."""
    _problems: list[str] = field(default_factory=list)
    _wants: list[Want] = field(default_factory=list)
    _loaded: dict[str, torch.Tensor] = field(default_factory=dict)
    _current: dict[str, LocalTensor] = field(default_factory=dict)
    _states: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By module, the state_dict into whose tensors is read."""
    _unfit: set[str] = field(default_factory=set)
    """Tensors of modules, and generators, that do not fit."""
    _converted: set[str] = field(default_factory=set)
    """Tensors of modules that have another type than they were saved with."""
    _filled: dict[tuple[Any, ...], tuple[str, str]] = field(default_factory=dict)
    """By memory of a module's tensor, its path and the saved tensor that goes there."""
    _personal: set[str] = field(default_factory=set)
    """Tensors of which this rank takes its own version, though other numbers of ranks saved and restore."""
    _derived: set[str] = field(default_factory=set)
    """Generators of which the checkpoint has no state for this rank."""

    def prepare(self) -> None:
        """Compare names, types and shapes. Changes nothing.

        Raises:
            MismatchError: something does not fit; all of it is listed.
            DamagedError: the manifest refers to tensors that it does not have.
        """
        with _no_inference():
            self._prepare()

    def _prepare(self) -> None:
        flattener = Flattener(self.objects, world_size=self.world.size, leave_out=self.leave_out)
        self._current = flattener.flatten().tensors
        names = parameter_names(self.objects)
        # Modules first: what does not fit of them is not restored in optimizers either.
        for name, value in sorted(self.objects.items(), key=lambda item: kind_of(item[1]) != "module"):
            if matches(name, self.leave_out):
                continue
            if name not in self.manifest.objects:
                self._problem(f"{name} is not in the checkpoint")
                continue
            kind, saved = kind_of(value), self.manifest.kinds.get(name)
            if kind != saved:
                self._problem(f"{name} was saved as a {saved} and is a {kind} here")
                continue
            try:
                if kind == "module":
                    self._prepare_module(name, value)
                elif kind == "optimizer":
                    self._prepare_optimizer(name, value, names)
                elif kind == "generator":
                    self._prepare_generator(name, value)
                else:
                    self._check_values(name, tensor_names(self._tree(name)))
                    self._want_tree(self._tree(name), again=kind == "stateful")
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
                raise DamagedError(f"{self.entry.path}: the state of {name} has no valid form: {error!r}") from error
        for name in self.manifest.objects:
            if name not in self.objects:
                self.notes.append(f"{name} is in the checkpoint but was not given to the Checkpointer: not restored")
        if self._problems and self.strict:
            raise MismatchError(
                f"{self.entry.path} does not fit the objects of this job ({len(self._problems)} differences); nothing "
                "was changed:\n  " + "\n  ".join(self._problems) + "\nRestore into objects built the same way, or pass "
                "strict=False to load what fits."
            )
        self.notes += [f"not restored: {problem}" for problem in self._problems]

    def run(self) -> dict[str, Any]:
        """Load. Returns the restored plain values, by name.

        Raises:
            DamagedError: a byte on disk is not what was saved. The objects may be half changed by then.
        """
        read_wanted(self.entry, self.manifest, self._wants, alone=self.world.size == 1)
        restored: dict[str, Any] = {}
        taken: set[Any] = set()
        for name, value in self.objects.items():
            left = name in self._unfit or matches(name, self.leave_out)
            if left or kind_of(value) != self.manifest.kinds.get(name):
                continue
            try:
                self._finish(name, value, restored, taken)
            except (LastGoodError, KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                # torch's CheckpointException is no Exception.
                raise LastGoodError(
                    f"{self.entry.path}: {name} did not take its state ({type(error).__name__}: {error}). The objects "
                    "of this job may be partly overwritten: do not train on with them."
                ) from error
        return restored

    def _finish(self, name: str, value: Any, restored: dict[str, Any], taken: set[Any]) -> None:
        """Hand its state to one object."""
        kind = kind_of(value)
        if kind == "module":
            self._finish_module(name, value)
        elif kind == "optimizer":
            with _no_inference():
                self._finish_optimizer(name, value)
        elif kind == "generator":
            generators.set_state(value, self._loaded[next(iter(tensor_names(self._tree(name))))])
            if name in self._derived:
                seed = generators.derive(value, name, self.world.rank, self.world.size, self.manifest.step)
                self.notes.append(
                    f"{name}: rank {self.world.rank} has no state of its own in this checkpoint (saved by "
                    f"{self.manifest.world_size} ranks): it is seeded with {seed}, which follows from rank 0's state, "
                    f"the rank and the step. If all ranks shall draw the same numbers, pass replicated=[{name!r}]."
                )
        elif kind == "stateful":
            present = value.state_dict() if self.leave_out else None
            value.load_state_dict(keep_left_out(present, self._decode(self._tree(name)), name, self.leave_out))
        else:
            saved = keep_left_out(value, self._decode(self._tree(name)), name, self.leave_out)
            restored[name] = into_value(value, saved, taken)

    def random(self) -> Json:
        """This rank's saved random state, or None where there is none."""
        return self._record().random

    # -- which version of a thing is this rank's ------------------------------------------------------------------

    def _record(self) -> RankRecord:
        record = self.manifest.ranks.get(self.world.rank)
        return record if record is not None else RankRecord(None)

    def _tree(self, name: str) -> Json:
        if self.world.size != self.manifest.world_size:
            return self.manifest.objects[name]
        return self._record().objects.get(name, self.manifest.objects[name])

    def _resolve(self, name: str) -> str:
        """The name of this rank's version of a tensor."""
        if self.world.size != self.manifest.world_size and name not in self._personal:
            return name
        return self._record().local.get(name, name)

    def _differs(self, name: str, own: str) -> bool:
        """Whether a rank's own version of a tensor is another than rank 0's."""
        a, b = self.manifest.tensors[name], self.manifest.tensors[own]
        return (a.dtype, a.shape, [c.checksum for c in a.chunks]) != (b.dtype, b.shape, [c.checksum for c in b.chunks])

    def _check_carried(self, name: str, essential: bool) -> None:
        """With another world size, rank 0's version of what each rank had for itself is all there is."""
        if self.world.size == self.manifest.world_size:
            return
        if any(name in record.local for record in self.manifest.ranks.values()):
            if essential:
                self._problem(
                    f"{name}: every one of {self.manifest.world_size} ranks had its own, and here are {self.world.size}"
                )
            else:
                self._check_values(name, [name])

    def _check_values(self, name: str, tensors: Iterable[str], what: str = "") -> None:
        """With another world size, the values of an object are rank 0's: say so where the ranks' were not the same."""
        # The same on every rank: one says it.
        if self.world.size == self.manifest.world_size or self.world.rank != 0:
            return
        wanted = set(tensors)
        for record in self.manifest.ranks.values():
            if name in record.objects or any(
                self._differs(tensor, own) for tensor, own in record.local.items() if tensor in wanted
            ):
                self.notes.append(
                    f"{name}: {self.manifest.world_size} ranks had {what or 'values'} of their own, and here are "
                    f"{self.world.size}: all take rank 0's"
                )
                return

    def _prepare_generator(self, name: str, value: Any) -> None:
        """Where the ranks had states of their own, each goes on with its own; the others get one that is derived."""
        (tensor,) = tensor_names(self._tree(name))
        here, there = generators.class_of(value), self._tree(name).get("class", generators.PLAIN)
        if here != there:
            self._problem(f"{name} is a {there} in the checkpoint and a {here} here")
            self._unfit.add(name)
            return
        versions = [record.local.get(tensor, tensor) for rank, record in self.manifest.ranks.items() if rank]
        if self.world.rank < self.manifest.world_size:
            self._personal.add(tensor)
        else:
            # Where they all drew the same numbers, so do those that join them.
            shared = versions and not any(self._differs(tensor, version) for version in versions)
            if not shared and not matches(name, self.replicated):
                self._derived.add(name)
        self._want_tree(self._tree(name))

    def _problem(self, text: str) -> None:
        self._problems.append(text)

    # -- preparing ------------------------------------------------------------------------------------------------

    def _prepare_module(self, name: str, value: nn.Module) -> None:
        module = unwrap(value)
        renames = clean_names(module)
        saved = dict(self._tree(name)["state"])
        parameters = {clean(key, renames) for key, _ in module.named_parameters(remove_duplicate=False)}
        self._states[name] = dict(module.state_dict())
        for key, tensor in self._states[name].items():
            key = clean(key, renames)
            path = f"{name}.{key}"
            if matches(path, self.leave_out):
                saved.pop(key, None)
                continue
            if key not in saved:
                self._problem(f"{path} is not in the checkpoint")
                continue
            tree = saved.pop(key)
            if is_value(key, tensor):
                self._check_values(path, tensor_names(tree))
                self._want_tree(tree)
                continue
            self._prepare_tensor(path, tensor, tree, key in parameters)
        for key in saved:
            if not matches(f"{name}.{key}", self.leave_out):
                self._problem(f"{name}.{key} is in the checkpoint but not in the model")
        by_key = {clean(key, renames): parameter for key, parameter in module.named_parameters()}
        gradients = self._tree(name).get("gradients", {})
        self._check_values(name, tensor_names(gradients), "gradients or other values")
        for key, tree in gradients.items():
            self._want_tree(tree, by_key.get(key))

    def _prepare_tensor(self, path: str, tensor: torch.Tensor, tree: Json, essential: bool) -> None:
        kind = tree.get("$") if isinstance(tree, dict) else None
        if kind not in ("tensor", "composed"):
            self._problem(f"{path} was saved as a value and is a tensor here")
        elif (kind == "composed") != is_composed(type(tensor)):
            there = tree["class"] if kind == "composed" else "plain tensor"
            self._problem(f"{path} is a {there} in the checkpoint and a {name_of(type(tensor))} here")
            self._unfit.add(path)
        elif kind == "composed":
            parts, context = take_apart(tensor)
            described = values.encode(context, f"{path}.__tensor_flatten__()", lambda name, _: name)
            here, there = f"{name_of(type(tensor))} {list(tensor.shape)}", f"{tree['class']} {tree['shape']}"
            if here != there:
                self._problem(f"{path} is a {there} in the checkpoint and a {here} here")
                self._unfit.add(path)
                return
            if (parts.keys(), described) != (tree["v"].keys(), tree["context"]):
                self._problem(f"{path} is a {there} that was made with other settings than here")
                self._unfit.add(path)
                return
            wanted, problems = len(self._wants), len(self._problems)
            for name, part in parts.items():
                self._prepare_tensor(f"{path}.{name}", part, tree["v"][name], essential)
            if len(self._problems) > problems or any(f"{path}.{name}" in self._converted for name in parts):
                del self._wants[wanted:]  # A part of the old and a part of the new would be neither.
                self._unfit.add(path)
        else:
            self._check_carried(tree["v"], essential)
            local = local_part(tensor, path)
            memory = memory_key(local.tensor) if local.tensor.numel() else (path,)
            other = self._filled.setdefault(memory, (path, tree["v"]))
            if other[1] != tree["v"]:
                self._problem(f"{path} and {other[0]} are one tensor here, and were saved with different values")
            elif other[0] == path:
                self._want(path, tree["v"], local)

    def _want(self, path: str, name: str, local: LocalTensor) -> None:
        record = self.manifest.tensors[self._resolve(name)]
        here = f"{str(local.tensor.dtype).removeprefix('torch.')} {list(local.shape)}"
        there = f"{str(DTYPES[record.dtype]).removeprefix('torch.')} {list(record.shape)}"
        if record.shape != local.shape or (self.strict and DTYPES[record.dtype] != local.tensor.dtype):
            self._problem(f"{path} is {there} in the checkpoint and {here} here")
            self._unfit.add(path)
        else:
            if DTYPES[record.dtype] != local.tensor.dtype:
                self.notes.append(f"{path} is {there} in the checkpoint: converted to {here}")
                self._converted.add(path)
            self._wants.append(Want(self._resolve(name), local.tensor, local.offsets))

    def _prepare_optimizer(self, name: str, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> None:
        here, there = optimizer.param_groups, self._tree(name)["groups"]
        if len(here) != len(there):
            self._problem(f"{name} has {len(here)} parameter groups, and was saved with {len(there)}")
        labels = iter(optimizer_names(name, optimizer, names))
        for number, (group, saved) in enumerate(zip(here, there, strict=False)):
            mine = {next(labels) for _ in group["params"]}
            theirs = set(saved["params"])
            for label in sorted(mine - theirs):
                self._problem(f"{name}, group {number}: the parameter {label} was not in it when it was saved")
            for label in sorted(theirs - mine):
                self._problem(f"{name}, group {number}: the parameter {label} was in it when it was saved")
        parameters = [parameter for group in here for parameter in group["params"]]
        by_label = dict(zip(optimizer_names(name, optimizer, names), parameters, strict=True))
        for label, held in self._tree(name)["state"].items():
            if label in self._unfit:
                self.notes.append(f"{name}: the state of {label} is not restored, since that does not fit")
                continue
            for tensor in tensor_names(held):
                self._check_carried(tensor, essential=True)
            self._want_tree(held, by_label.get(label), again=True)
        rest = [*(saved["options"] for saved in there), self._tree(name)["shared"], self._tree(name)["extra"]]
        self._check_values(name, tensor_names(rest))
        self._want_tree(rest)

    def _want_tree(self, tree: Json, like: torch.Tensor | None = None, again: bool = False) -> None:
        """Want all tensors of a tree: into the memory of the present state where it has the same, else into new one.

        Args:
            tree: the saved one.
            like: new memory for a tensor of the shape of this one, a DTensor, is spread over the ranks as that is.
            again: take new memory also where the present has other strides, for what is computed from it later.
        """
        for kind in values.composed_classes(tree):
            find(kind)
        for name in tensor_names(tree):
            if name in self._loaded:
                continue
            record = self.manifest.tensors[self._resolve(name)]
            dtype, current = DTYPES[record.dtype], self._current.get(name)
            strides = self.manifest.strides.get(name)
            fits = current is not None and current.shape == record.shape and current.tensor.dtype == dtype
            if current is None or not fits or (again and strides is not None and current.strides != strides):
                if like is not None and type(like).__name__ == "DTensor" and tuple(like.shape) == record.shape:
                    new = torch.empty_like(like, dtype=dtype)
                elif strides is not None and self.manifest.tensors[name].shape == record.shape:
                    # Sums over it come out the same only in the same order.
                    new = torch.empty_strided(record.shape, strides, dtype=dtype, device="cpu")
                else:
                    new = torch.empty(record.shape, dtype=dtype, device="cpu")
                current = local_part(new, name)
            self._wants.append(Want(self._resolve(name), current.tensor, current.offsets))
            self._loaded[name] = current.whole

    # -- finishing ------------------------------------------------------------------------------------------------

    def _decode(self, tree: Json) -> Any:
        return values.decode(tree, lambda name: self._loaded[name])

    def _finish_module(self, name: str, value: nn.Module) -> None:
        module = unwrap(value)
        renames = clean_names(module)
        saved = self._tree(name)["state"]
        state = self._states[name]
        extra = {
            key: self._decode(saved[clean(key, renames)])
            for key, item in state.items()
            if is_value(key, item) and clean(key, renames) in saved
        }
        if extra or not is_plain(module, state):
            # It has values, hooks, or tensors that state_dict computes: the module must be told.
            module.load_state_dict({**state, **extra}, strict=False)
        gradients = self._tree(name).get("gradients", {})
        for key, parameter in module.named_parameters():
            if "gradients" in self._tree(name):
                parameter.grad = None
            if clean(key, renames) in gradients:
                gradient = self._decode(gradients[clean(key, renames)])
                parameter.grad = gradient.to(parameter.device)

    def _finish_optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        tree = self._tree(name)
        labels = optimizer_names(name, optimizer, parameter_names(self.objects))
        index_of = {label: index for index, label in enumerate(labels)}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        present = optimizer.state_dict()["state"] if self.leave_out else {}
        state = {}
        for label, index in index_of.items():
            path = f"{name}.state.{label}"
            if matches(path, self.leave_out):
                state.update({index: present[index]} if index in present else {})
            elif label in tree["state"] and label not in self._unfit:
                saved_state = self._decode(tree["state"][label])
                state[index] = keep_left_out(present.get(index), saved_state, path, self.leave_out)
        groups, at = [], 0
        for number, group in enumerate(optimizer.param_groups):
            count = len(group["params"])
            saved = tree["groups"][number]["options"] if number < len(tree["groups"]) else {}
            options = {key: option for key, option in group.items() if key != "params"}
            groups.append({**options, **self._decode(saved), "params": list(range(at, at + count))})
            at += count
        whole = {"state": {**state, **self._decode(tree["shared"])}, "param_groups": groups}
        optimizer.load_state_dict({**self._decode(tree["extra"]), **whole})
        for index, held in state.items():
            if labels[index] not in self._converted:
                optimizer.state[parameters[index]] = uncast(held, optimizer.state[parameters[index]])


@contextlib.contextmanager
def _no_inference() -> Iterator[None]:
    """Where memory is made: what is made in inference mode could not be trained with outside of it."""
    gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):  # To leave it turns gradients on.
        yield


def read_tensors(entry: Entry, manifest: Manifest, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Whole tensors of a checkpoint, checked, into new memory: for export, comparison and evaluation.

    Raises:
        DamagedError: a byte on disk is not what was saved.
        LastGoodError: there is no tensor of that name.
    """
    loading = Loading(entry, manifest, {}, World(0, manifest.world_size, True), strict=True)
    for name in names:
        if name not in manifest.tensors:
            raise LastGoodError(f"{entry.path} has no tensor {name!r}")
        record = manifest.tensors[name]
        target = torch.empty(record.shape, dtype=DTYPES[record.dtype], device="cpu")
        loading._loaded[name] = target
        loading._wants.append(Want(name, target, (0,) * len(record.shape)))
    read_wanted(entry, manifest, loading._wants)
    return dict(loading._loaded)


def nbytes(manifest: Manifest) -> int:
    """Bytes of all tensors, each counted once."""
    return sum(math.prod(record.shape) * DTYPE_BYTES[record.dtype] for record in manifest.tensors.values())
