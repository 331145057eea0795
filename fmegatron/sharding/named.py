"""What blocks do with named dims besides einsum: reductions, lookups, key/value groups, and the check of `local`."""

from __future__ import annotations

import math
import os.path
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fmegatron.sharding.collectives import Op, Pmax, Psum
from fmegatron.sharding.mesh import Axis, Mesh
from fmegatron.sharding.placement import Placement, parse_names
from fmegatron.sharding.relayout import plan_relayout, run

if TYPE_CHECKING:
    from fmegatron.sharding.sharding import Layout, Sharding


def offset(mesh: Mesh, rank: Tensor | None, axes: tuple[str, ...], local: int) -> Tensor | int:
    """First global index of the local slice of a dim over `axes`, of `local` elements a rank."""
    if not axes:
        return 0
    assert rank is not None, "a sharded index was asked for outside of its mesh"
    shard: Any = 0
    for name in axes:
        shard = shard * mesh[name].size + mesh[name].coordinate(rank)
    return shard * local


def split_arrow(pattern: str) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """ "a b, b c -> a c" -> ([operands' names], output's names); raises ValueError where there is no single arrow."""
    sides = pattern.split("->")
    if len(sides) != 2:
        raise ValueError(f"pattern {pattern!r} needs one arrow, as in 'batch seq vocab -> batch seq'")
    return [parse_names(text) for text in sides[0].split(",")], parse_names(sides[1])


# -- reduce ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Reduction:
    """Dims to reduce, the axes they lie over, and the way home: of a partial value, and of one equal on all ranks."""

    dims: tuple[int, ...]
    over: tuple[Axis, ...]
    from_partial: tuple[Op, ...]
    from_equal: tuple[Op, ...]


def plan_reduce(layout: Layout, pattern: str) -> Reduction:
    """Plan "batch seq vocab -> batch seq"."""
    (names,), out = split_arrow(pattern)
    source = layout.placement(names)
    kept = tuple(n for n in names if n in out)
    if kept != out:
        raise ValueError(f"reduce pattern {pattern!r}: the output keeps the input's order and adds no name")
    dims = tuple(i for i, n in enumerate(names) if n not in out)
    over = [axis for i in dims for axis in source.axes[i]]
    home = layout.placement(out)
    equal = Placement(kept, tuple(source.of(n) for n in kept))
    partial = Placement(kept, equal.axes, frozenset(over))
    mesh = layout.mesh
    return Reduction(dims, tuple(mesh[a] for a in over), plan_relayout(mesh, partial, home), plan_relayout(mesh, equal, home))


def reduce(plan: Reduction, rank: Tensor | None, x: Tensor, op: str) -> Tensor:
    """Reduce over local and sharded elements alike."""
    if op == "sum":
        return run(x.sum(plan.dims), rank, plan.from_partial)
    if op == "max":
        return run(_max(plan, rank, x), rank, plan.from_equal)
    if op == "logsumexp":
        if not plan.over:
            return run(torch.logsumexp(x, plan.dims), rank, plan.from_equal)
        peak = _max(plan, rank, x)
        shifted = x - peak.reshape([1 if i in plan.dims else n for i, n in enumerate(x.shape)])
        total = run(shifted.exp().sum(plan.dims), rank, [Psum(axis) for axis in plan.over])
        return run(total.log() + peak, rank, plan.from_equal)
    raise ValueError(f"reduce knows 'sum', 'max' and 'logsumexp', not {op!r}")


def _max(plan: Reduction, rank: Tensor | None, x: Tensor) -> Tensor:
    return run(x.detach().amax(plan.dims), rank, [Pmax(axis) for axis in plan.over])


# -- lookup ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Lookup:
    """How ids reach every shard of the table's rows, the rows' axes, and the way home of the partial result."""

    ids: tuple[Op, ...]
    rows: tuple[str, ...]
    home: tuple[Op, ...]


def plan_lookup(layout: Layout, pattern: str) -> Lookup:
    """Plan "batch seq, vocab embed -> batch seq embed"."""
    (ids, table), out = split_arrow(pattern)
    if out != (*ids, *table[1:]):
        raise ValueError(f"lookup pattern {pattern!r}: the output is the ids' names followed by the table's columns")
    at_ids, at_table = layout.placement(ids), layout.placement(table)
    rows = at_table.axes[0]
    seen = Placement(ids, tuple(tuple(a for a in axes if a not in at_table.placed) for axes in at_ids.axes))
    found = Placement(out, (*seen.axes, *at_table.axes[1:]), frozenset(rows))
    mesh = layout.mesh
    return Lookup(plan_relayout(mesh, at_ids, seen), rows, plan_relayout(mesh, found, layout.placement(out)))


def lookup(plan: Lookup, mesh: Mesh, rank: Tensor | None, ids: Tensor, table: Tensor) -> Tensor:
    """Rows `ids` of the table: each rank looks among its own rows, the results add up."""
    ids = run(ids, rank, plan.ids)
    if not plan.rows:
        return run(torch.nn.functional.embedding(ids, table), rank, plan.home)
    mine = ids - offset(mesh, rank, plan.rows, table.shape[0])
    here = (mine >= 0) & (mine < table.shape[0])
    found = torch.nn.functional.embedding(mine.clamp(0, table.shape[0] - 1), table)
    keep = here.reshape(*here.shape, *[1] * (found.dim() - here.dim()))
    return run(torch.where(keep, found, torch.zeros_like(found)), rank, plan.home)


# -- groups ---------------------------------------------------------------------------------------------------------
def groups(sh: Sharding, kv: Tensor, pattern: str) -> Tensor:
    """Select key/value heads so that local query head j uses head j // (local heads / heads of the result).

    "stream -> keys -> heads": from where they were made to where they meet queries, on a way that carries no head for nothing.
    Where keys and heads are of one name every head has its own.
    """
    *origin, source, out = (parse_names(side) for side in pattern.split("->"))
    of_kv, of_heads = sh.layout.placement(source), sh.layout.placement(out)
    now = sh.layout.placement(origin[0]) if origin else of_kv
    dim = next((i for i, (a, b) in enumerate(zip(source, out, strict=True)) if a != b), None)
    if dim is None or not of_heads.axes[dim]:  # or all heads are here
        return run(kv, sh.rank, plan_relayout(sh.mesh, now, of_heads))
    want = of_heads.axes[dim]
    shared = tuple(os.path.commonprefix([of_kv.axes[dim], want]))  # an axis behind a skipped one cuts other groups
    target = Placement(source, tuple(shared if i == dim else axes for i, axes in enumerate(of_heads.axes)))
    queries, group = sh.size(out[dim]), sh.size(out[dim]) // sh.size(source[dim])  # all, and those of one key/value head
    early = tuple(axis for axis in want if axis not in now.placed or axis in now.axes[dim])  # what no exchange is to bring
    alone = not shared and not now.axes[dim] and early and group % (queries // math.prod(sh.mesh[a].size for a in early)) == 0
    if alone:  # one head is all that this rank and those that it exchanges with read: it alone travels
        kv = _choose(sh, kv, dim, queries, group, (), early)
    if target.axes != now.axes:
        kv = run(kv, sh.rank, plan_relayout(sh.mesh, now, target))
    return kv if alone or target.axes == of_heads.axes else _choose(sh, kv, dim, queries, group, shared, want)


def _choose(
    sh: Sharding, kv: Tensor, dim: int, queries: int, group: int, have: tuple[str, ...], want: tuple[str, ...]
) -> Tensor:
    """Of key/value heads over axes `have` those that queries over axes `want` read: one where it serves all, or one each."""
    heads = queries // math.prod(sh.mesh[axis].size for axis in want)  # local query heads
    places = torch.arange(0, heads, heads if group % heads == 0 else 1, device=kv.device)
    chosen = (places + offset(sh.mesh, sh.rank, want, heads)) // group
    return kv.index_select(dim, chosen - offset(sh.mesh, sh.rank, have, kv.shape[dim]))


# -- local ----------------------------------------------------------------------------------------------------------
def check_local(layout: Layout, pattern: str) -> None:
    """Refuse a function that mixes over a sharded name, or whose operands hold different slices of one name."""
    operands, out = split_arrow(pattern)
    places = [layout.placement(names) for names in operands]
    home = layout.placement(out)
    for place in places:
        for name, axes in zip(place.names, place.axes, strict=True):
            if name not in out and axes:
                raise ValueError(
                    f"local {pattern!r} mixes over {name!r}, which lies over mesh axes {', '.join(axes)}: "
                    f"give the dim a name without a rule (sh.relayout), or use sh.reduce"
                )
            if name in out and axes != home.of(name):
                raise ValueError(
                    f"local {pattern!r}: {name!r} lies over ({', '.join(axes)}) in [{' '.join(place.names)}] but over "
                    f"({', '.join(home.of(name))}) in the output: bring the operand there with sh.align"
                )
