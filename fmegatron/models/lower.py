"""A model whose chosen weights are multiplied in few bits: the same declarations, other functions in its chain.

    lower(model, {"layers.*.mlp.*": recipe("tensorwise"), "layers.*.attn.*": recipe("rowwise")}, first=1, last=1)

Patterns are of leaves' paths with the layer's number; the first that matches counts. What is not a matmul with a weight
(norms, biases, lookups, routers, grouped experts) stays as it is, and so do the first and last layers that are named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor

from fmegatron import tree
from fmegatron.kernels.quantize import Recipe
from fmegatron.models.layers import layer_paths
from fmegatron.models.model import Model, Node, NodeFn, Values
from fmegatron.nn.lowbits import Lowered
from fmegatron.sharding import Sharding

STAYS = ("embed.*", "*.router.*", "*.experts.*", "*.shared_gate")
Chosen = tuple[tuple[tuple[str, ...], Recipe], ...]  # (path inside the node's own tree, recipe)


def lower(model: Model, recipes: Mapping[str, Recipe | None], *, first: int = 0, last: int = 0) -> Model:
    """The model with the products of chosen weights by their recipes; `first` and `last` layers stay as they are.

    A recipe None leaves the weights that it is for as they are.

    Raises ValueError for a pattern that chooses nothing.
    """
    layers = sum(node.is_layer for node in model.chain)
    used: set[str] = set()
    made: dict[tuple[NodeFn, Chosen], NodeFn] = {}  # one function for each kind of node, so that it is compiled once

    def choose(path: str) -> Recipe | None:
        found = next((pattern for pattern in recipes if fnmatchcase(path, pattern)), None)
        if found is None:
            return None
        used.add(found)
        layer = int(path.split(".")[1]) if path.startswith("layers.") else first
        return recipes[found] if first <= layer < layers - last else None

    def lowered(node: Node) -> Node:
        chosen = tuple((inside, recipe) for inside, path in weights_of(model, node) if (recipe := choose(path)) is not None)
        if not chosen:
            return node
        return replace(node, fn=made.setdefault((node.fn, chosen), _with(node.fn, chosen)))

    chain = tuple(lowered(node) for node in model.chain)
    if idle := [pattern for pattern in recipes if pattern not in used]:
        some = next(path for node in model.chain for _, path in weights_of(model, node))
        raise ValueError(f"few bits for {idle[0]!r}: no weight of a matmul is left that has such a path; one is {some}")
    return replace(model, chain=chain)


def weights_of(model: Model, node: Node) -> list[tuple[tuple[str, ...], str]]:
    """(path inside the node's own tree, path with the layer's number) of the weights that it multiplies with."""
    found, declared = [], tree.to_paths(model.declare)
    for name, root in node.params:
        for path, leaf in declared.items():
            if path != root and not path.startswith(f"{root}."):
                continue
            numbered = path if leaf.layers is None else layer_paths(path, leaf)[node.layer or 0]
            dims = [dim for dim in leaf.names.split() if dim != "layers"]
            if len(dims) > 1 and not any(fnmatchcase(numbered, pattern) for pattern in STAYS):
                rest = path[len(root) + 1 :].split(".") if path != root else []
                found.append((tuple(filter(None, (name, *rest))), numbered))
    return found


def _with(fn: NodeFn, chosen: Chosen) -> NodeFn:
    def lowered(sh: Sharding, p: Any, v: Values, key: Tensor | None) -> Values:
        for path, recipe in chosen:
            p = _swap(p, path, partial(Lowered, recipe=recipe))
        return fn(sh, p, v, key)

    return lowered


def _swap(p: Any, path: tuple[str, ...], change: Callable[[Tensor], Lowered]) -> Any:
    """A tree with one leaf changed."""
    return {**p, path[0]: _swap(p[path[0]], path[1:], change)} if path else change(p)
