"""A model whose chosen weights are multiplied in few bits: other functions in its chain, and the histories that scales need.

    lower(model, {"layers.*.mlp.*": recipe("tensorwise"), "layers.*.attn.*": recipe("rowwise")}, first=1, last=1)

Patterns are of leaves' paths with the layer's number; the first that matches counts. What is not a matmul with a weight
(norms, biases, lookups, routers) stays as it is, and so do the first and last layers that are named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.kernels.quantize import Recipe
from fmegatron.models.layers import layer_paths
from fmegatron.models.model import Model, Node, NodeFn, Values
from fmegatron.nn.lowbits import PAYLOAD, TOP, Lowered
from fmegatron.nn.param import Param, zeros
from fmegatron.sharding import Sharding

STAYS = ("embed.*", "*.router.*", "*.experts.*_bias", "*.shared_gate")
EXPERTS = "*.experts.*"  # rows grouped by expert: nn/lowexperts.py
AMAX = "_amax"  # behind a weight's name: the history of its product's largest values, fp32 [3, steps]
Chosen = tuple[tuple[tuple[str, ...], Recipe], ...]  # (path inside the node's own tree, recipe)


class Weight(NamedTuple):
    """A weight that a node multiplies with: its path in the node's own tree, among declarations, with the layer's number."""

    inside: tuple[str, ...]
    leaf: str
    path: str


def lower(
    model: Model, recipes: Mapping[str, Recipe | None], *, first: int = 0, last: int = 0, gather: bool = True
) -> Model:
    """The model with the products of chosen weights by their recipes; `first` and `last` layers stay as they are.

    gather: stored shards of weights travel in 8 bits where a shard has what its scales ask for (train/lowgather.py). A recipe
    None leaves the weights that it is for as they are. Raises ValueError for a pattern that chooses nothing, and where no layer
    is left.
    """
    layers = sum(node.is_layer for node in model.chain)
    used: set[str] = set()
    made: dict[tuple[NodeFn, Chosen], NodeFn] = {}  # one function for each kind of node, so that it is compiled once
    delayed: list[tuple[int, Weight, Recipe]] = []

    def choose(path: str) -> Recipe | None:
        found = next((pattern for pattern in recipes if fnmatchcase(path, pattern)), None)
        if found is None:
            return None
        used.add(found)
        layer = int(path.split(".")[1]) if path.startswith("layers.") else first
        how = recipes[found] if first <= layer < layers - last else None
        if how is not None and fnmatchcase(path, EXPERTS) and how.name not in ("tensorwise", "rowwise"):
            raise ValueError(f"recipe {how.name} for {path}: experts take tensorwise or rowwise, or off; give them a pattern")
        return how

    def lowered(node: Node) -> Node:
        found = [(weight, recipe) for weight in weights_of(model, node) if (recipe := choose(weight.path)) is not None]
        delayed.extend((node.index, weight, recipe) for weight, recipe in found if recipe.name == "delayed")
        chosen = tuple((weight.inside, recipe) for weight, recipe in found)
        if not chosen:
            return node
        one = [(weight.inside, recipe) for weight, recipe in found if gather and not fnmatchcase(weight.path, EXPERTS)]
        low = tuple((".".join(path), recipe) for path, recipe in one)
        sites = [".".join(path) for path, recipe in chosen if recipe.name == "delayed"]
        probes = tuple((site + AMAX, f"fp8/{{layer}}/{site}.g") for site in sites)
        fn = made.setdefault((node.fn, chosen), _with(node.fn, chosen))
        return replace(node, fn=fn, low=low, probes=node.probes + probes)

    low = replace(model, chain=tuple(lowered(node) for node in model.chain))
    if idle := [pattern for pattern in recipes if pattern not in used]:
        some = next(weight.path for node in model.chain for weight in weights_of(model, node))
        raise ValueError(f"few bits for {idle[0]!r}: no weight of a matmul is left that has such a path; one is {some}")
    if low.chain == model.chain and any(how is not None for how in recipes.values()):
        raise ValueError(f"few bits: first = {first} and last = {last} leave none of {layers} layers, choose fewer")
    return _remembering(low, delayed) if delayed else low


def weights_of(model: Model, node: Node) -> list[Weight]:
    """The weights that a node multiplies with."""
    found, declared = [], tree.to_paths(model.declare)
    for name, root in node.params:
        for leaf, param in declared.items():
            if leaf != root and not leaf.startswith(f"{root}."):
                continue
            path = leaf if param.layers is None else layer_paths(leaf, param)[node.layer or 0]
            dims = [dim for dim in param.names.split() if dim != "layers"]
            if len(dims) > 1 and not path.endswith(AMAX) and not any(fnmatchcase(path, pattern) for pattern in STAYS):
                rest = leaf[len(root) + 1 :].split(".") if leaf != root else []
                found.append(Weight(tuple(filter(None, (name, *rest))), leaf, path))
    return found


def _with(fn: NodeFn, chosen: Chosen) -> NodeFn:
    def lowered(sh: Sharding, p: Any, v: Values, key: Tensor | None) -> Values:
        for path, recipe in chosen:
            p = _swap(p, path, recipe, ".".join(path))
        return fn(sh, p, v, key)

    return lowered


def _swap(p: Any, path: tuple[str, ...], recipe: Recipe, site: str) -> Any:
    """A tree with one weight lowered."""
    name, *rest = path
    if rest:
        return {**p, name: _swap(p[name], tuple(rest), recipe, site)}
    return {**p, name: Lowered(p[name], recipe, p.get(name + AMAX), site, p.get(name + PAYLOAD), p.get(name + TOP))}


# -- delayed scaling ------------------------------------------------------------------------------------------------
def _remembering(model: Model, delayed: list[tuple[int, Weight, Recipe]]) -> Model:
    """With a leaf of history beside each weight, which a step moves on by what was tapped."""
    declared, sizes = tree.to_paths(model.declare), dict(model.sizes) | {"amax_of": 3}
    taps: dict[str, str] = {}
    for number, weight, recipe in delayed:
        if len(weight.inside) < 2:
            raise ValueError(f"recipe delayed for {weight.path}: it has no place for a history there, use tensorwise")
        param, steps = declared[weight.leaf], f"amax_steps_{recipe.history}"
        sizes[steps] = recipe.history
        names = f"{'layers ' if param.layers is not None else ''}amax_of {steps}"
        declared[weight.leaf + AMAX] = Param(names, zeros, decay=False, layers=param.layers, exact=True)
        taps[weight.path + AMAX] = f"fp8/{number:02d}/{'.'.join(weight.inside)}"
    every = [path for leaf, param in declared.items() if leaf.endswith(AMAX) for path in layer_paths(leaf, param)]
    moves = partial(_moves, model.moves, {path: taps.get(path) for path in every})
    return replace(model, declare=tree.from_paths(declared), sizes=sizes, moves=moves)


def _moves(
    before: Callable[[Mapping[str, Tensor]], dict[str, Any]] | None, sites: Mapping[str, str | None], taps: Mapping[str, Tensor]
) -> dict[str, Any]:
    found = before(taps) if before is not None else {}
    for path, site in sites.items():
        if site is None or f"{site}.x" in taps:  # a stage of a pipeline has its own layers' alone
            found[path] = _same if site is None else partial(_next, torch.stack([taps[f"{site}.{of}"] for of in "xwg"]))
    return found


def _next(newest: Tensor, old: Tensor) -> Tensor:
    return torch.cat((old[:, 1:], newest[:, None].to(old.dtype)), 1)


def _same(old: Tensor) -> Tensor:
    return old
