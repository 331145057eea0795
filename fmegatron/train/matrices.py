"""Whole matrices and means of leaves that lie in shards: what Muon and Adafactor ask of `over` on a mesh.

Matrices are exchanged, not gathered: the axes that cut a matrix move to the dim that numbers the matrices (the stacked
layers) by all_to_all, so each rank holds some matrices whole, works on those, and sends them back.

    each rank: a piece of every layer   ==>   some layers, whole   -- fn -->   the same   ==>   a piece of every layer

Where there are fewer matrices than ranks, zeros fill up. Axes on which a leaf is replicated take a share of the work while
there is a matrix for each, and gather the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.nn.param import Matrix
from fmegatron.optim.base import summed
from fmegatron.sharding import Placement, Sharding
from fmegatron.sharding.bucket import run_together
from fmegatron.sharding.collectives import Psum
from fmegatron.sharding.relayout import plan_relayout, run
from fmegatron.train.leaves import Leaf
from fmegatron.tree import Tree


def on_matrices(
    sh: Sharding, leaves: Mapping[str, Leaf], fn: Callable[[Tensor], Tensor], updates: Tree, views: Mapping[str, Matrix]
) -> Tree:
    """fn, [n, rows, columns] -> the same, on the whole matrices of leaves at the optimizer's placement."""
    values = tree.to_paths(updates)
    groups: dict[tuple[object, ...], list[str]] = {}
    numbered = {path: _numbered(x, leaves[path].optimizer, views[path]) for path, x in values.items()}
    for path, (x, place, view) in numbered.items():
        groups.setdefault((view, place.axes, place.pads, tuple(x.shape[1:]), x.dtype), []).append(path)
    for paths in groups.values():
        _, place, view = numbered[paths[0]]
        xs = [numbered[path][0] for path in paths]
        parts = _exchanged(sh, fn, torch.cat(xs), place, view).split([x.shape[0] for x in xs])
        values |= {path: y.reshape(values[path].shape) for path, y in zip(paths, parts, strict=True)}
    return tree.map_with_path(lambda path, _: values[path], updates)


def _numbered(x: Tensor, place: Placement, view: Matrix) -> tuple[Tensor, Placement, Matrix]:
    """A leaf with a leading dim that numbers matrices, also where it is one matrix."""
    if view.batch:
        return x, place, view
    numbered = Placement(("layers", *place.names), ((), *place.axes), pads=(0, *place.pads) if place.pads else ())
    return x[None], numbered, replace(view, batch=1)


def _exchanged(sh: Sharding, fn: Callable[[Tensor], Tensor], x: Tensor, place: Placement, view: Matrix) -> Tensor:
    """fn of whole matrices; x [n, ...] and the result lie as `place`."""
    cut = {axis for axes in place.axes[view.batch :] for axis in axes}
    move = [axis.name for axis in reversed(sh.mesh.axes) if axis.name in cut]  # the order in which relayout frees them
    share, ranks = list[str](), math.prod(sh.mesh[axis].size for axis in move)
    for axis in sh.mesh.axes:
        if axis.size > 1 and axis.name not in place.placed and ranks * axis.size <= x.shape[0]:
            share.append(axis.name)
            ranks *= axis.size
    kept = place.axes[1 : view.batch]
    pads = tuple(pad if dim < view.batch else 0 for dim, pad in enumerate(place.pads))
    whole = Placement(place.names, ((*place.axes[0], *share, *move), *kept, *((),) * (x.dim() - view.batch)), pads=pads)
    n = x.shape[0]
    full = torch.cat([x, x.new_zeros(-n % ranks, *x.shape[1:])]) if n % ranks else x
    mine = run(full, sh.rank, plan_relayout(sh.mesh, place, whole))
    made = fn(view.fold(mine)).reshape(mine.shape)
    return run(made, sh.rank, plan_relayout(sh.mesh, whole, place))[:n]


def mean_over(
    sh: Sharding, leaves: Mapping[str, Leaf], updates: Tree, dims: Mapping[str, tuple[int, ...]], square: bool = False
) -> Tree:
    """Each leaf's mean over its dims `dims[path]`, or that of its squares, pads left out; a dim of size 1 stays. One collective
    an axis.
    """
    values, spec = tree.flatten(updates)
    sums, plans = [], []
    for path, x in zip(tree.to_paths(updates), values, strict=True):
        place = leaves[path].optimizer
        count = math.prod(sh.true_size(place.names[dim]) for dim in dims[path])
        sums.append(summed(x, dims[path], square) / count)
        over = {axis for dim in dims[path] for axis in place.axes[dim]}
        plans.append(tuple(Psum(axis) for axis in sh.mesh.axes if axis.name in over))
    return spec.unflatten(run_together(sums, plans, sh.rank))
