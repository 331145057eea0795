"""Relayout: the collectives that lead from one placement to another.

Gathers go inner to outer, takes outer to inner; an axis that moves to another dim is an all_to_all; a partial axis becomes
a reduce_scatter where the target is sharded over it, else a psum. What shrinks the tensor comes first. Between dims the
mesh's order decides, outer axes scattered first and gathered last, so that several tensors go the same way and can share
their collectives. An outer axis that goes while an inner one stays is a gather of both and a take: never a silent
permutation. A dim's pads come with its first axis and go with its last.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fmegatron.sharding.collectives import AllGather, AllToAll, Op, Psum, ReduceScatter, Take, apply
from fmegatron.sharding.mesh import Mesh
from fmegatron.sharding.placement import Placement


def plan_relayout(mesh: Mesh, source: Placement, target: Placement) -> tuple[Op, ...]:
    """The ops that lead from `source` to `target`; dims correspond by position."""
    assert len(source.axes) == len(target.axes), f"relayout of {source} to {target}: different numbers of dims"
    assert target.partial <= source.partial, f"relayout of {source} to {target} would make a value partial"
    now = [list(axes) for axes in source.axes]
    want = [list(axes) for axes in target.axes]
    pads = [source.pad(dim) for dim in range(len(now))]  # of dims that have axes
    partial = set(source.partial) - set(target.partial)
    ops: list[Op] = []
    order = {axis.name: i for i, axis in enumerate(mesh.axes)}

    def next_axis(dim: int) -> str | None:
        """The axis that this dim is to get next, if what it has so far is right."""
        have = now[dim]
        return want[dim][len(have)] if len(have) < len(want[dim]) and not misplaced(dim) else None

    def misplaced(dim: int) -> bool:
        """Whether an axis of this dim must go, or all for its pads."""
        have = now[dim]
        return bool(have) and (have != want[dim][: len(have)] or pads[dim] != target.pad(dim))

    def gain(dim: int, axis: str) -> int:
        """Give a dim its next axis; the pads that it needs for it."""
        now[dim].append(axis)
        if len(now[dim]) > 1:
            return 0
        pads[dim] = target.pad(dim)
        return pads[dim]

    def shrink() -> None:
        """Add axes that cost no gather: reduce_scatter what is partial, take what is replicated."""
        while True:
            free = [d for d in range(len(now)) if (axis := next_axis(d)) and (axis in partial or not held(axis))]
            if not free:
                return
            dim = min(free, key=lambda d: order[want[d][len(now[d])]])
            axis = want[dim][len(now[dim])]
            pad = gain(dim, axis)
            ops.append(ReduceScatter(mesh[axis], dim, pad) if axis in partial else Take(mesh[axis], dim, pad))
            partial.discard(axis)

    def held(axis: str) -> bool:
        return any(axis in axes for axes in now)

    shrink()
    pending = {axis for dim in range(len(want)) for axis in want[dim] if axis not in now[dim]}
    ops.extend(Psum(mesh[axis]) for axis in sorted(partial - pending, key=order.__getitem__))
    partial &= pending
    while wrong := [d for d in range(len(now)) if misplaced(d)]:
        dim = max(wrong, key=lambda d: order[now[d][-1]])
        axis = now[dim].pop()
        pad = 0 if now[dim] else pads[dim]
        goal = next((d for d in range(len(now)) if d != dim and next_axis(d) == axis), None)
        if goal is None:
            ops.append(AllGather(mesh[axis], dim, pad))
        else:
            ops.append(AllToAll(mesh[axis], goal, dim, (gain(goal, axis), pad)))
        shrink()
    shrink()
    assert now == want and not partial, f"relayout of {source} to {target} ended at {now}"
    return tuple(ops)


def run(x: Tensor, rank: Tensor | None, ops: Sequence[Op]) -> Tensor:
    """Apply ops one after the other."""
    for op in ops:
        assert rank is not None, "a collective ran outside of its mesh: use shard_map, or a step made for this mesh"
        x = apply(x, rank, op)
    return x
