"""Several tensors on their ways at once: what goes along one axis by one kind of collective travels in one bucket.

    finish = start(tensors, plans, rank)     issues the first collective where the mesh can run it in the background
    tensors = finish(None)                   waits, and does the rest

A block's parameters are gathered so, and its gradients scattered: one collective an axis, however many leaves.

Sums over ranks may travel in fewer bits than they are kept in. A `Wire` says so, and in which dtype the ranks' parts are
added: in the same, by the collective itself; or in a wider one, by an all_to_all of the parts and a local sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmegatron.sharding.collectives import AllGather, AllToAll, AlongDim, Op, Psum, ReduceScatter, apply

Plan = tuple[Op, ...]
Into = Sequence[Tensor | None]
Finish = Callable[[Into | None], list[Tensor]]


@dataclass(frozen=True)
class Wire:
    """How sums over ranks travel: in `dtype`, added in `sum`. What arrives has the dtype of what was given."""

    dtype: torch.dtype
    sum: torch.dtype


def start(
    xs: Iterable[Tensor], plans: Sequence[Plan], rank: Tensor | None, limit: int | None = None, wire: Wire | None = None
) -> Finish:
    """Send each tensor through the ops of its plan; returns a function that waits for the results.

    limit: most elements in a bucket; None is no limit. wire: of sums; None is in the tensors' own dtype. Not
    differentiable: for parameters and finished gradients. What was gathered has memory of its own, not a bucket's; the
    function takes tensors to gather into instead (None where a tensor's plan has no gather last).
    """
    now: list[Any] = list(xs)
    left = [list(plan) for plan in plans]
    del xs  # whoever gave a tensor away has its memory back once it is in its bucket

    def send(group: list[int]) -> Callable[[Into], list[Tensor]]:
        mine = [now[i] for i in group]
        for i in group:
            now[i] = None
        return _issue(mine, [left[i][0] for i in group], rank, wire)

    first = _next_group(now, left, limit)
    pending = send(first) if first else None

    def finish(into: Into | None = None) -> list[Tensor]:
        group, results = first, pending
        while group:
            assert results is not None
            ends = [into[i] if into is not None and len(left[i]) == 1 else None for i in group]
            for i, y in zip(group, results(ends), strict=True):
                now[i] = y
                left[i].pop(0)
            group = _next_group(now, left, limit)
            results = send(group) if group else None
        return now

    return finish


def run_together(
    xs: Sequence[Tensor], plans: Sequence[Plan], rank: Tensor | None, limit: int | None = None, wire: Wire | None = None
) -> list[Tensor]:
    """`start` and finish at once."""
    return start(xs, plans, rank, limit, wire)(None)


def _next_group(xs: Sequence[Tensor], left: Sequence[list[Op]], limit: int | None) -> list[int]:
    """The tensors whose next op is of one kind, axis and dtype, up to the limit; the first kind that no other awaits later."""
    waiting = [i for i, ops in enumerate(left) if ops]
    if not waiting:
        return []
    later = {(type(op), op.axis.name) for ops in left for op in ops[1:]}
    first = next((i for i in waiting if (type(left[i][0]), left[i][0].axis.name) not in later), waiting[0])
    lead, group, elements = left[first][0], [first], xs[first].numel()
    if not isinstance(lead, AllGather | ReduceScatter | Psum):
        return group
    for i in waiting[waiting.index(first) + 1 :]:
        op = left[i][0]
        alike = type(op) is type(lead) and op.axis is lead.axis and xs[i].dtype == xs[first].dtype
        if alike and (limit is None or elements + xs[i].numel() <= limit):
            group.append(i)
            elements += xs[i].numel()
    return group


def _issue(mine: list[Tensor], ops: list[Op], rank: Tensor | None, wire: Wire | None) -> Callable[[Into], list[Tensor]]:
    """Issue a group's common op, and forget what is in the bucket; the returned function waits for the tensors."""
    assert rank is not None, "a collective ran outside of its mesh: use shard_map, or a step made for this mesh"
    axis = ops[0].axis
    if len(mine) == 1 and (wire is None or not isinstance(ops[0], ReduceScatter | Psum)):
        wait = issue(mine[0], ops[0], rank)
        return lambda into: [wait() if into[0] is None else into[0].data.copy_(wait())]
    if isinstance(ops[0], ReduceScatter):
        pieces = [op.cut(x) for op, x in zip(ops, mine, strict=True) if isinstance(op, AlongDim)]
        flat = _pack(pieces) if axis.transport.background else torch.cat([p.flatten(1) for p in pieces], 1).reshape(-1)
        shapes = [p.shape[1:] for p in pieces]
        pieces.clear()
        mine.clear()
        wait = _issue_sum(flat, ReduceScatter(axis, 0), rank, wire)
    else:
        flat = torch.cat([x.reshape(-1) for x in mine])
        shapes = [x.shape for x in mine]
        gathers = isinstance(ops[0], AllGather)
        mine.clear()
        wait = issue(flat, AllGather(axis, 0), rank) if gathers else _issue_sum(flat, Psum(axis), rank, wire)
    sizes = [shape.numel() for shape in shapes]

    def results(into: Into) -> list[Tensor]:
        if not isinstance(ops[0], AllGather):
            assert all(x is None for x in into), "sums have buckets of their own"
            return [part.reshape(shape) for part, shape in zip(wait().split(sizes), shapes, strict=True)]
        parts = wait().reshape(axis.size, -1).split(sizes, 1)
        blocks = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
        return [_join(op, b, x) for op, b, x in zip(ops, blocks, into, strict=True) if isinstance(op, AlongDim)]

    return results


def _pack(pieces: Sequence[Tensor]) -> Tensor:
    """Pieces [n, ...] of several tensors in one flat bucket, block by block; each is copied once."""
    n, sizes = pieces[0].shape[0], [p[0].numel() for p in pieces]
    flat = pieces[0].new_empty(n * sum(sizes))
    for part, p in zip(flat.view(n, -1).split(sizes, 1), pieces, strict=True):
        part.unflatten(1, p.shape[1:]).copy_(p)
    return flat


def _join(op: AlongDim, blocks: Tensor, into: Tensor | None) -> Tensor:
    """Blocks as a whole dim, in memory of its own, or in `into`'s: a view would keep the whole bucket."""
    pieces, dim = blocks.movedim(0, op.dim), op.dim
    if op.pad:
        whole = op.join(blocks)
        return whole if into is None else into.data.copy_(whole)
    shape = [*pieces.shape[:dim], pieces.shape[dim] * pieces.shape[dim + 1], *pieces.shape[dim + 2 :]]
    whole = pieces.new_empty(shape) if into is None else into.data
    whole.unflatten(dim, (op.axis.size, -1)).copy_(pieces)
    return whole


def issue(x: Tensor, op: Op, rank: Tensor) -> Callable[[], Tensor]:
    """Issue one op where the mesh can run it in the background; the function returned waits; not differentiable."""
    via = op.axis.transport
    if not via.background:
        y = apply(x, rank, op)
        return lambda: y
    issued = op.issue(x, rank, via)
    return lambda: op.complete(issued, via)


def _issue_sum(flat: Tensor, op: ReduceScatter | Psum, rank: Tensor, wire: Wire | None) -> Callable[[], Tensor]:
    """Issue a sum over ranks of a flat bucket, as the wire says."""
    if wire is None:
        return issue(flat, op, rank)
    sent, axis = flat.to(wire.dtype), op.axis
    if wire.sum == wire.dtype:
        wait = issue(sent, op, rank)
        return lambda: wait().to(flat.dtype)
    parts = issue(F.pad(sent, (0, -len(flat) % axis.size)), AllToAll(axis, 0, 0), rank)

    def total() -> Tensor:
        mine = parts().reshape(axis.size, -1).sum(0, dtype=wire.sum)
        if isinstance(op, ReduceScatter):
            return mine.to(flat.dtype)
        return issue(mine.to(wire.dtype), AllGather(axis, 0), rank)()[: len(flat)].to(flat.dtype)

    return total
