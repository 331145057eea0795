"""Trees: nested dicts of tensors, mapped, flattened by path, split and joined.

A tree is any optree structure; ours are plain nested dicts, tuples and NamedTuples. `None` is an empty subtree, never a
leaf, except in `partition` and `combine`, where it marks a hole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

Tree = Any

leaves = optree.tree_leaves
flatten = optree.tree_flatten
unflatten = optree.tree_unflatten


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply `fn` leaf by leaf to trees of one structure."""
    return optree.tree_map(fn, tree, *rest)


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Like `map`, with the leaf's dotted path as first argument: `fn("layers.attn.q", leaf, ...)`."""
    paths, values, spec = optree.tree_flatten_with_path(tree)
    others = [spec.flatten_up_to(other) for other in rest]
    return spec.unflatten([fn(dotted(p), *args) for p, *args in zip(paths, values, *others, strict=True)])


def dotted(path: Iterable[Any]) -> str:
    """One string for a path: ("layers", "attn", "q") -> "layers.attn.q"."""
    return ".".join(str(part) for part in path)


def to_paths(tree: Tree) -> dict[str, Any]:
    """{dotted path: leaf}, in the tree's order; the inverse of `from_paths` for nested dicts."""
    paths, values, _ = optree.tree_flatten_with_path(tree)
    return {dotted(path): value for path, value in zip(paths, values, strict=True)}


def from_paths(items: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from {dotted path: leaf}; the inverse of `to_paths`."""
    root: dict[str, Any] = {}
    for path, value in items.items():
        *parents, last = path.split(".")
        node = root
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return root


def partition(tree: Tree, keep: Callable[[str, Any], bool]) -> tuple[Tree, Tree]:
    """Two trees of one structure with None in the holes: leaves for which `keep(path, leaf)` holds, and the others.

    >>> partition({"a": 1, "b": 2}, lambda path, leaf: leaf > 1)
    ({'a': None, 'b': 2}, {'a': 1, 'b': None})
    """
    chosen = map_with_path(lambda path, leaf: leaf if keep(path, leaf) else None, tree)
    others = map_with_path(lambda path, leaf: None if keep(path, leaf) else leaf, tree)
    return chosen, others


def combine(first: Tree, second: Tree) -> Tree:
    """Fill the holes of one tree from the other: `combine(*partition(tree, keep)) == tree`."""
    return optree.tree_map(lambda a, b: b if a is None else a, first, second, none_is_leaf=True)


def as_one(values: Mapping[str, Tensor], fn: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """fn of all elements of several values as one fp64 vector, taken apart again."""
    flat = fn(torch.cat([x.reshape(-1).to(torch.float64) for x in values.values()]))
    parts = flat.split([x.numel() for x in values.values()])
    return {name: part.reshape(x.shape) for (name, x), part in zip(values.items(), parts, strict=True)}
