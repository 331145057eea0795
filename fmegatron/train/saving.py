"""A training state as global tensors by name: what a checkpoint keeps, whatever mesh and rules the state lies on.

    params.layers.7.attn.q             a layer of a parameter: keys know nothing of how layers are stacked
    opt.0.mu.layers.7.attn.q           optimizer state that mirrors a parameter: its path ends as the parameter's does
    opt.0.count, step, key, ...        everything else, equal on all ranks

        items                     checkpoint.save
state ---------> {key: Chunks} <------------------> files
                               checkpoint.load

Pads are cut off, and what several ranks hold is given by one of them: the one whose coordinate is 0 on every unplaced axis.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.models.model import Model
from fmegatron.sharding import Mesh, Placement, Sharding
from fmegatron.train import checkpoint
from fmegatron.train.checkpoint import Chunks
from fmegatron.train.leaves import Leaf, plan_leaves
from fmegatron.train.state import TrainState
from fmegatron.tree import Tree

AnyPath = str | os.PathLike[str]
COUNTERS = ("step", "key", "consumed", "skipped")


def save(folder: AnyPath, model: Model, sh: Sharding, state: TrainState, meta: Mapping[str, Any], *, keep: int = 0) -> Path:
    """Write a state as the checkpoint of step `step + skipped` and return its folder; every process calls this."""
    return checkpoint.save(folder, steps_so_far(state), items(model, sh, state), meta, keep=keep)


def load(path: AnyPath, model: Model, sh: Sharding, state: TrainState) -> TrainState:
    """The state of a checkpoint, written on any mesh, in the tensors of `state` (a fresh one), which are filled in place.

    Raises ValueError in one line where the checkpoint is of another model or optimizer.
    """
    state = tree.map(_own_memory, state)
    wanted = items(model, sh, state, copies=True)
    _same_keys(path, wanted, "")
    checkpoint.load(path, wanted)
    return state


def load_params(path: AnyPath, model: Model, sh: Sharding, dtype: torch.dtype = torch.float32) -> Tree:
    """Only the parameters of a checkpoint, as `sh` stores them; every process calls this."""
    sh = sh.bind(model.sizes)
    leaves = plan_leaves(model, sh)
    params = tree.from_paths({leaf.path: torch.zeros(_stored_shape(leaf, sh), dtype=dtype) for leaf in leaves.values()})
    wanted = _params(params, leaves, model, sh, copies=True)
    _same_keys(path, wanted, "params.")
    checkpoint.load(path, wanted)
    return tree.map(lambda x: x.to(sh.mesh.device), params)


def steps_so_far(state: TrainState) -> int:
    """Steps that this state has seen, the skipped ones too."""
    return int(state.step.flatten()[0] + state.skipped.flatten()[0])


def items(model: Model, sh: Sharding, state: TrainState, *, copies: bool = False) -> dict[str, Chunks]:
    """{key: this process's pieces} of a state. copies: also those that another rank gives, as loading wants them."""
    sh = sh.bind(model.sizes)
    leaves = plan_leaves(model, sh)
    out = _params(state.params, leaves, model, sh, copies)
    for path, x in _named(state.opt_state):
        leaf = _mirrored(path, leaves)
        if leaf is None:
            out[f"opt.{path}"] = _everywhere(x, sh.mesh, copies)
        else:
            prefix = f"opt.{path.removesuffix(leaf.path)}"
            out |= _leaf(prefix, leaf, x, leaf.optimizer, model, sh.mesh, copies)
    return out | {name: _everywhere(getattr(state, name), sh.mesh, copies) for name in COUNTERS}


def _params(params: Tree, leaves: dict[str, Leaf], model: Model, sh: Sharding, copies: bool) -> dict[str, Chunks]:
    out: dict[str, Chunks] = {}
    for leaf, x in zip(leaves.values(), tree.leaves(params), strict=True):
        out |= _leaf("params.", leaf, x, leaf.storage, model, sh.mesh, copies)
    return out


def _leaf(prefix: str, leaf: Leaf, x: Tensor, place: Placement, model: Model, mesh: Mesh, copies: bool) -> dict[str, Chunks]:
    """A leaf as one tensor, or one for each of its layers."""
    if not leaf.stacked:
        return {prefix + leaf.path: pieces(x, place, leaf.param.true_shape(model.sizes), mesh, copies)}
    place = Placement(place.names[1:], place.axes[1:])
    run, first = _run_of(leaf.path)
    true = leaf.param.true_shape(model.sizes)[1:]
    layers = x.unbind(1 if mesh.stacked else 0)
    return {
        prefix + leaf.path.replace(f"{run}.{first}.", f"{run}.{first + i}.", 1): pieces(y, place, true, mesh, copies)
        for i, y in enumerate(layers)
    }


def _run_of(path: str) -> tuple[str, int]:
    """The name before a run's number, and the number: "layers.4.attn.q" -> ("layers", 4)."""
    parts = path.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:at]), int(parts[at])


def pieces(x: Tensor, place: Placement, true: tuple[int, ...], mesh: Mesh, copies: bool = False) -> Chunks:
    """The boxes of a global tensor of shape `true` that lie here; on a mesh of one process x is [ranks, *local]."""
    found = []
    for coordinates, local in _ranks(x, mesh):
        if not copies and any(at and axis not in place.placed for axis, at in coordinates.items()):
            continue
        offsets = []
        for dim, (axes, size) in enumerate(zip(place.axes, true, strict=True)):
            shard = 0
            for axis in axes:
                shard = shard * mesh[axis].size + coordinates[axis]
            start = min(shard * local.shape[dim], size)
            local = local.narrow(dim, 0, min(local.shape[dim], size - start))
            offsets.append(start)
        found.append((tuple(offsets), local))
    return Chunks(true, tuple(found))


def _ranks(x: Tensor, mesh: Mesh) -> Iterator[tuple[dict[str, int], Tensor]]:
    """(coordinates, local tensor) of every rank that this process holds."""
    if mesh.stacked:
        yield from ((mesh.coordinates(rank), x[rank]) for rank in range(mesh.size))
    else:
        yield ({} if mesh.rank is None else mesh.coordinates(mesh.rank)), x


def _everywhere(x: Tensor, mesh: Mesh, copies: bool) -> Chunks:
    """A tensor that is equal on all ranks."""
    true = tuple(x.shape[1:] if mesh.stacked else x.shape)
    return pieces(x, Placement((), ((),) * len(true)), true, mesh, copies)


def _named(state: Tree) -> Iterator[tuple[str, Tensor]]:
    """(dotted path, leaf), with the fields of named tuples by name."""
    accessors, values, _ = optree.tree_flatten_with_accessor(state)
    for accessor, value in zip(accessors, values, strict=True):
        yield ".".join(str(getattr(entry, "field", entry.entry)) for entry in accessor), value


def _mirrored(path: str, leaves: Mapping[str, Leaf]) -> Leaf | None:
    """The parameter whose path ends an optimizer's leaf's: "0.mu.layers.0.attn.q" mirrors "layers.0.attn.q"."""
    parts = path.split(".")
    return next((leaves[end] for i in range(len(parts)) if (end := ".".join(parts[i:])) in leaves), None)


def _stored_shape(leaf: Leaf, sh: Sharding) -> list[int]:
    here = sh if leaf.param.layers is None else sh.bind({"layers": leaf.param.layers})
    shape = [sh.mesh.size] if sh.mesh.stacked else []
    for name, axes in zip(leaf.storage.names, leaf.storage.axes, strict=True):
        size = here.size(name)
        for axis in axes:
            size //= sh.mesh[axis].size
        shape.append(size)
    return shape


def _own_memory(x: Tensor) -> Tensor:
    """x itself, or a copy where its elements share memory (ranks of a vmap that hold one value)."""
    return x.clone(memory_format=torch.contiguous_format) if 0 in x.stride() and x.numel() > 1 else x


def _same_keys(path: AnyPath, wanted: Mapping[str, Chunks], prefix: str) -> None:
    """ValueError where the checkpoint has tensors that nobody asks for: it is of a larger model."""
    more = [key for key in checkpoint.tensors(path) if key.startswith(prefix) and key not in wanted]
    if more:
        count = f" (and {len(more) - 1} more)" if len(more) > 1 else ""
        raise ValueError(f"checkpoint {checkpoint.find(path)} holds {more[0]}{count}, which this model or optimizer has not")
