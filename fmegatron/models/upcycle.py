"""A dense model as one with experts that starts where the dense one stopped, to the same outputs.

    expert e = (copy, piece)      experts = copies x pieces; a piece is 1 / pieces of the feed-forward block's width
    router                        one random column a copy, the same for its pieces: they are chosen together

The pieces of a copy add up to the dense block, and the weights of the chosen copies to one (scale = pieces makes up for the
equal shares of a copy's pieces). Source: Komatsuzaki et al. 2022 (arXiv 2212.05055); He et al. 2024 (arXiv 2410.07524).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.models.gpt import gpt
from fmegatron.models.layers import layer_paths, split_run
from fmegatron.models.model import Model
from fmegatron.nn.moe import Moe
from fmegatron.tree import Tree

ALONG = {"gate": 1, "up": 1, "down": 0, "gate_bias": 0, "up_bias": 0}  # the dim of the width; down_bias has none


def upcycle(model: Model, params: Tree, moe: Moe, key: Tensor | int = 0) -> tuple[Model, Tree]:
    """The model with experts in place of the blocks that `moe` says, and its parameters, from whole parameters of a dense one.

    key: of the routers. Raises ValueError where the outputs could not be the same.
    """
    c = model.config
    pieces = pieces_of(c.mlp, moe)
    if c.moe is not None:
        raise ValueError(f"the model has {c.moe.experts} experts already: only a dense one can be upcycled")
    new = gpt(replace(c, moe=moe))
    dense = _by_layer(model, params)
    fresh = _by_layer(new, new.init(key, next(iter(dense.values())).dtype))

    def leaf(path: str) -> Tensor:
        if path in dense:
            return dense[path]
        before, layer, after = split_run(path)
        name = after.rpartition(".")[2]
        if ".experts." not in after:  # the router's: a copy's column for each of its pieces
            x = fresh[path]
            return x[..., : moe.experts // pieces].repeat_interleave(pieces, -1)
        own = dense[f"{before}.{layer}.{after.replace('experts.', '')}"]
        cut = [own / pieces] * pieces if name == "down_bias" else own.chunk(pieces, ALONG[name])
        return torch.stack([*cut] * (moe.experts // pieces))

    leaves = {}
    for path, p in tree.to_paths(new.declare).items():
        found = [leaf(one) for one in layer_paths(path, p)]
        leaves[path] = torch.stack(found) if p.layers is not None else found[0]
    return new, tree.unflatten(tree.flatten(new.declare)[1], list(leaves.values()))


def pieces_of(mlp: int, moe: Moe) -> int:
    """How many experts make a dense block of this width. Raises ValueError where they cannot add up to it."""
    width = moe.mlp or mlp
    pieces = mlp // width
    if mlp % width or moe.experts % pieces or moe.top_k % pieces:
        raise ValueError(
            f"experts of width {width}: {pieces} or more make a block of {mlp}, so experts = {moe.experts} and top_k = "
            f"{moe.top_k} must be multiples of a whole number of them"
        )
    wanted = {"normalize": True, "scale": float(pieces), "shared": 0, "latent": None, "logit_bias": False, "capacity": None}
    wanted |= {"groups": 1} if pieces > 1 else {}
    for name, value in wanted.items():
        if getattr(moe, name) != value:
            raise ValueError(f"moe.{name} = {getattr(moe, name)}: to start from a dense block it is {value}")
    return pieces


def _by_layer(model: Model, params: Tree) -> dict[str, Tensor]:
    """{path with the global layer's number: tensor}."""
    out: dict[str, Tensor] = {}
    for (path, p), x in zip(tree.to_paths(model.declare).items(), tree.leaves(params), strict=True):
        out |= dict(zip(layer_paths(path, p), x.unbind(0) if p.layers is not None else [x], strict=True))
    return out
