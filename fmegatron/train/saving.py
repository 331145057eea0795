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
from fmegatron.models import layers
from fmegatron.models.model import Model
from fmegatron.sharding import Mesh, Placement, Sharding
from fmegatron.sharding.chunks import Chunks, chunks_of
from fmegatron.train import checkpoint
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
    params = layers.zeros(model, sh, dtype)
    wanted = _params(params, model, sh, copies=True)
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
    out = _params(state.params, model, sh, copies)
    for path, x in _named(state.opt_state):
        leaf = _mirrored(path, leaves)
        if leaf is None:
            out[f"opt.{path}"] = _everywhere(x, sh.mesh, copies)
        else:
            prefix = f"opt.{path.removesuffix(leaf.path)}"
            by_layer = layers.leaf_by_layer(leaf.path, leaf.param, x, leaf.optimizer, model.sizes, sh.mesh, copies)
            out |= {prefix + key: chunks for key, chunks in by_layer.items()}
    return out | {name: _everywhere(getattr(state, name), sh.mesh, copies) for name in COUNTERS}


def _params(params: Tree, model: Model, sh: Sharding, copies: bool) -> dict[str, Chunks]:
    return {f"params.{path}": chunks for path, chunks in layers.by_layer(model, sh, params, copies).items()}


def _everywhere(x: Tensor, mesh: Mesh, copies: bool) -> Chunks:
    """A tensor that is equal on all ranks."""
    true = tuple(x.shape[1:] if mesh.stacked else x.shape)
    return chunks_of(x, Placement((), ((),) * len(true)), true, mesh, copies)


def _named(state: Tree) -> Iterator[tuple[str, Tensor]]:
    """(dotted path, leaf), with the fields of named tuples by name."""
    accessors, values, _ = optree.tree_flatten_with_accessor(state)
    for accessor, value in zip(accessors, values, strict=True):
        yield ".".join(str(getattr(entry, "field", entry.entry)) for entry in accessor), value


def _mirrored(path: str, leaves: Mapping[str, Leaf]) -> Leaf | None:
    """The parameter whose path ends an optimizer's leaf's: "0.mu.layers.0.attn.q" mirrors "layers.0.attn.q"."""
    parts = path.split(".")
    return next((leaves[end] for i in range(len(parts)) if (end := ".".join(parts[i:])) in leaves), None)


def _own_memory(x: Tensor) -> Tensor:
    """x itself, or a copy where its elements share memory (ranks of a vmap that hold one value)."""
    return x.clone(memory_format=torch.contiguous_format) if 0 in x.stride() and x.numel() > 1 else x


def _same_keys(path: AnyPath, wanted: Mapping[str, Chunks], prefix: str) -> None:
    """ValueError where the checkpoint has tensors that nobody asks for: it is of a larger model."""
    more = [key for key in checkpoint.tensors(path) if key.startswith(prefix) and key not in wanted]
    if more:
        count = f" (and {len(more) - 1} more)" if len(more) > 1 else ""
        raise ValueError(f"checkpoint {checkpoint.find(path)} holds {more[0]}{count}, which this model or optimizer has not")
