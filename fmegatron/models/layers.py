"""Parameters layer by layer, whatever runs they are stacked in: the names under which files keep them.

    by_layer(model, sh, params)     {"layers.7.attn.q": this process's boxes of layer 7's query weights, ...}
    zeros(model, sh)                a tree to be filled through those boxes
    whole_layers(model, sh, params) {"layers.7.attn.q": a function that gives the global tensor}
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.models.model import Model
from fmegatron.nn.param import Param
from fmegatron.sharding import Mesh, Placement, Sharding, unshard
from fmegatron.sharding.chunks import Chunks, chunks_of
from fmegatron.sharding.placement import Sizes
from fmegatron.tree import Tree


def layer_paths(path: str, param: Param) -> list[str]:
    """A leaf's path for each of its layers: "layers.4.q" of 2 layers -> ["layers.4.q", "layers.5.q"]."""
    if param.layers is None:
        return [path]
    before, run, after = split_run(path)
    return [f"{before}.{run + i}.{after}" for i in range(param.layers)]


def split_run(path: str) -> tuple[str, int, str]:
    """What lies before a run's number, the number, what lies after: "layers.4.attn.q" -> ("layers", 4, "attn.q")."""
    parts = path.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :])


def leaf_by_layer(
    path: str, param: Param, x: Tensor, place: Placement, sizes: Sizes, mesh: Mesh, copies: bool = False
) -> dict[str, Chunks]:
    """A leaf that lies as `place`, as one tensor, or one for each of its layers."""
    true = param.true_shape(sizes)
    if param.layers is None:
        return {path: chunks_of(x, place, true, mesh, copies)}
    inner = Placement(place.names[1:], place.axes[1:])
    layers = x.unbind(1 if mesh.stacked else 0)
    return {
        key: chunks_of(y, inner, true[1:], mesh, copies) for key, y in zip(layer_paths(path, param), layers, strict=True)
    }


def by_layer(model: Model, sh: Sharding, params: Tree, copies: bool = False) -> dict[str, Chunks]:
    """{path with the global layer's number: chunks} of parameters as `sh`, bound to the model's sizes, stores them."""
    out: dict[str, Chunks] = {}
    for (path, p), x in zip(tree.to_paths(model.declare).items(), tree.leaves(params), strict=True):
        out |= leaf_by_layer(path, p, x, _stored(p, path, sh), model.sizes, sh.mesh, copies)
    return out


def zeros(model: Model, sh: Sharding, dtype: torch.dtype = torch.float32) -> Tree:
    """Parameters of zeros, as `sh`, bound to the model's sizes, stores them; on the CPU."""

    def leaf(path: str, p: Param) -> Tensor:
        here = sh if p.layers is None else sh.bind({"layers": p.layers})
        place = _stored(p, path, sh)
        shape = [sh.mesh.size] if sh.mesh.stacked else []
        for name, axes in zip(place.names, place.axes, strict=True):
            size = here.size(name) + place.pad(place.names.index(name))
            for axis in axes:
                size //= sh.mesh[axis].size
            shape.append(size)
        return torch.zeros(shape, dtype=dtype)

    return tree.map_with_path(leaf, model.declare)


def whole_layers(model: Model, sh: Sharding, params: Tree) -> dict[str, Callable[[], Tensor]]:
    """{path with the global layer's number: a function that gives the global tensor without pads}; all processes call it."""
    out: dict[str, Callable[[], Tensor]] = {}
    for (path, p), x in zip(tree.to_paths(model.declare).items(), tree.leaves(params), strict=True):
        stacked = p.layers is not None
        names = p.names.removeprefix("layers ") if stacked else p.names
        for i, key in enumerate(layer_paths(path, p)):
            y = x.select(1 if sh.mesh.stacked else 0, i) if stacked else x
            out[key] = partial(unshard, sh, y, names, "storage")
    return out


def _stored(p: Param, path: str, sh: Sharding) -> Placement:
    here = sh if p.layers is None else sh.bind({"layers": p.layers})
    return here.placement(p.names, "storage", path)
