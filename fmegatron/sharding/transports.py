"""Transports: how values travel along one mesh axis of n ranks.

Each transport offers the same few primitives. "Blocks" are n equal pieces on a new leading dim:

    all_reduce(x, axis, op)     x                  -> sum or max over the n ranks
    all_gather(x, axis)         x                  -> blocks, one from each rank
    reduce_scatter(b, axis)     blocks             -> the sum over ranks of the block with my coordinate
    all_to_all(b, axis)         blocks             -> block j of rank i becomes block i of rank j
    permute(x, axis, source)    x                  -> the x of rank source[me]
    pick(b, axis, rank)         blocks             -> the block with my coordinate         (no communication)
    spread(x, axis, rank)       x                  -> blocks, zeros but for mine           (no communication)
    exchange(x, axis, rank, send, receive)   rows, send[i] of them for rank i -> receive[i] rows from each rank i
    keep_first(x, axis, rank)   x                  -> x where my coordinate is 0, else zeros
    wait(x)                     an issued result   -> the result

On a virtual mesh every tensor has the ranks on its leading dim (behind the dim of blocks), put there by the vmap rule of
`collectives.apply`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fmegatron.sharding.mesh import Axis


Splits = tuple[int, ...]


class Transport(Protocol):
    """What a collective needs of the machine; see the module's table. `background`: issued work goes on by itself."""

    @property
    def background(self) -> bool: ...
    def all_reduce(self, x: Tensor, axis: Axis, rank: Tensor, op: str) -> Tensor: ...
    def all_gather(self, x: Tensor, axis: Axis, rank: Tensor) -> Tensor: ...
    def reduce_scatter(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor: ...
    def all_to_all(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor: ...
    def permute(self, x: Tensor, axis: Axis, rank: Tensor, source: tuple[int, ...]) -> Tensor: ...
    def exchange(self, x: Tensor, axis: Axis, rank: Tensor, send: Splits, receive: Splits) -> Tensor: ...
    def pick(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor: ...
    def spread(self, x: Tensor, axis: Axis, rank: Tensor) -> Tensor: ...
    def keep_first(self, x: Tensor, axis: Axis, rank: Tensor) -> Tensor: ...
    def wait(self, x: Tensor) -> Tensor: ...


class Even:
    """A transport that has no exchange of unequal parts."""

    def exchange(self, x: Tensor, axis: Axis, rank: Tensor, send: Splits, receive: Splits) -> Tensor:
        raise ValueError(f"rows along axis {axis.name!r} are all of one number on this mesh: use dispatch 'padded' or 'gather'")


@dataclass(frozen=True)
class Around:
    """What a transport around another starts from: what does not communicate is the other's."""

    inner: Transport

    @property
    def background(self) -> bool:
        """As the inner transport."""
        return self.inner.background

    def pick(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        return self.inner.pick(blocks, axis, rank)

    def spread(self, x: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        return self.inner.spread(x, axis, rank)

    def keep_first(self, x: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        return self.inner.keep_first(x, axis, rank)


class OneRank(Even):
    """The primitives without communication, for transports on which a rank sees only its own values."""

    background = False

    def pick(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        return blocks.index_select(0, axis.coordinate(rank).reshape(1)).squeeze(0)

    def spread(self, x: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        mine = torch.arange(axis.size, device=x.device) == axis.coordinate(rank)
        return torch.where(mine.reshape(-1, *[1] * x.dim()), x, x.new_zeros(()))

    def keep_first(self, x: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        return torch.where(axis.coordinate(rank) == 0, x, torch.zeros_like(x))

    def wait(self, x: Tensor) -> Tensor:
        return x


@torch.library.custom_op("fmegatron::gather_blocks", mutates_args=("blocks",))
def gather_blocks(blocks: Tensor, place: int, group: str) -> None:
    """Fill blocks, of which `place` is there; issued, not waited for."""
    # One tensor, so that Inductor knows what is sent to be in use until it is waited for: with `out=` it would reuse that.
    # Not all_gather_into_tensor: gloo's threads race for the memory of its long name (tests/sharding/test_transports.py)
    mine = blocks.narrow(0, place, 1)
    torch.ops._c10d_functional.all_gather_into_tensor_out(mine, len(blocks), group, out=blocks)


@dataclass(frozen=True)
class Group(OneRank):
    """A process group, through the functional collectives that Inductor knows; results are issued, `wait` completes them.

    They are no views: where a view is waited for, Inductor gives the memory of what is still being sent to other tensors.
    place: this process's coordinate on the axis. A permutation is an all-to-all in which each rank sends to one.
    late: a second group of the same ranks, for what is on its way while steps go on; empty: there is none.
    """

    name: str
    place: int
    late: str = ""
    background = True

    def all_reduce(self, x: Tensor, axis: Axis, rank: Tensor, op: str) -> Tensor:
        return torch.ops._c10d_functional.all_reduce(x.contiguous(), op, self.name)

    def all_gather(self, x: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        blocks = x.new_empty(axis.size, *x.shape)
        blocks[self.place] = x
        gather_blocks(blocks, self.place, self.name)
        return blocks

    def reduce_scatter(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        flat = blocks.contiguous().flatten(0, 1)
        return torch.ops._c10d_functional.reduce_scatter_tensor(flat, "sum", axis.size, self.name)

    def all_to_all(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        sizes = [1] * axis.size
        return torch.ops._c10d_functional.all_to_all_single(blocks.contiguous(), sizes, sizes, self.name)

    def permute(self, x: Tensor, axis: Axis, rank: Tensor, source: tuple[int, ...]) -> Tensor:
        rows = x.contiguous() if x.dim() else x.reshape(1)
        comes = [len(rows) * (j == source[self.place]) for j in range(axis.size)]
        goes = [len(rows) * (source[j] == self.place) for j in range(axis.size)]
        return torch.ops._c10d_functional.all_to_all_single(rows, comes, goes, self.name).view(x.shape)

    def exchange(self, x: Tensor, axis: Axis, rank: Tensor, send: Splits, receive: Splits) -> Tensor:
        return torch.ops._c10d_functional.all_to_all_single(x, list(receive), list(send), self.name)

    def wait(self, x: Tensor) -> Tensor:
        return torch.ops._c10d_functional.wait_tensor(x)


def behind(via: Transport) -> Transport:
    """The same transport by its second group, where it has one."""
    if isinstance(via, Around):
        return replace(via, inner=behind(via.inner))
    return replace(via, name=via.late) if isinstance(via, Group) and via.late else via


@dataclass(frozen=True)
class Abstract(OneRank):
    """No peers: shapes are right, values undefined."""

    def all_reduce(self, x: Tensor, axis: Axis, rank: Tensor, op: str) -> Tensor:
        return x.clone()

    def all_gather(self, x: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        return x.unsqueeze(0).repeat(axis.size, *[1] * x.dim())

    def reduce_scatter(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        return blocks.sum(0)

    def all_to_all(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        return blocks.clone()

    def permute(self, x: Tensor, axis: Axis, rank: Tensor, source: tuple[int, ...]) -> Tensor:
        return x.clone()


@dataclass(frozen=True)
class Stacked(Even):
    """All ranks on one leading dim of R = outer * n * stride; every primitive is a reshape and a sum or a transpose."""

    background = False

    def _split(self, x: Tensor, axis: Axis, dim: int) -> Tensor:
        return x.unflatten(dim, (-1, axis.size, axis.stride))

    def all_reduce(self, x: Tensor, axis: Axis, rank: Tensor, op: str) -> Tensor:
        y = self._split(x, axis, 0)
        total = y.sum(1, keepdim=True) if op == "sum" else y.amax(1, keepdim=True)
        return total.expand(y.shape).reshape(x.shape)

    def all_gather(self, x: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        y = self._split(x, axis, 0).movedim(1, 0).unsqueeze(2)  # [n, outer, 1, stride, ...]
        n, outer, _, stride = y.shape[:4]
        return y.expand(n, outer, n, *y.shape[3:]).reshape(n, outer * n * stride, *x.shape[1:])

    def reduce_scatter(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        y = self._split(blocks, axis, 1).sum(2)  # [n, outer, stride, ...]
        return y.movedim(0, 1).reshape(blocks.shape[1:])

    def all_to_all(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        return self._split(blocks, axis, 1).transpose(0, 2).reshape(blocks.shape)

    def permute(self, x: Tensor, axis: Axis, rank: Tensor, source: tuple[int, ...]) -> Tensor:
        y = self._split(x, axis, 0)
        return y.index_select(1, torch.tensor(source, device=x.device)).reshape(x.shape)

    def pick(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        return blocks[axis.coordinate(rank), torch.arange(blocks.shape[1], device=blocks.device)]

    def spread(self, x: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        mine = torch.arange(axis.size, device=x.device)[:, None] == axis.coordinate(rank)
        return torch.where(mine.reshape(*mine.shape, *[1] * (x.dim() - 1)), x, x.new_zeros(()))

    def keep_first(self, x: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        first = (axis.coordinate(rank) == 0).reshape(-1, *[1] * (x.dim() - 1))
        return torch.where(first, x, torch.zeros_like(x))

    def wait(self, x: Tensor) -> Tensor:
        return x


class Hub:
    """Where the threads of a thread mesh meet: one barrier and one table of slots per group of ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.lock = threading.Lock()
        self.rooms: dict[Any, tuple[threading.Barrier, list[Any]]] = {}
        self.failed = False

    def open(self) -> None:
        """Before a program runs: as if no earlier one had failed."""
        with self.lock:
            self.rooms.clear()
            self.failed = False

    def exchange(self, room: Any, place: int, size: int, value: Any) -> list[Any]:
        """Give a value, get everybody's, in order of place. Blocks until all `size` members came."""
        with self.lock:
            if self.failed:  # a late comer would wait for a rank that is gone
                raise threading.BrokenBarrierError
            barrier, slots = self.rooms.setdefault(room, (threading.Barrier(size), [None] * size))
        slots[place] = value
        barrier.wait()
        values = list(slots)
        barrier.wait()  # nobody overwrites a slot before all have read it
        return values

    def abort(self) -> None:
        """Release the waiting threads with an error: one of them has failed."""
        with self.lock:
            self.failed = True
            for barrier, _ in self.rooms.values():
                barrier.abort()


@dataclass(frozen=True)
class Threads(OneRank):
    """Ranks are threads of one process that exchange references through a hub."""

    hub: Hub = field(compare=False)

    def _exchange(self, x: Any, axis: Axis, rank: Tensor) -> list[Any]:
        me = int(rank)
        place = me // axis.stride % axis.size
        room = (axis.name, me - place * axis.stride)
        return self.hub.exchange(room, place, axis.size, x)

    def all_reduce(self, x: Tensor, axis: Axis, rank: Tensor, op: str) -> Tensor:
        values = torch.stack(self._exchange(x, axis, rank))
        return values.sum(0) if op == "sum" else values.amax(0)

    def all_gather(self, x: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        return torch.stack(self._exchange(x, axis, rank))

    def reduce_scatter(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        mine = int(axis.coordinate(rank))
        return torch.stack([theirs[mine] for theirs in self._exchange(blocks, axis, rank)]).sum(0)

    def all_to_all(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        mine = int(axis.coordinate(rank))
        return torch.stack([theirs[mine] for theirs in self._exchange(blocks, axis, rank)])

    def permute(self, x: Tensor, axis: Axis, rank: Tensor, source: tuple[int, ...]) -> Tensor:
        return self._exchange(x, axis, rank)[source[int(axis.coordinate(rank))]].clone()

    def exchange(self, x: Tensor, axis: Axis, rank: Tensor, send: Splits, receive: Splits) -> Tensor:
        mine = int(axis.coordinate(rank))
        return torch.cat([theirs[mine] for theirs in self._exchange(x.split(send), axis, rank)])
