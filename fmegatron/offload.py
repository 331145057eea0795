"""What blocks' graphs keep for their backward, in host memory while other blocks run.

    offload = Offload(copies, held, blocks)
    stash = offload.open(fixed);  with watching(stash): run a block forward;  offload.close(stash, live)
    offload.ready(stash);  run its backward;  offload.done(stash)                               the last block first

The residuals of at most `held` blocks are on the device at any time: a block starts when those of the block `held` before it
are away, and when a block's backward is over, those of the block `held` behind it start to come back. With two, both ways are
under way while another block computes. What others still use, and parameters, stay where they are.

The way of a residual out of a graph is `torch.autograd.graph.saved_tensors_hooks`, entered for one block's forward alone;
compiled blocks give theirs to it too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Wait = Callable[[], None]  # the device goes on when the copies are done; the host does not wait


class Copies(Protocol):
    """How tensors travel between a device and host memory. What is copied must live until `Wait` was called."""

    def out(self, xs: Sequence[Tensor], into: Sequence[Tensor] | None = None) -> tuple[list[Tensor], Wait]:
        """Start copies in host memory; into: over these tensors there."""

    def back(self, xs: Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], Wait]:
        """Start copies on the device."""

    def finish(self) -> None:
        """The host waits until all that went out is there, for it to read."""


@dataclass(frozen=True)
class Plain:
    """Copies where host memory is the device's own, on CPU and on meta tensors: done when they are issued."""

    def out(self, xs: Sequence[Tensor], into: Sequence[Tensor] | None = None) -> tuple[list[Tensor], Wait]:
        """Clones."""
        return [x.clone() for x in xs] if into is None else [y.copy_(x) for x, y in zip(xs, into, strict=True)], _nothing

    def back(self, xs: Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], Wait]:
        """Clones."""
        return [x.clone() for x in xs], _nothing

    def finish(self) -> None:
        """They are."""


@dataclass(frozen=True)
class Pinned:
    """Copies between CUDA and pinned host memory, each way on a stream of its own.

    A target on the device is made on the computing stream and freed there, which waits for the copy before: so its memory is
    never another's while it travels.
    """

    outward: torch.cuda.Stream
    inward: torch.cuda.Stream

    def out(self, xs: Sequence[Tensor], into: Sequence[Tensor] | None = None) -> tuple[list[Tensor], Wait]:
        """Copies in pinned memory; torch keeps freed blocks of it for the next, in sizes of powers of two."""
        made = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in xs] if into is None else list(into)
        return self._along(self.outward, xs, made)

    def back(self, xs: Sequence[Tensor], device: torch.device) -> tuple[list[Tensor], Wait]:
        """Copies on the device."""
        return self._along(self.inward, xs, [torch.empty_like(x, device=device) for x in xs])

    def finish(self) -> None:
        """Waits for the stream."""
        self.outward.synchronize()

    def _along(self, stream: torch.cuda.Stream, xs: Sequence[Tensor], targets: list[Tensor]) -> tuple[list[Tensor], Wait]:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for target, x in zip(targets, xs, strict=True):
                target.copy_(x, non_blocking=True)
            done = stream.record_event()
        return targets, lambda: torch.cuda.current_stream(stream.device).wait_event(done)


def copies_of(device: torch.device) -> Copies:
    """How tensors travel between a device and host memory."""
    return Pinned(torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else Plain()


def _nothing() -> None:
    pass


class Slot:
    """The memory of one saved storage, on the device or in host memory; it lives as long as a graph needs it."""

    def __init__(self, device: Tensor) -> None:
        self.device: Tensor | None = device
        self.host: Tensor | None = None


class Saved(NamedTuple):
    """A tensor in a slot."""

    slot: Slot
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def unpack(x: Tensor | Saved) -> Tensor:
    """The residual, which is on the device now: the inverse of `Stash.pack`."""
    if isinstance(x, Tensor):
        return x
    flat = x.slot.device
    assert flat is not None, "a backward runs before its residuals are back"
    return flat.view(x.dtype).as_strided(x.size, x.stride, x.offset)


class Stash:
    """One block's residuals. fixed: tensors whose memory is not the block's: parameters, what all blocks read."""

    def __init__(self, copies: Copies, fixed: Iterable[Tensor]) -> None:
        self.copies = copies
        self.fixed = {storage_of(x): x for x in fixed}
        self.slots: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()
        self.moving: tuple[list[Slot], Sequence[Tensor], Wait] = ([], (), _nothing)

    def pack(self, x: Tensor) -> Tensor | Saved:
        """A residual, noted; itself where it is fixed, or of a kind that has no plain memory."""
        if type(x) is not Tensor or x.layout != torch.strided or x.is_conj() or x.is_neg() or not x.untyped_storage().nbytes():
            return x
        key = storage_of(x)
        if key in self.fixed:
            return x
        slot = self.slots.get(key)
        if slot is None:
            whole = x.untyped_storage().nbytes() // x.element_size()
            self.slots[key] = slot = Slot(x.detach().as_strided((whole,), (1,), 0))
        return Saved(slot, x.dtype, x.size(), x.stride(), int(x.storage_offset()))

    def send(self, live: Iterable[Tensor]) -> None:
        """Start the copies to host memory, but of what shares its memory with live tensors."""
        others = {storage_of(x) for x in live}
        slots = [slot for key, slot in self.slots.items() if key not in others]
        xs = [slot.device for slot in slots if slot.device is not None]
        hosts, wait = self.copies.out(xs)
        for slot, host in zip(slots, hosts, strict=True):
            slot.host = host
        self.moving = (slots, xs, wait)

    def drop(self) -> None:
        """Give the device's memory back, once the copies are done."""
        slots, _, wait = self.moving
        wait()
        for slot in slots:
            slot.device = None
        self.moving = ([], (), _nothing)

    def fetch(self) -> None:
        """Start the copies back."""
        away = [(slot, slot.host) for slot in self.slots.values() if slot.device is None and slot.host is not None]
        if away:
            xs = [host for _, host in away]
            made, wait = self.copies.back(xs, next(iter(self.fixed.values())).device)
            for (slot, _), x in zip(away, made, strict=True):
                slot.device, slot.host = x, None
            self.moving = ([], xs, wait)

    def ready(self) -> None:
        """Wait for them."""
        self.moving[2]()
        self.moving = ([], (), _nothing)


def watching(stash: Stash | None) -> AbstractContextManager[Any]:
    """Where a block runs forward: what its graph saves goes to the stash."""
    return nullcontext() if stash is None else saved_tensors_hooks(stash.pack, unpack)


@dataclass
class Offload:
    """The stashes of one walk's blocks, in order. held: how many may be on the device at once, None: there are no stashes;
    blocks: how many there will be.
    """

    copies: Copies = field(default_factory=Plain)
    held: int | None = None
    blocks: int = 0
    stashes: list[Stash] = field(default_factory=list)

    def open(self, fixed: Sequence[Tensor]) -> Stash | None:
        """The stash of the next block, which is about to run forward; `fixed` as of `Stash`."""
        if self.held is None:
            return None
        if len(self.stashes) >= self.held:
            self.stashes[-self.held].drop()
        self.stashes.append(Stash(self.copies, fixed))
        return self.stashes[-1]

    def close(self, stash: Stash | None, live: Iterable[Tensor]) -> None:
        """The block ran: its residuals may go, unless they are among the first that come back. live: what others may use."""
        if stash is not None and self.held is not None and len(self.stashes) <= self.blocks - self.held:
            stash.send(live)

    def ready(self, stash: Stash | None) -> None:
        """The block's backward is about to run; it is the last that has not."""
        if stash is not None:
            assert stash is self.stashes[-1]
            stash.ready()

    def done(self, stash: Stash | None) -> None:
        """It ran."""
        if stash is not None and self.held is not None:
            self.stashes.pop()
            if len(self.stashes) >= self.held:
                self.stashes[-self.held].fetch()


def storage_of(x: Any) -> int:
    """What two tensors have in common that share their memory."""
    return x.untyped_storage()._cdata
