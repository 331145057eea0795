"""Which weights of few bits travel so, and by which scales.

A shard is rounded before it travels where its scales are those that the whole weight would have: one for all of it
(tensorwise), one that the steps before have set (delayed), or one a square of the flattened matrix, where each rank's shard
is whole squares (blockwise).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from fmegatron.kernels.quantize import Recipe, boxes
from fmegatron.models.model import Node
from fmegatron.nn.lowbits import settled
from fmegatron.nn.param import matrix
from fmegatron.sharding import Sharding
from fmegatron.sharding.bucket import run_together
from fmegatron.sharding.collectives import AllGather, Pmax
from fmegatron.sharding.relayout import run
from fmegatron.train.leaves import Leaf

EIGHT = "gathered in 8 bits"  # a note of a leaf
Counts = tuple[int, ...]  # blocks along each dim of a rank's shard; (): one for the whole weight
Key = TypeVar("Key")


def travels(sh: Sharding, recipe: Recipe, leaf: Leaf) -> Counts | str:
    """The blocks of a rank's shard of a weight that is gathered in 8 bits; or why it travels whole."""
    if recipe.name in ("tensorwise", "delayed"):
        return ()
    view, block = matrix(leaf.param), recipe.operand.inner
    if recipe.name != "blockwise" or view is None or block is None:
        return f"{recipe.name} has no one scale to gather by"
    place, first = leaf.storage, int(leaf.stacked)
    names, found = place.names[first:], list[int]()
    counts = boxes([sh.size(name) for name in names], view.rows, block)
    if counts is None:
        return f"blocks of {block} of the flattened matrix are no boxes of {' '.join(names)}"
    for dim, count in enumerate(counts):
        ranks = math.prod(sh.mesh[axis].size for axis in place.axes[first + dim])
        if count % ranks or place.pad(first + dim) or not all(isinstance(op, AllGather) for op in leaf.gather):
            return f"{count} blocks of {block} along {names[dim]} do not divide over {ranks} ranks"
        found.append(count // ranks)
    return tuple(found)


def travels_low(sh: Sharding, node: Node, name: str, leaf: Leaf) -> tuple[Recipe, Counts] | None:
    """The recipe by which a node's leaf is gathered in 8 bits, and its blocks; None: it is not, or not at all."""
    recipe = dict(node.low).get(name)
    counts = travels(sh, recipe, leaf) if recipe is not None and leaf.gather else ""
    return None if recipe is None or isinstance(counts, str) else (recipe, counts)


def gathered_tops(
    sh: Sharding, tops: Mapping[Key, Tensor], low: Mapping[Key, tuple[Leaf, Counts]],
    histories: Mapping[Key, tuple[Leaf, Tensor, Recipe]],
) -> dict[Key, tuple[Tensor, Tensor]]:
    """Of the largest values of shards' blocks: those to round the shards by, and those of the weights that arrive. One small
    collective an axis for all of them that have one scale, and one for all others.

    histories: of delayed scaling, the leaf of a weight's history and this rank's part of it. Such a shard is rounded by what
    they say, and its own largest value is what arrives: the block makes history of it.
    """
    ones = [key for key, (_, counts) in low.items() if not counts and key not in histories]
    squares = [key for key, (_, counts) in low.items() if counts]
    past = run_together([x for _, x, _ in histories.values()], [leaf.gather for leaf, _, _ in histories.values()], sh.rank)
    whole = run_together([tops[key] for key in squares], [low[key][0].gather for key in squares], sh.rank)
    found = {key: (tops[key], x) for key, x in zip(squares, whole, strict=True)}
    for (key, (_, _, recipe)), history in zip(histories.items(), past, strict=True):
        found[key] = settled(history, recipe)[1].to(tops[key].dtype), tops[key]
    if ones:
        axes = {axis for key in ones for axis in low[key][0].storage.placed}
        ops = [Pmax(axis) for axis in sh.mesh.axes if axis.name in axes]
        most = run(torch.stack([tops[key] for key in ones]), sh.rank, ops).unbind(0)
        found |= {key: (x, x) for key, x in zip(ones, most, strict=True)}
    return found
