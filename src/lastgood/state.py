"""The state of a job, flattened: named tensors, and for each registered object a JSON tree that refers to them.

Names do not depend on how a model is wrapped: DDP's ``module.`` and ``torch.compile``'s ``_orig_mod.`` are left out,
and an optimizer's state is filed under the names of its parameters. Tensors that share all their memory are saved
once, so tied weights stay tied.
"""

from __future__ import annotations

import contextlib
import fnmatch
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lastgood import generators, values
from lastgood.composed import is_composed, name_of, plain_parts
from lastgood.dtypes import dtype_name
from lastgood.errors import LastGoodError
from lastgood.generators import is_generator
from lastgood.placement import LocalTensor, Placement, is_dense, row_strides
from lastgood.recall import Given, Memory, Sight, learn, look
from lastgood.values import Json


class State:
    """The flattened state of one rank.

    Args:
        tensors: by name. None where `sight` shows them, and `token` says what they are called: they are described only
            when somebody asks for :attr:`tensors`, which a save does in the background.
        objects: for each registered object its tree.
        kinds: what each of them is.
        token: the same object as that of another state, if both hold the same tensors but for their values. None: not
            known.
    """

    def __init__(
        self,
        tensors: dict[str, LocalTensor] | None,
        objects: dict[str, Json],
        kinds: dict[str, str],
        token: Memory | None = None,
        sight: Sight | None = None,
    ) -> None:
        self.objects, self.kinds, self.token = objects, kinds, token
        self._tensors, self._sight = tensors, sight

    @property
    def tensors(self) -> dict[str, LocalTensor]:
        if self._tensors is None:
            assert self.token is not None and self._sight is not None
            self._tensors = self.token.tensors(self._sight)
        return self._tensors

    @property
    def places(self) -> object:
        """The same object as that of another state, if both hold the same tensors at the same addresses."""
        return None if self.token is None else self.token.addresses

    @property
    def sources(self) -> list[torch.Tensor]:
        """What this rank holds of every tensor, at the places that :attr:`index` says."""
        if self._sight is not None:
            return self._sight.tensors
        return [part.tensor for part in self.tensors.values()]

    @property
    def index(self) -> dict[str, int]:
        """By name, the place of a tensor in :attr:`sources`. The same for the same token."""
        if self._sight is not None and self.token is not None:
            return self.token.index
        return {name: number for number, name in enumerate(self.tensors)}


def kind_of(value: Any) -> str:
    """What an object is to us: module, optimizer, stateful, generator, value."""
    if isinstance(value, nn.Module):
        return "module"
    if isinstance(value, torch.optim.Optimizer) and _is_usual(value):
        return "optimizer"
    if is_generator(value):
        return "generator"
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
        return "stateful"
    return "value"


_usual: weakref.WeakKeyDictionary[torch.optim.Optimizer, bool] = weakref.WeakKeyDictionary()


def _is_usual(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its ``state_dict`` is one of torch's form. That of a class around another optimizer may be of any."""
    if type(optimizer).state_dict is torch.optim.Optimizer.state_dict:
        return True
    if optimizer not in _usual:
        try:
            _usual[optimizer] = {"state", "param_groups"} <= set(optimizer.state_dict())
        except Exception:
            return True  # The save that asks for it, too, says why there is none.
    return _usual[optimizer]


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DDP and ``torch.compile``, in whatever order they were applied."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            module = module.module
        elif (inner := compiled_inner(module)) is not None:
            module = inner
        else:
            return module


def compiled_inner(module: nn.Module) -> nn.Module | None:
    """The module that ``torch.compile`` has wrapped, if `module` is such a wrapper."""
    # Not getattr: a wrapper of the user's may pass on the attributes of what it wraps. Nor get, which a scripted
    # module's does not have.
    if "_orig_mod" not in module._modules:
        return None
    return module._modules["_orig_mod"]


def refuse_unsupported(name: str, value: Any) -> None:
    """Raise LastGoodError for objects whose state cannot be read without the other ranks."""
    if type(value).__name__ == "ZeroRedundancyOptimizer":
        raise LastGoodError(
            f"{name}: ZeroRedundancyOptimizer gives its state only through a collective operation of all ranks, which "
            "a save must not depend on. Use the plain optimizer, or FSDP2 (fully_shard), whose state is sharded too."
        )
    if isinstance(value, nn.Module):
        for path, module in value.named_modules():
            if type(module).__name__ == "FullyShardedDataParallel":
                raise LastGoodError(
                    f"{name}: {path or 'the module'} is wrapped in FSDP1, which hides its parameters. Use FSDP2 "
                    "(torch.distributed.fsdp.fully_shard): its parameters are DTensors, which are saved as they are."
                )


def clean_names(module: nn.Module) -> dict[str, str]:
    """For every module path that a wrapper inside `module` adds to: the prefix to replace, and by what."""
    renames = {}
    for path, child in module.named_modules(remove_duplicate=False):
        at = f"{path}." if path else ""
        if isinstance(child, nn.parallel.DistributedDataParallel | nn.DataParallel):
            renames[at + "module."] = at
        elif compiled_inner(child) is not None:
            renames[at + "_orig_mod."] = at
    return dict(sorted(renames.items(), key=lambda item: -len(item[0])))


def clean(key: str, renames: Mapping[str, str]) -> str:
    """`key` of a state_dict, without the wrappers' parts. Longest prefix first: inner wrappers before outer ones."""
    for prefix, shorter in renames.items():
        if key.startswith(prefix):
            key = shorter + key[len(prefix) :]
    return key


def parameter_names(objects: Mapping[str, Any]) -> dict[int, str]:
    """By id, the name of every parameter of every registered module."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    for name, value in objects.items():
        if isinstance(value, nn.Module):
            module = unwrap(value)
            renames = clean_names(module)
            for key, parameter in module.named_parameters():
                label = f"{name}.{clean(key, renames)}"
                while label in taken:
                    label += "+"  # "a" with "b.c" in it, and "a.b" with "c".
                taken.add(label)
                names.setdefault(id(parameter), label)
    return names


def optimizer_names(name: str, optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> list[str]:
    """The names of an optimizer's parameters, in the order of its ``state_dict`` indices."""
    result = []
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            # A parameter of no registered module has only its place to be known by.
            result.append(names.get(id(parameter), f"{name}.group{number}.{position}"))
    return result


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a state path is one of those that `patterns` mean. A path as an error message gives it means itself."""
    return any(path == pattern or fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def unsaved_parameters(objects: Mapping[str, Any], state: State) -> dict[str, list[str]]:
    """By optimizer, those of its parameters whose values are in no registered object."""
    saved = {t.tensor.data_ptr() for t in state.tensors.values()}
    names = parameter_names(objects)
    found: dict[str, list[str]] = {}
    for name, value in objects.items():
        # One around another need not have them.
        if isinstance(value, torch.optim.Optimizer) and hasattr(value, "param_groups"):
            parameters = [parameter for group in value.param_groups for parameter in group["params"]]
            for label, parameter in zip(optimizer_names(name, value, names), parameters, strict=True):
                if id(parameter) in names:
                    continue
                if any(local_part(part, label).tensor.data_ptr() not in saved for part in plain_parts(parameter)):
                    found.setdefault(name, []).append(label)
    return found


class Flattener:
    """Turns registered objects into a :class:`State`.

    Args:
        objects: by name.
        world_size: number of ranks of the job.
        replicated: patterns of tensor names that the caller knows to be the same on all ranks.
        local: patterns of tensor names of which every rank has its own.
        leave_out: patterns of state paths that are not saved.
    """

    def __init__(
        self,
        objects: Mapping[str, Any],
        *,
        world_size: int,
        replicated: Sequence[str] = (),
        local: Sequence[str] = (),
        leave_out: Sequence[str] = (),
    ) -> None:
        self._objects = objects
        self._world_size = world_size
        self._replicated, self._local, self._leave_out = replicated, local, leave_out
        self._memory: Memory | None = None
        self._tensors: dict[str, LocalTensor] = {}
        self._seen: dict[int, list[str]] = {}
        """By address, the tensors that begin there."""
        self._recalled: tuple[Memory, Sight] | None = None
        """What is recalled, as long as nobody asked for more of it than the names."""

    def flatten(self, *, gradients: bool = False) -> State:
        """The state of this moment. Values are copied into the tree; tensors are referred to, not copied."""
        self._tensors, self._seen, self._recalled = {}, {}, None
        kinds = {name: kind_of(value) for name, value in self._objects.items() if not self._left_out(name)}
        given: list[Given] = []
        for name, kind in kinds.items():
            if kind in ("module", "optimizer"):
                with _told(name):
                    if self._memory is None or name not in self._memory.trees:
                        refuse_unsupported(name, self._objects[name])
                    value = self._objects[name]
                    given.append(Given(name, unwrap(value) if isinstance(value, nn.Module) else value))
        # First the bulk: its order does not depend on whether it is worked out anew.
        parts, labels, again = self._bulk(given)
        count = len(again[0].kept) if again is not None else 0
        trees: dict[str, Json] = {}
        for name, kind in kinds.items():
            with _told(name):
                trees[name] = self._rest(name, kind, parts.get(name), labels.get(name, []), gradients)
        tensors = self._tensors if self._recalled is None else None
        if again is not None and (tensors is None or len(tensors) == count):
            state = State(tensors, trees, kinds, *again)
        else:
            state = State(self._tensors, trees, kinds)
        self._tensors, self._seen, self._recalled = {}, {}, None  # Nothing is kept alive from save to save.
        return state

    def _bulk(
        self, given: Sequence[Given]
    ) -> tuple[dict[str, tuple[Given, dict[str, Json]]], dict[str, list[str]], tuple[Memory, Sight] | None]:
        """The tensors of modules, and those that optimizers keep for each parameter.

        Returns:
            By object, the tree of its state, and for optimizers what else they gave; by optimizer, the names of its
            parameters; and what it was recalled from, or can be from now on, with what was seen.
        """
        wrappers = self._wrappers()
        sight = None
        if not self._leave_out:
            sight = look(given, [(id(module), everywhere, sorted(ignored)) for module, everywhere, ignored in wrappers])
        memory = self._memory
        if sight is not None and memory is not None and memory.fits(sight):
            self._recalled = memory, sight
            return {one.name: (one, memory.tree(one)) for one in given}, memory.labels, self._recalled
        names = parameter_names(self._objects)
        placements = _placements(wrappers)
        trees: dict[str, dict[str, Json]] = {}
        labels: dict[str, list[str]] = {}
        for one in given:
            with _told(one.name):
                if isinstance(one.owner, nn.Module):
                    trees[one.name] = self._module(one, placements)
                else:
                    labels[one.name] = optimizer_names(one.name, one.owner, names)
                    trees[one.name] = self._optimizer(one, labels[one.name], placements)
        self._memory = learn(sight, given, trees, labels, self._seen, self._tensors) if sight is not None else None
        again = (self._memory, sight) if self._memory is not None and sight is not None else None
        return {one.name: (one, trees[one.name]) for one in given}, labels, again

    def _rest(self, name: str, kind: str, part: Any, labels: Sequence[str], gradients: bool) -> Json:
        """The tree of an object, where `part` is what was made of the bulk of it."""
        value = self._objects[name]
        if kind == "module":
            given, tree = part
            return {"state": tree, "gradients": self._gradients(given)} if gradients else {"state": tree}
        if kind == "optimizer":
            given, tree = part
            return {"state": tree, **self._options(given, labels)}
        if kind == "generator":
            state = values.encode(generators.state_of(value, name), name, self._put(Placement.LOCAL))
            held = generators.class_of(value)
            return state if held == generators.PLAIN else {"class": held, "state": state}
        return self._tree(value.state_dict() if kind == "stateful" else value, name)

    def _wrappers(self) -> list[tuple[nn.parallel.DistributedDataParallel, bool, set[str]]]:
        """Every DDP module, whether it sends its buffers around, and the names that it ignores."""
        if self._world_size == 1:
            return []
        return [
            (module, bool(module.broadcast_buffers), set(getattr(module, "parameters_to_ignore", ())))
            for value in self._objects.values()
            if isinstance(value, nn.Module)
            for module in value.modules()
            if isinstance(module, nn.parallel.DistributedDataParallel)
        ]

    def _left_out(self, path: str) -> bool:
        return matches(path, self._leave_out)

    def _tree(self, value: Any, path: str, placement: Placement | None = None) -> Json:
        if self._leave_out:
            value = self._prune(value, path)
        return values.encode(value, path, self._put(placement))

    def _leaf(self, value: Any, path: str, placement: Placement | None) -> Json:
        """The same as `values.encode`, at less cost for a tensor: most of a state is."""
        if type(value) in (torch.Tensor, nn.Parameter):
            return {"$": "tensor", "v": self._add(path, value, placement)}
        return values.encode(value, path, self._put(placement))

    def _prune(self, value: Any, path: str) -> Any:
        if type(value) is dict or (isinstance(value, dict) and type(value).__name__ == "OrderedDict"):
            kept = {k: self._prune(v, f"{path}.{k}") for k, v in value.items() if not self._left_out(f"{path}.{k}")}
            return type(value)(kept)
        if type(value) in (list, tuple):
            # A hole in a list would move what follows: the place is kept.
            return type(value)(
                None if self._left_out(f"{path}[{i}]") else self._prune(v, f"{path}[{i}]") for i, v in enumerate(value)
            )
        return value

    def _put(self, placement: Placement | None = None) -> Any:
        def put(path: str, tensor: torch.Tensor) -> str:
            return self._add(path, tensor, placement)

        return put

    def _add(self, path: str, tensor: torch.Tensor, placement: Placement | None) -> str:
        """Take a tensor into the state; returns the name under which it is saved, an earlier one where it is tied."""
        if self._recalled is not None:
            # It may be one of those that are recalled.
            memory, sight = self._recalled
            self._tensors, self._seen, self._recalled = memory.tensors(sight), dict(memory.seen), None
        part = local_part(tensor, path)
        local = part.tensor
        address = local.data_ptr()  # 0 for an empty tensor, which shares nothing.
        tied: Sequence[str] = self._seen.get(address, ()) if address else ()
        for other in tied:
            before = self._tensors[other]
            if before.shape == part.shape and memory_key(before.tensor) == memory_key(local):
                return other
        if self._world_size == 1:
            part.placement = Placement.ROOT
        elif part.placement is not Placement.SHARDED:
            if matches(path, self._local):
                placement = Placement.LOCAL
            elif matches(path, self._replicated):
                placement = Placement.REPLICATED
            part.placement = placement or Placement.UNKNOWN
        name = path
        while name in self._tensors:
            name += "+"
        self._tensors[name] = part
        if address:
            self._seen[address] = [*tied, name]
        return name

    def _module(self, given: Given, placements: Mapping[int, Placement]) -> dict[str, Json]:
        module, name = cast(nn.Module, given.owner), given.name
        renames = clean_names(module)
        by_key: dict[str, Placement] = {}
        owners = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        for key, tensor in owners:
            if is_lazy(tensor):
                raise LastGoodError(
                    f"{name}.{key} is a lazy parameter without a shape yet: run one forward pass before it is saved "
                    "or restored."
                )
            if id(tensor) in placements:
                by_key[key] = placements[id(tensor)]
        tree: dict[str, Json] = {}
        for key, tensor in given.state.items():
            short = clean(key, renames) if renames else key
            path = f"{name}.{short}"
            if not (self._leave_out and self._left_out(path)):
                tree[short] = self._leaf(tensor, path, by_key.get(key))
        return tree

    def _gradients(self, given: Given) -> dict[str, Json]:
        module, name = cast(nn.Module, given.owner), given.name
        renames = clean_names(module)
        found = {}
        for key, parameter in module.named_parameters():
            if parameter.grad is not None:
                path = f"{name}.{clean(key, renames)}.grad"
                found[clean(key, renames)] = values.encode(parameter.grad, path, self._put(Placement.LOCAL))
        return found

    def _optimizer(
        self, given: Given, labels: Sequence[str], placements: Mapping[int, Placement]
    ) -> dict[str, dict[str, Json]]:
        """What it keeps for each parameter."""
        optimizer, name = cast(torch.optim.Optimizer, given.owner), given.name
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        tree: dict[str, Json] = {}
        for index, held in given.state["state"].items():
            if type(index) is not int or index >= len(labels):
                continue
            placement, path = placements.get(id(parameters[index])), f"{name}.state.{labels[index]}"
            if self._leave_out:
                if not self._left_out(path):
                    tree[labels[index]] = self._tree(held, path, placement)
            elif type(held) is dict and "$" not in held and all(type(key) is str for key in held):
                tree[labels[index]] = {key: self._leaf(item, f"{path}.{key}", placement) for key, item in held.items()}
            else:
                tree[labels[index]] = self._tree(held, path, placement)
        return tree

    def _options(self, given: Given, labels: Sequence[str]) -> dict[str, Json]:
        """What an optimizer holds beside the state of its parameters."""
        name = given.name
        shared, groups, extra = given.beside(len(labels))
        tree: dict[str, Json] = {"groups": [], "shared": self._tree(shared, f"{name}.state")}
        for number, (options, indices) in enumerate(groups):
            encoded = self._tree(options, f"{name}.groups[{number}]", Placement.ROOT)
            tree["groups"].append({"options": encoded, "params": [labels[index] for index in indices]})
        tree["extra"] = self._tree(extra, f"{name}.extra")
        return tree


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Name the object whose state could not be taken."""
    try:
        yield
    except (LastGoodError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # torch's CheckpointException is no Exception.
        raise LastGoodError(
            f"{name}: its state could not be taken ({type(error).__name__}: {error}). Nothing was written."
        ) from error


def _placements(
    wrappers: Sequence[tuple[nn.parallel.DistributedDataParallel, bool, set[str]]],
) -> dict[int, Placement]:
    """By id, the placement of every parameter and buffer under DDP."""
    placements: dict[int, Placement] = {}
    for module, everywhere, ignored in wrappers:
        for key, parameter in module.module.named_parameters():
            if key not in ignored:
                placements[id(parameter)] = Placement.REPLICATED
        # DDP copies rank 0's buffers to the others at the next forward, unless told not to.
        buffers = Placement.ROOT if everywhere else Placement.LOCAL
        for key, buffer in module.module.named_buffers():
            placements[id(buffer)] = Placement.UNKNOWN if key in ignored else buffers
    return placements


def memory_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are one and the same memory, seen in the same way."""
    signs = tensor.is_conj(), tensor.is_neg()
    # What MPS has for an address is that of an object, to which it adds the offset: it may be another tensor's, too.
    offset = (tensor.untyped_storage().data_ptr(), tensor.storage_offset()) if tensor.is_mps else 0
    return tensor.device, tensor.data_ptr(), offset, tensor.dtype, tuple(tensor.shape), tensor.stride(), signs


def local_part(tensor: torch.Tensor, path: str) -> LocalTensor:
    """What this rank holds of a tensor. Raises LastGoodError for a kind of tensor that cannot be saved or restored."""
    kind = type(tensor)
    if kind.__name__ == "DTensor":
        return _dtensor_part(tensor, path)
    # Not isinstance: that is true of a subclass that was made a parameter.
    if kind is not torch.Tensor and not issubclass(kind, nn.Parameter):
        raise LastGoodError(
            f"{path}: a tensor of the class {kind.__module__}.{kind.__qualname__} cannot be saved. Nothing was "
            "written. Convert it to a plain tensor, or leave it out with leave_out=[...]."
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise LastGoodError(
            f"{path}: a sparse, quantized or nested tensor cannot be saved. Nothing was written. Convert it to a dense "
            "one, or leave it out with leave_out=[...]."
        )
    if tensor.is_meta:
        raise LastGoodError(
            f"{path} is on the meta device: it has a shape but no values to save or restore into. "
            "Give it some (to_empty and an initialisation), or leave it out with leave_out=[...]."
        )
    plain = tensor.detach() if tensor.requires_grad else tensor
    shape, strides = tuple(tensor.shape), plain.stride()
    unusual = strides != row_strides(shape) and plain.numel() and is_dense(shape, strides)
    dtype = dtype_name(plain.dtype, path)
    return LocalTensor(
        plain, Placement.UNKNOWN, shape, (0,) * len(shape), plain, dtype, strides=strides if unusual else None
    )


def _dtensor_part(tensor: Any, path: str) -> LocalTensor:
    from torch.distributed.tensor import Partial, Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise LastGoodError(f"{path}: a DTensor with a pending reduction (Partial) cannot be saved; redistribute it.")
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    coordinate = tensor.device_mesh.get_coordinate()
    # Of the ranks that hold the same box, the first along every replicated mesh dimension writes it.
    writes = coordinate is not None and all(
        coordinate[i] == 0 for i, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)
    )
    local = tensor.to_local().detach()
    if is_composed(type(local)):
        raise LastGoodError(
            f"{path}: a DTensor whose parts are of the class {name_of(type(local))} cannot be saved. Nothing was "
            "written. Convert it to a plain tensor, or leave it out with leave_out=[...]."
        )
    writes = writes and local.numel() > 0
    dtype = dtype_name(local.dtype, path)
    return LocalTensor(local, Placement.SHARDED, tuple(tensor.shape), tuple(offsets), tensor, dtype, writes)
