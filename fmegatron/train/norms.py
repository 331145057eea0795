"""Norms of parameters, gradients, updates and an optimizer's slots: of all of them, and of each parameter by its layer.

Squares are counted where an element lies, once, however many ranks hold it; one collective an axis for all of them.
The update is theta_before - theta_after in total, decay and skipped steps included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.models.layers import layer_paths
from fmegatron.models.model import Model
from fmegatron.optim.low_bit import decoded
from fmegatron.optim.packed import joined
from fmegatron.sharding.collectives import Once, Pmax, Psum, apply
from fmegatron.train.leaves import Leaf
from fmegatron.train.state import Over, over_ranks
from fmegatron.tree import Tree

Leaves = Mapping[str, Tensor]


def watched(over: Over, whole: Model, before: Tree, grads: Tree, params: Tree, opt_state: Tree) -> dict[str, Tensor]:
    """The statistics that `over.sh.watch` asks for, of one rank's trees at the optimizer's placement. whole: the model of
    all stages.

    "norms": param_norm, after the update. "optimizer":
    optimizer/l2_norm/WHAT/global of param, grad, update and each slot, min and max of slots that are second moments.
    "parameters": these norms for each parameter too, PATH with the layer's number in place of global.
    """
    watch = over.sh.watch
    new, before = tree.to_paths(joined(params)), joined(before)
    trees: dict[str, Leaves] = {}
    if watch & {"norms", "optimizer"}:
        trees["param"] = new
    if "optimizer" in watch:
        trees["grad"] = tree.to_paths(grads)
        trees["update"] = {path: x - new[path] for path, x in tree.to_paths(before).items()}
        slots = slots_of(decoded(opt_state), new)
        trees |= slots
    if not trees:
        return {}
    names = [key for path, p in tree.to_paths(whole.declare).items() for key in layer_paths(path, p)]
    none = next(iter(new.values())).new_zeros(1, dtype=torch.float64)
    vectors = [by_layer(over, names, leaves, none) for leaves in trees.values()]
    total = over_ranks(over.every or over.sh, torch.stack(vectors), Psum)
    sums = dict(zip(trees, total.sum(-1).unbind(0), strict=True))
    out = {"param_norm": sums["param"].sqrt()} if "norms" in watch else {}
    if "optimizer" not in watch:
        return out
    out |= {f"optimizer/l2_norm/{what}/global": sums[what].sqrt() for what in trees}
    if "parameters" in watch:
        for what, row in zip(trees, total.unbind(0), strict=True):
            out |= {f"optimizer/l2_norm/{what}/{key}": x.sqrt() for key, x in zip(names, row.unbind(0), strict=True)}
    for what in (name for name in slots if name in SECOND):
        ends = torch.stack([torch.stack((-x.amin(), x.amax())).double() for x in slots[what].values()]).amax(0)
        low, high = over_ranks(over.every or over.sh, ends, Pmax).unbind(0)
        out |= {f"optimizer/min/{what}/global": -low, f"optimizer/max/{what}/global": high}
    return out


SECOND = ("nu", "nu_max")  # names of slots that are means of squares


def slots_of(opt_state: Tree, params: Leaves) -> dict[str, Leaves]:
    """{slot: {path of a parameter: its state}} of state that mirrors parameters: mu, nu, or what the optimizer calls it."""
    found: dict[str, dict[str, Tensor]] = {}
    for place, x in tree.to_paths(opt_state).items():
        parts = place.split(".")
        for i in range(1, len(parts)):
            path = ".".join(parts[i:])
            if path in params and params[path].shape == x.shape and x.is_floating_point():
                name = parts[i - 1] if not parts[i - 1].isdigit() or i < 2 else f"{parts[i - 2]}_{parts[i - 1]}"
                found.setdefault(name, {})[path] = x
                break
    return dict(found)


def squares(x: Tensor) -> Tensor:
    """[n, elements] -> [n] sums of squares, in fp32 at least."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).double().square()


def by_layer(over: Over, names: Sequence[str], leaves: Leaves, none: Tensor) -> Tensor:
    """[names]: this rank's part of the sum of squares of each parameter, a layer of a stacked one for itself.

    none: [1], a zero to make others of.
    """
    runs: dict[int, Tensor] = {}
    for path, x in leaves.items():
        if path in over.elsewhere:
            continue
        leaf = over.leaves[path]
        values = squares(x.flatten(1) if leaf.stacked else x.flatten()[None])
        for axis in over.sh.mesh.axes:
            if axis.size > 1 and axis.name not in leaf.optimizer.placed:
                assert over.sh.rank is not None
                values = apply(values, over.sh.rank, Once(axis))
        runs[names.index(layer_paths(path, leaf.param)[0])] = _all_layers(over, leaf, values)
    at, pieces = 0, []
    for start in sorted(runs):
        pieces += [none.expand(start - at), runs[start]]
        at = start + len(runs[start])
    return torch.cat([*pieces, none.expand(len(names) - at)])


def _all_layers(over: Over, leaf: Leaf, values: Tensor) -> Tensor:
    """Values of this rank's layers at their places among all of the leaf's, zeros elsewhere."""
    axes = leaf.optimizer.axes[0] if leaf.stacked else ()
    if not axes:
        return values
    layers = leaf.param.layers or 0
    index = over.sh.bind({"layers": layers}).slice_index("layers", axes, values)
    return (index[:, None] == torch.arange(layers, device=values.device)).to(values.dtype).T @ values
