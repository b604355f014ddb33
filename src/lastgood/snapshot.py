"""A consistent copy of the state in host memory, taken while training goes on, in buffers that are kept between saves.

What an optimizer step changes does not change between ``save`` and the next step: large tensors of that kind are
copied in the background, and a hook before the step waits for what is left of them. All else is copied at once. What is
frozen lies in the buffer since an earlier save: it is compared by checksum while the writing has begun.
On a GPU the copies are queued on a stream of their own; the hook makes the GPU wait, not the program.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import torch

from lastgood.direct_io import PAGE
from lastgood.dtypes import DTYPES
from lastgood.errors import SaveError
from lastgood.filling import THREADS, Filling, Kept, Late
from lastgood.placement import LocalTensor, Placement
from lastgood.plan import Layout, lay_out
from lastgood.shard import Piece, piece_checksum
from lastgood.state import State
from lastgood.steady import OVERLAP_BYTES
from lastgood.watch import Samples, Watch, all_plain, is_plain, memory, version

_STRIDE = 16 << 20
# Bytes copied at a time: the writer follows as the copy advances.
_PLANS = 16
# Layouts that are remembered.
_NBYTES = attrgetter("nbytes")
_move_bytes = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)
# To, from, bytes. It keeps the GIL: thousands of small ones would wait thousands of times to get it back.


class _Copies:
    """The copying of tensors from where they lie to their pieces of the buffer; the same as long as they lie there.

    Args:
        numbers: which of the large tensors of the plan they are.
    """

    def __init__(self, numbers: Sequence[int], addresses: Sequence[int], pieces: Sequence[Piece]) -> None:
        self.places = numbers, addresses
        self.names = [piece.name for piece in pieces]
        self.samples = Samples(addresses, [piece.size for piece in pieces])
        self.todo = [
            (piece.at + offset, address + offset, min(_STRIDE, piece.size - offset))
            for piece, address in zip(pieces, addresses, strict=True)
            for offset in range(0, piece.size, _STRIDE)
        ]


@dataclass(slots=True)
class _Part:
    """A piece, and where it comes from and goes to."""

    piece: Piece
    target: torch.Tensor
    """Its place in the buffer."""
    source: int = -1
    """The place of its tensor among the sources of the state."""


@dataclass(slots=True)
class _Plan:
    """How the buffer is filled, as long as the structure of the state is the same."""

    layout: Layout
    parts: list[_Part]
    small: list[_Part]
    """Small whole tensors in host memory. Many, so that they are copied in one call."""
    large: list[_Part]
    """Those in host memory that are worth copying in the background."""
    others: list[_Part]
    """What is on a GPU, or does not lie in memory as it is saved."""
    addresses: list[int]
    """Of the places of the small ones."""
    sizes: list[int]
    """Bytes of the small ones."""
    large_sizes: list[int]
    """Bytes of the large ones."""
    whole: bool
    """Whether all of the large ones are whole tensors."""
    token: object = None
    """Of the state that the places of the sources are of."""
    sources: list[int] = field(default_factory=list)
    """Those of the small ones."""
    large_sources: list[int] = field(default_factory=list)
    """Those of the large ones."""
    all_late: tuple[object, object] = None, None
    """For which places of the tensors, and which steady ones, all of the large ones could wait."""
    copies: _Copies | None = None
    """The copying that was put off last."""

    def find(self, state: State) -> None:
        """Look up the places of the sources."""
        if state.token is None or state.token is not self.token:
            index = state.index
            for part in self.parts:
                part.source = index[part.piece.name]
            self.sources = [part.source for part in self.small]
            self.large_sources = [part.source for part in self.large]
            self.token = state.token


def _no_plan(rank: int) -> _Plan:
    return _Plan(Layout(rank, [], [], [], {}, 0, ()), [], [], [], [], [], [], [], True)


class Snapshot:
    """The host buffer of one rank, the layout by which it is filled, and the filling.

    A layout and its typed views into the buffer are made once for every division of the writing, and used again as
    long as the structure of the state is the same: a save of many small tensors then costs one copy each and nothing
    else.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._plans: dict[object, _Plan] = {}
        self._plan = _no_plan(rank)
        self._key: object = None
        """The structure of the state for which there are plans, and the token of such a state."""
        self._token: object = None
        self._storage = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._buffer = self._storage
        self.layout = self._plan.layout
        self.view = memoryview(b"")
        """The bytes of the buffer."""
        self._filling = Filling()
        self._kept: dict[str, tuple[int, str]] = {}
        """By name, where the buffer holds a frozen tensor since the last save, and its checksum."""
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._events: list[tuple[torch.device, torch.cuda.Event]] = []
        self._queued: list[tuple[str, torch.Tensor, int]] = []
        """Steady tensors of the GPU whose copy is queued, with their versions, until the first hook has looked."""

    @property
    def size(self) -> int:
        """Bytes of host memory that are held."""
        return self._storage.numel()

    def take(
        self,
        state: State,
        writers: Sequence[int],
        steady: frozenset[int],
        still: frozenset[str] = frozenset(),
        unchanged: frozenset[str] = frozenset(),
    ) -> None:
        """Copy the state, but for what :meth:`begin` does. Training may then change every tensor not in `steady`.

        The caller makes sure that nobody reads the buffer any more, and that :meth:`wait` is called before a steady
        tensor changes.

        Args:
            state: its tensors are copied.
            writers: the ranks that share the writing.
            steady: addresses of tensors that change in optimizer steps only.
            still: names of the tensors that are frozen, and go to a file of their own.
            unchanged: those of them that seem to be what they were at the last save.
        """
        self.wait()
        self._events = []
        self._prepare(state, writers, still)
        plan, sources = self._plan, state.sources
        plan.find(state)
        before = self._kept if self.overlap else {}
        # What lies in the memory of a GPU is copied anew: there, nobody compares.
        self._kept = {
            part.piece.name: before[part.piece.name]
            for part in plan.large
            if part.piece.name in unchanged and before.get(part.piece.name, (-1,))[0] == part.piece.at
        }
        with torch.no_grad():
            queue: list[tuple[torch.Tensor, torch.Tensor]] = []
            queued: list[tuple[str, torch.Tensor, int]] = []
            targets: list[torch.Tensor] = []
            rest: list[torch.Tensor] = []
            small = [sources[number] for number in plan.sources]
            if all_plain(small) and list(map(_NBYTES, small)) == plan.sizes:
                deque(map(_move_bytes, plan.addresses, map(torch.Tensor.data_ptr, small), plan.sizes), maxlen=0)
            else:
                targets += [part.target for part in plan.small]
                rest += small
            large = [sources[number] for number in plan.large_sources]
            if not plan.whole:
                large = [_source(source, part.piece) for source, part in zip(large, plan.large, strict=True)]
            late = self._choose(plan, large, steady, state.places)
            if len(late) < len(large):
                now = set(range(len(large))) - set(late)
                targets += [plan.large[number].target for number in now]
                rest += [large[number] for number in now]
            for part in plan.others:
                source = _source(sources[part.source], part.piece)
                if source.is_cuda:
                    queue.append((part.target, source))
                    if self.overlap and source.untyped_storage().data_ptr() in steady:
                        queued.append((part.piece.name, source, version(source)))
                elif source.is_cpu:
                    targets.append(part.target)
                    rest.append(source)
                else:
                    part.target.copy_(source.cpu())  # MPS writes to no address but multiples of 4.
            if targets:
                torch._foreach_copy_(targets, rest)  # One call for all: many small ones cost more than the bytes do.
            if queue:
                self._queue(queue, steady)
                self._queued = queued
        self._filling.put_off(self._put_off(plan, large, late))

    def _choose(
        self,
        plan: _Plan,
        large: Sequence[torch.Tensor],
        steady: frozenset[int],
        places: object,
    ) -> Sequence[int]:
        """Which of the large tensors can wait to be copied or compared, in the order of the buffer."""
        if not self.overlap:
            return ()
        if places is not None and plan.all_late[0] is places and plan.all_late[1] is steady and all_plain(large):
            return range(len(large))
        storages = map(torch.UntypedStorage.data_ptr, map(torch.Tensor.untyped_storage, large))
        known = list(map(steady.__contains__, storages))
        if self._kept:
            # Not all that seems unchanged: what is copied late is compared by a few words, what is kept as a whole.
            known = [one or part.piece.name in self._kept for one, part in zip(known, plan.large, strict=True)]
        if all(known) and all_plain(large) and list(map(_NBYTES, large)) == plan.large_sizes:
            if not self._kept:
                plan.all_late = places, steady
            return range(len(large))
        return [
            number
            for number, (one, source, size) in enumerate(zip(known, large, plan.large_sizes, strict=True))
            if one and is_plain(source) and source.nbytes == size
        ]

    def _put_off(self, plan: _Plan, large: Sequence[torch.Tensor], late: Sequence[int]) -> Late:
        """What is to be done in the background about the large tensors that can wait."""
        numbers = [number for number in late if plan.large[number].piece.name not in self._kept] if self._kept else late
        found = Late()
        if len(numbers) < len(late):
            kept = []
            for number in late:
                source, piece = large[number], plan.large[number].piece
                if piece.name in self._kept:
                    digest = self._kept[piece.name][1]
                    kept.append(Kept(piece.name, source.untyped_storage(), source.data_ptr(), piece.size, digest))
            found.kept = [share for share in (kept[number::THREADS] for number in range(THREADS)) if share]
        if numbers:
            tensors = [large[number] for number in numbers]
            addresses = list(map(torch.Tensor.data_ptr, tensors))
            if plan.copies is None or plan.copies.places != (numbers, addresses):
                plan.copies = _Copies(numbers, addresses, [plan.large[number].piece for number in numbers])
            found.watch = Watch(plan.copies.names, tensors, plan.copies.samples)
            found.todo = plan.copies.todo
        return found

    @property
    def overlap(self) -> bool:
        """Whether tensors may be copied while training goes on: not since one was changed meanwhile."""
        return self._filling.overlap

    def begin(self) -> None:
        """Begin with the copying in the background, where nobody has yet: the last thing that a save does."""
        self._filling.begin()

    def wait(self) -> None:
        """Return when every tensor may change: before an optimizer step, or before changing weights by hand.

        With CUDA tensors the GPU waits instead, on its current stream.
        """
        self._filling.begin()
        self._look_at_queued()
        for device, event in self._events:
            torch.cuda.current_stream(device).wait_event(event)
        self._filling.wait()

    def close(self) -> None:
        """Give the memory back. The caller makes sure that nobody reads it any more."""
        self.wait()
        self._filling.close()
        self._forget_plans()
        self._key = self._token = None
        self._events = []
        self._storage = self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.view = memoryview(b"")

    def await_bytes(self, end: int, *, patient: bool = False) -> None:
        """Return when the first `end` bytes of the buffer are there. Raises SaveError if they are not of one moment.

        Not to raise proves nothing: that is what :meth:`confirm` is for.

        Args:
            patient: nor as long as the training waits for the rest: the cores are for that.
        """
        self._filling.begin()
        for _, event in list(self._events):
            event.synchronize()
        self._look_at_queued()
        self._filling.await_bytes(end, patient=patient)

    def confirm(self) -> None:
        """Return when the whole buffer is there and known to be of one moment. Raises SaveError if it is not."""
        self.await_bytes(self.layout.size)
        self._filling.confirm()

    def keep(self, pieces: Sequence[Piece], checksums: Sequence[str]) -> None:
        """Note the checksums of what the buffer holds of frozen tensors: at the next save it need not be copied."""
        if pieces is self.layout.frozen:
            self._kept = {piece.name: (piece.at, digest) for piece, digest in zip(pieces, checksums, strict=True)}

    def forget(self) -> None:
        """Copy everything at the next save: the state was replaced."""
        self._kept = {}

    def checksum_of(self, piece: Piece) -> str:
        """The checksum of a frozen piece; of one that was not copied it is not confirmed yet."""
        known = self._kept.get(piece.name)
        return known[1] if known is not None else piece_checksum(piece, self)

    def holds(self, state: State) -> bool:
        """Whether the state that was copied last is the present one, bit for bit."""
        try:
            self.confirm()
        except SaveError:
            return False
        if _structure(state.tensors) != self._key:
            return False
        with torch.no_grad():
            for part in self._plan.parts:
                present = torch.empty(part.target.shape, dtype=part.target.dtype, device="cpu")
                present.copy_(_source(state.tensors[part.piece.name].tensor, part.piece))
                if not torch.equal(present.reshape(-1).view(torch.uint8), part.target.reshape(-1).view(torch.uint8)):
                    return False
        return True

    def _look_at_queued(self) -> None:
        """Whether something other than a step changed a tensor of the GPU since ``save``: before a step, or later."""
        self._filling.check(self._changed_of_queued)

    def _changed_of_queued(self) -> str | None:
        queued, self._queued = self._queued, []
        return next((name for name, source, before in queued if version(source) != before), None)

    def _queue(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], steady: frozenset[int]) -> None:
        """Queue the copies of CUDA tensors: first those that may change at any time, for which the GPU waits here."""
        self._events = []
        for device in dict.fromkeys(source.device for _, source in pairs):
            current = torch.cuda.current_stream(device)
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
            stream.wait_stream(current)
            mine = [pair for pair in pairs if pair[1].device == device]
            mine.sort(key=lambda pair: self.overlap and pair[1].untyped_storage().data_ptr() in steady)
            unsteady = [pair for pair in mine if not (self.overlap and pair[1].untyped_storage().data_ptr() in steady)]
            with torch.cuda.stream(stream):
                for index, (target, source) in enumerate(mine):
                    if index == len(unsteady):
                        current.wait_stream(stream)
                    target.copy_(source, non_blocking=True)
                    source.record_stream(stream)
                if len(unsteady) == len(mine):
                    current.wait_stream(stream)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(stream)
            self._events.append((device, event))

    def _prepare(self, state: State, writers: Sequence[int], still: frozenset[str]) -> None:
        if state.token is None or state.token is not self._token:
            structure = _structure(state.tensors)
            if structure != self._key:
                self._plans.clear()
                self._key = structure
            self._token = state.token
        key = tuple(writers), still
        if key not in self._plans:
            tensors = state.tensors
            layout = lay_out(tensors, self._rank, writers, still)
            if layout.size > self.size - PAGE or self.size > 2 * layout.size + (1 << 20):
                # The old buffer goes first: two at once would be twice the memory that is promised.
                self._forget_plans()
                self._kept = {}
                self._buffer, self.view = torch.empty(0, device="cpu"), memoryview(b"")
                self._storage = torch.empty(0, device="cpu")
                pin = torch.cuda.is_available() and any(t.tensor.is_cuda for t in tensors.values())
                self._storage = torch.empty(layout.size + PAGE, dtype=torch.uint8, device="cpu", pin_memory=pin)
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            self._set_view(layout)
            self._plans[key] = self._make_plan(layout, tensors)
        self._plan = self._plans[key]
        if self._plan.layout is not self.layout:
            self._set_view(self._plan.layout)
        self._filling.reset(self._buffer.data_ptr(), self.layout.size)

    def _make_plan(self, layout: Layout, tensors: Mapping[str, LocalTensor]) -> _Plan:
        parts = [_Part(piece, self._target(piece)) for piece in layout.pieces()]
        small: list[_Part] = []
        large: list[_Part] = []
        others: list[_Part] = []
        for part in parts:
            source = tensors[part.piece.name].tensor
            if source.is_cpu and part.piece.size >= OVERLAP_BYTES:
                large.append(part)
            elif source.is_cpu and source.shape == part.piece.shape and source.is_contiguous():
                (others if source.is_complex() else small).append(part)
            else:
                others.append(part)
        addresses = [part.target.data_ptr() for part in small]
        sizes, large_sizes = ([part.piece.size for part in some] for some in (small, large))
        whole = all(part.piece.shape == tensors[part.piece.name].tensor.shape for part in large)
        return _Plan(layout, parts, small, large, others, addresses, sizes, large_sizes, whole)

    def _forget_plans(self) -> None:
        """They hold the memory of the buffer."""
        self._plans.clear()
        self._plan = _no_plan(self._rank)
        self.layout = self._plan.layout

    def _set_view(self, layout: Layout) -> None:
        self.layout = layout
        start = -self._storage.data_ptr() % PAGE
        self._buffer = self._storage[start : start + layout.size]
        self.view = memory(self._buffer.data_ptr(), layout.size)

    def _target(self, piece: Piece) -> torch.Tensor:
        raw = self._buffer[piece.at : piece.at + piece.size]
        return raw.view(DTYPES[piece.dtype]).view(piece.shape)


def _structure(tensors: Mapping[str, LocalTensor]) -> object:
    return [
        (name, t.tensor.dtype, t.tensor.device, t.shape, t.placement)
        if t.placement is not Placement.SHARDED
        else (name, t.tensor.dtype, t.tensor.device, t.shape, t.tensor.shape, t.offsets, t.writes)
        for name, t in tensors.items()
    ]


def _source(part: torch.Tensor, piece: Piece) -> torch.Tensor:
    if part.shape == piece.shape:
        return part
    # A share of a replicated tensor: rows of it.
    return part.narrow(0, piece.offsets[0], piece.shape[0])
