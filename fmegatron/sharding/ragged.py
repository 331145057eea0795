"""Exchanges of unequal numbers of rows between the ranks of an axis, for eager programs that may look at values.

    rows [n, d] sorted by group, counts [groups]

    swap     the groups are shared out over the axis: each rank gets all ranks' rows of its own
    spread   each rank gets all ranks' rows of every group
    own      each rank keeps the rows of its own groups, of rows that all ranks hold

Each returns rows and counts as they are then, sorted by group again, and the way back, which is the transpose: of `spread` it
adds up what the ranks made of a row. Differentiable once. `Meanwhile` runs work between the launch of the first exchange and
the wait for it, and in a backward pass likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fmegatron.sharding.collectives import AllGather, AllToAll, apply
from fmegatron.sharding.mesh import Axis

Back = Callable[[Tensor], Tensor]
Moved = tuple[Tensor, Tensor, Back]


@dataclass
class Meanwhile:
    """Work to be done once, while rows travel: `result` is there when somebody has `run` it."""

    work: Callable[[], Tensor] | None
    result: Tensor | None = None

    def run(self) -> None:
        """Do it, unless it is done."""
        work, self.work = self.work, None
        self.result = self.result if work is None else work()


def swap(rows: Tensor, counts: Tensor, axis: Axis, rank: Tensor, meanwhile: Meanwhile | None = None) -> Moved:
    """Rows to the ranks that their groups belong to, a slice of neighbouring groups a rank."""
    mine = counts.unflatten(0, (axis.size, -1))
    theirs = apply(mine, rank, AllToAll(axis, 0, 0)).reshape(mine.shape)  # [rank, group here]
    send, receive = mine.sum(1).tolist(), theirs.sum(1).tolist()
    order, home = _by_group(theirs)
    got = exchange(rows, axis, rank, send, receive, meanwhile).index_select(0, order)

    def back(y: Tensor) -> Tensor:
        return exchange(y.index_select(0, home), axis, rank, receive, send)

    return got, theirs.sum(0), back


def spread(rows: Tensor, counts: Tensor, axis: Axis, rank: Tensor) -> Moved:
    """All ranks' rows to each of them."""
    n, ranks = rows.shape[0], axis.size
    theirs = apply(counts[None], rank, AllGather(axis, 0))
    send, receive = [n] * ranks, theirs.sum(1).tolist()
    order, home = _by_group(theirs)
    copies = rows.expand(ranks, *rows.shape).flatten(0, 1)
    got = exchange(copies, axis, rank, send, receive).index_select(0, order)

    def back(y: Tensor) -> Tensor:
        return exchange(y.index_select(0, home), axis, rank, receive, send).unflatten(0, (ranks, n)).sum(0)

    return got, theirs.sum(0), back


def own(rows: Tensor, counts: Tensor, axis: Axis, rank: Tensor) -> Moved:
    """The rows of a rank's own groups; on the way back those of others are zero: a partial result."""
    shares = counts.unflatten(0, (axis.size, -1))
    place, sizes = int(axis.coordinate(rank)), shares.sum(1).tolist()
    start, stop = sum(sizes[:place]), sum(sizes[: place + 1])

    def back(y: Tensor) -> Tensor:
        return torch.cat([y.new_zeros(start, y.shape[1]), y, y.new_zeros(sum(sizes) - stop, y.shape[1])])

    return rows[start:stop], shares[place], back


def _by_group(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For rows sorted by (rank, group), counts [rank, group]: the order that sorts them by group, and its inverse."""
    groups = torch.arange(counts.shape[1], device=counts.device).repeat(counts.shape[0])
    order = groups.repeat_interleave(counts.flatten()).argsort(stable=True)
    return order, torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))


def exchange(
    rows: Tensor, axis: Axis, rank: Tensor, send: Sequence[int], receive: Sequence[int], meanwhile: Meanwhile | None = None
) -> Tensor:
    """send[i] rows to each rank i of the axis, in order; the receive[i] rows of each rank i."""
    flight = _Flight(axis, rank, tuple(send), tuple(receive))
    launched = _Launch.apply(rows, flight)
    if meanwhile is not None:
        meanwhile.run()
    arrived: Tensor = _Arrive.apply(launched, flight)
    return arrived


@dataclass
class _Flight:
    """An exchange under way, in one direction or the other: the tensors are not there before they are waited for."""

    axis: Axis
    rank: Tensor
    send: tuple[int, ...]
    receive: tuple[int, ...]
    under_way: list[Tensor] = field(default_factory=list)

    def launch(self, rows: Tensor, forward: bool) -> None:
        splits = (self.send, self.receive) if forward else (self.receive, self.send)
        self.under_way.append(self.axis.transport.exchange(rows.contiguous(), self.axis, self.rank, *splits))

    def land(self) -> Tensor:
        return self.axis.transport.wait(self.under_way.pop())


class _Launch(torch.autograd.Function):
    """Starts it; what flows on is a token. Its backward waits for what `_Arrive`'s has started."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.launch(rows, forward=True)
        return rows.new_zeros(())

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> Any:
        return ctx.flight.land(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.land()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        ctx.flight.launch(cotangent, forward=False)
        return cotangent.new_zeros(()), None
