"""Where each leaf of the parameters lies, in use, at rest and in the optimizer, and the ways between: all of it data.

                gather                                 scatter                finish
storage ----------------------> compute ; gradients ------------> accumulator -------> optimizer
    ^    (a layer at a time)                     (a microbatch)             (a step)       |
    '-------------------------------------- give ------------------------------------------'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.models.layers import layer_paths
from fmegatron.models.model import Model
from fmegatron.nn.param import Param
from fmegatron.optim.formats import Split, join, split
from fmegatron.sharding import Placement, Sharding
from fmegatron.sharding.bucket import Plan, run_together
from fmegatron.sharding.relayout import plan_relayout, run
from fmegatron.tree import Tree


@dataclass(frozen=True)
class Leaf:
    """One leaf's placements (of the whole leaf) and ways. gather and scatter are of one layer's slice."""

    path: str
    param: Param
    compute: Placement
    storage: Placement
    optimizer: Placement
    gather: Plan
    scatter: Plan
    finish: Plan
    take: Plan
    give: Plan

    @property
    def stacked(self) -> bool:
        """Whether it holds several layers."""
        return self.param.layers is not None


def plan_leaves(model: Model, sh: Sharding) -> dict[str, Leaf]:
    """{path: Leaf} for a model under a sharding bound to its sizes.

    A gradient as a block returns it lies as the parameter in use, and is partial on every mesh axis on which that is not
    placed: the loss is the sum over all ranks. Raises ValueError naming the leaf where a rule does not divide, where stacked
    layers lie under no number (checkpoints name layers one by one), and where nodes and declarations do not fit.
    """
    check_nodes(model)
    return {path: _plan_leaf(path, param, sh) for path, param in tree.to_paths(model.declare).items()}


def check_nodes(model: Model) -> None:
    """ValueError where a node takes what is not declared, no layer of it, or none takes it, and where a size is missing."""
    declared = tree.to_paths(model.declare)
    unread = set(declared)
    for leaf in declared.values():
        leaf.true_shape(model.sizes)
    for node in model.chain:
        for _, path in node.params:
            found = [leaf for leaf in declared if leaf == path or leaf.startswith(f"{path}.")]
            if not found:
                raise ValueError(f"node {node.index} takes parameters {path!r}, but declared are {', '.join(declared)}")
            for layers in {declared[leaf].layers for leaf in found} - {None}:
                if node.layer is None or not 0 <= node.layer < layers:
                    raise ValueError(f"node {node.index} takes {path!r}, {layers} stacked layers: its layer is {node.layer}")
            unread -= set(found)
    if unread:
        raise ValueError(f"no node takes the parameters {', '.join(sorted(unread))}: they would have no gradient")


def _plan_leaf(path: str, param: Param, sh: Sharding) -> Leaf:
    if param.layers is not None and not any(part.isdigit() for part in path.split(".")):
        raise ValueError(f"{path} is stacked: put it under its first layer's number, like 'layers.0.{path.split('.')[-1]}'")
    sh = sh if param.layers is None else sh.bind({"layers": param.layers})
    compute, storage, optimizer = (sh.placement(param.names, kind, path) for kind in ("compute", "storage", "optimizer"))
    every = frozenset(axis.name for axis in sh.mesh.axes if axis.size > 1)
    gradient = replace(compute, partial=every - compute.placed)
    at_rest = replace(optimizer, partial=every - optimizer.placed)
    accumulator = at_rest if sh.rules.reduce == "microbatch" else gradient
    mesh = sh.mesh
    return Leaf(
        path=path,
        param=param,
        compute=compute,
        storage=storage,
        optimizer=optimizer,
        gather=plan_relayout(mesh, _slice(storage), _slice(compute)),
        scatter=plan_relayout(mesh, _slice(gradient), _slice(accumulator)),
        finish=plan_relayout(mesh, accumulator, optimizer),
        take=plan_relayout(mesh, storage, optimizer),
        give=plan_relayout(mesh, optimizer, storage),
    )


def _slice(place: Placement) -> Placement:
    """The placement of one layer of a stacked leaf."""
    if place.names[:1] != ("layers",):
        return place
    assert not place.axes[0], "layers are never sharded by rules"
    return Placement(place.names[1:], place.axes[1:], place.partial, place.pads[1:])


def to_optimizer(leaves: dict[str, Leaf], params: Tree, sh: Sharding) -> Tree:
    """Parameters as the optimizer holds them: pieces of what is stored (no communication)."""
    return _along(leaves, params, sh, "take")


def to_storage(leaves: dict[str, Leaf], params: Tree, sh: Sharding) -> Tree:
    """Parameters from the optimizer's placement back to storage: the inverse of `to_optimizer`."""
    return _along(leaves, params, sh, "give")


def add_moves(
    model: Model, leaves: dict[str, Leaf], params: Tree, metrics: Mapping[str, Tensor], ok: Tensor, sh: Sharding
) -> Tree:
    """Parameters in the optimizer's placement, and what the model moves by a step's taps without a gradient, if ok.

    A leaf with moves of some of its layers has those of all. A move is added; a function makes the new value of the old.
    """
    params = multiplied(model, leaves, params, metrics, ok, sh)
    if model.moves is None:
        return params
    taps = {name: x for name, x in metrics.items() if name.startswith(("tap.sum.", "tap.max."))}
    moves = model.moves({name.removeprefix("tap.sum.").removeprefix("tap.max."): x for name, x in taps.items()})
    (values, spec), n = tree.flatten(params), len(leaves)
    halves = isinstance(params, Split)  # all that are high, then all that are low
    for i, leaf in enumerate(leaves.values()):
        paths = layer_paths(leaf.path, leaf.param)
        if paths[0] in moves:
            whole = replace(leaf.optimizer, axes=((),) * len(leaf.optimizer.axes), pads=())
            old = join(values[i], values[n + i]) if halves else values[i]
            move = [moves[path] for path in paths]
            if callable(move[0]):
                seen = run(old, sh.rank, plan_relayout(sh.mesh, leaf.optimizer, whole))
                move = [fn(x) for fn, x in zip(move, seen.unbind(0) if leaf.stacked else (seen,), strict=True)]
            given = (torch.stack(move) if leaf.stacked else move[0]).to(old.dtype)
            own = run(given, sh.rank, plan_relayout(sh.mesh, whole, leaf.optimizer))
            own = own if callable(moves[paths[0]]) else old + own
            new = torch.where(ok, own, old)
            values[i :: n] = split(new) if halves else [new]
    return tree.unflatten(spec, values)


def multiplied(
    model: Model, leaves: dict[str, Leaf], params: Tree, metrics: Mapping[str, Tensor], ok: Tensor, sh: Sharding
) -> Tree:
    """Parameters in the optimizer's placement, times what the model's `factors` say of a step's taps, if ok."""
    if model.factors is None:
        return params
    factors = model.factors({name[8:]: x for name, x in metrics.items() if name.startswith("tap.max.")})
    (values, spec), n = tree.flatten(params), len(leaves)
    halves = isinstance(params, Split)
    for i, leaf in enumerate(leaves.values()):
        paths, place = layer_paths(leaf.path, leaf.param), leaf.optimizer
        if paths[0] in factors:
            names = ("layers", factors[paths[0]][0])[not leaf.stacked :]
            at = [place.names.index(name) for name in names]
            axes, pads = tuple(place.axes[dim] for dim in at), tuple(place.pad(dim) for dim in at)
            each = [factors[path][1] for path in paths]
            old = join(values[i], values[n + i]) if halves else values[i]
            whole, here = Placement(names, ((),) * len(names)), Placement(names, axes, pads=pads if any(pads) else ())
            by = (torch.stack(each) if leaf.stacked else each[0]).to(old.dtype)
            by = run(by, sh.rank, plan_relayout(sh.mesh, whole, here))
            by = by[tuple(slice(None) if name in names else None for name in place.names)]
            new = torch.where(ok, old * by, old)
            values[i::n] = split(new) if halves else [new]
    return tree.unflatten(spec, values)


BUCKET = 1 << 24  # most elements in one bucket


def _along(leaves: dict[str, Leaf], params: Tree, sh: Sharding, way: str) -> Tree:
    values, spec = tree.flatten(params)
    plans = [getattr(leaf, way) for leaf in leaves.values()]
    return tree.unflatten(spec, run_together(values, plans, sh.rank, BUCKET)) if any(plans) else params
