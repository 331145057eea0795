"""A training state as global tensors by name: what a checkpoint keeps, whatever mesh and rules the state lies on.

    params.layers.7.attn.q             a layer of a parameter: keys know nothing of how layers are stacked
    opt.0.mu.layers.7.attn.q           optimizer state that mirrors a parameter: its path ends as the parameter's does
    precision.remainder.layers.7...    the same of what the precision keeps
    opt.0.count, step, key, ...        everything else, equal on all ranks

        items                     checkpoint.save
state ---------> {key: Chunks} <------------------> files
                               checkpoint.load

Pads are cut off, and what several ranks hold is given by one of them: the one whose coordinate is 0 on every unplaced axis.
Stages of a pipeline hold leaves of their own, and each gives these; what several hold is given by the first of them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

import optree
import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.models import layers
from fmegatron.models.model import Model
from fmegatron.nn.param import Param, matrix
from fmegatron.optim.adafactor import inputs, outputs
from fmegatron.optim.formats import blocks
from fmegatron.sharding import Mesh, Placement, Sharding
from fmegatron.sharding.apart import replicas
from fmegatron.sharding.chunks import Chunks, chunks_of
from fmegatron.sharding.placement import Sizes
from fmegatron.train import checkpoint, lifted
from fmegatron.train.leaves import Leaf, plan_leaves
from fmegatron.train.meeting import settled
from fmegatron.train.pipeline.stages import Placed
from fmegatron.train.state import TrainState
from fmegatron.train.together import together
from fmegatron.tree import Tree

T = TypeVar("T")
AnyPath = str | os.PathLike[str]
COUNTERS = ("step", "key", "consumed", "skipped")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Strict = Literal["both", "missing", "extra", "none"]
Say = Callable[[str], None]


def save(
    folder: AnyPath,
    model: Model,
    sh: Sharding,
    state: TrainState,
    meta: Mapping[str, Any],
    *,
    keep: int = 0,
    keep_every: int = 0,
) -> checkpoint.Address:
    """Write a state as the checkpoint of step `step + skipped` and return its folder; every process calls this."""
    state = state._replace(outer=settled(sh, state.outer))
    return checkpoint.save(folder, steps_so_far(state), items(model, sh, state), meta, keep=keep, keep_every=keep_every)


def load(
    path: AnyPath,
    model: Model,
    sh: Sharding,
    state: TrainState,
    *,
    strict: Strict = "both",
    say: Say = print,
    verify: bool = True,
) -> TrainState:
    """The state of a checkpoint, written on any mesh, in the tensors of `state` (a fresh one), which are filled in place.

    strict: what is an error: tensors that the checkpoint lacks ("missing": they keep their values), tensors that nobody
    asks for ("extra"), "both" or "none"; what is no error is told to `say`. Raises ValueError in one line, naming the
    first such tensor: the checkpoint is of another model or optimizer.
    """
    state = tree.map(own_memory, state)
    found = _found(path, verify)
    wanted = select(found, items(model, sh, state, copies=True), "", strict, say)
    lifted.load(found, wanted, replicas(sh), say)
    return state


def load_params(
    path: AnyPath,
    model: Model,
    sh: Sharding,
    dtype: torch.dtype = torch.float32,
    *,
    start: Tree = None,
    strict: Strict = "both",
    say: Say = print,
    verify: bool = True,
) -> Tree:
    """Only the parameters of a checkpoint, as `sh` stores them; every process calls this.

    start: values for what the checkpoint lacks, where `strict` allows that (None: zeros); strict, say: see `load`.
    """
    sh = sh.bind(model.sizes)
    params = layers.zeros(model, sh, dtype) if start is None else tree.map(lambda x: own_memory(x.to(dtype)), start)
    found = _found(path, verify)
    wanted = select(found, _params(params, model, sh, copies=True), "params.", strict, say)
    lifted.load(found, wanted, 1, say)
    return tree.map(lambda x: x.to(sh.mesh.device), params)


def select(path: checkpoint.Address, wanted: dict[str, Chunks], prefix: str, strict: Strict, say: Say) -> dict[str, Chunks]:
    """What of `wanted` the checkpoint holds; `prefix`: which of its tensors are expected to be asked for."""
    held = checkpoint.tensors(path)
    asked = together(lambda: list(wanted), lambda lists: dict.fromkeys(key for keys in lists for key in keys))  # by any stage
    missing = [key for key in asked if key not in held]
    extra = [key for key in held if key.startswith(prefix) and key not in asked]
    for kind, keys, text in (
        ("missing", missing, "lacks {}, which keep their values"),
        ("extra", extra, "holds {}, which this model or optimizer has not"),
    ):
        if not keys:
            continue
        line = f"checkpoint {path} " + text.format(keys[0] + (f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""))
        if strict not in ("both", kind):
            say(line)
        elif kind == "extra":
            raise ValueError(f"{line} (checkpoint.strict decides)")
    return wanted if strict in ("both", "missing") else {key: wanted[key] for key in wanted if key in held}


def _found(path: AnyPath, verify: bool) -> checkpoint.Address:
    """The newest good checkpoint there."""
    found, said = checkpoint.newest_good(path, verify=verify)
    for line in said:
        warnings.warn(line, stacklevel=3)
    return found if found is not None else checkpoint.find(path)


def params_only(items: Mapping[str, Chunks], dtype: torch.dtype | None = None) -> dict[str, Chunks]:
    """The parameters among the items of a state, in an export dtype (None: as they are)."""

    def cast(x: Tensor) -> Tensor:
        return x if dtype is None else x.to(dtype)

    return {
        key: Chunks(chunks.shape, tuple((offsets, cast(x)) for offsets, x in chunks.pieces))
        for key, chunks in items.items()
        if key.startswith("params.")
    }


def steps_so_far(state: TrainState) -> int:
    """Steps that this state has seen, the skipped ones too."""
    return int(state.step.flatten()[0] + state.skipped.flatten()[0])


def items(model: Model, sh: Sharding, state: TrainState, *, copies: bool = False) -> dict[str, Chunks]:
    """{key: this process's pieces} of a state. copies: also those that another rank gives, as loading wants them."""
    sh, count = sh.bind(model.sizes), replicas(sh)
    if count > 1:
        own = {r: items(model, one, part, copies=copies) for r, one, part in lifted.by_replica(sh, state)}
        return lifted.lift(own, count, copies)
    leaves = plan_leaves(model, sh)
    out = _params(state.params, model, sh, copies)
    sizes: Sizes = {**model.sizes, "one": 1} | {f"{name}_blocks": blocks(sh.true_size(name)) for name in model.sizes}
    beside = [("opt", state.opt_state), ("precision", state.precision)]
    for path, x in [(f"{root}.{path}", x) for root, kept in beside for path, x in _named(kept)]:
        leaf = _mirrored(path, leaves)
        if leaf is None:
            out[path] = _everywhere(x, sh.mesh, copies)
        else:
            prefix = path.removesuffix(leaf.path)
            declared, place = _factored(prefix.split(".")[-2], leaf)
            by_layer = layers.leaf_by_layer(leaf.path, declared, x, place, sizes, sh.mesh, copies)
            out |= {prefix + key: chunks for key, chunks in by_layer.items()}
    out |= _outer(state.outer, model, sh, leaves, copies)
    return out | {name: _everywhere(getattr(state, name), sh.mesh, copies) for name in COUNTERS}


def of_stages(items: Mapping[str, Chunks], placed: Placed | None) -> dict[str, Chunks]:
    """Of a state's items those that this process gives: what several stages hold is given by the first of them."""
    if placed is None or placed.rank is None:
        return dict(items)
    leaves = tree.to_paths(placed.model.declare)
    names = {name: path for path, declared in leaves.items() for name in layers.layer_paths(path, declared)}

    def gives(key: str) -> bool:
        leaf = _mirrored(key, names)
        return placed.rank == 0 if leaf is None else leaf not in placed.elsewhere

    return {key: chunks for key, chunks in items.items() if gives(key)}


def _params(params: Tree, model: Model, sh: Sharding, copies: bool) -> dict[str, Chunks]:
    return {f"params.{path}": chunks for path, chunks in layers.by_layer(model, sh, params, copies).items()}


def _outer(outer: Tree, model: Model, sh: Sharding, leaves: Mapping[str, Leaf], copies: bool) -> dict[str, Chunks]:
    """An outer optimizer's state: it has layers one by one, each as its parameter lies in the optimizer."""
    by_name = {name: leaf for path, leaf in leaves.items() for name in layers.layer_paths(path, leaf.param)}
    out: dict[str, Chunks] = {}
    for path, x in _named(outer):
        leaf = _mirrored(path, by_name)
        if leaf is None:
            out[f"outer.{path}"] = _everywhere(x, sh.mesh, copies)
            continue
        place, true, cut = leaf.optimizer, leaf.param.true_shape(model.sizes), int(leaf.stacked)
        out[f"outer.{path}"] = chunks_of(x, Placement(place.names[cut:], place.axes[cut:]), true[cut:], sh.mesh, copies)
    return out


def _everywhere(x: Tensor, mesh: Mesh, copies: bool) -> Chunks:
    """A tensor that is equal on all ranks."""
    true = tuple(x.shape[1:] if mesh.stacked else x.shape)
    return chunks_of(x, Placement((), ((),) * len(true)), true, mesh, copies)


def _named(state: Tree) -> Iterator[tuple[str, Tensor]]:
    """(dotted path, leaf), with the fields of named tuples by name."""
    accessors, values, _ = optree.tree_flatten_with_accessor(state)
    for accessor, value in zip(accessors, values, strict=True):
        yield ".".join(str(getattr(entry, "field", entry.entry)) for entry in accessor), value


def _mirrored(path: str, leaves: Mapping[str, T]) -> T | None:
    """The parameter whose path ends an optimizer's leaf's: "0.mu.layers.0.attn.q" mirrors "layers.0.attn.q"."""
    parts = path.split(".")
    return next((leaves[end] for i in range(len(parts)) if (end := ".".join(parts[i:])) in leaves), None)


def _factored(slot: str, leaf: Leaf) -> tuple[Param, Placement]:
    """How a state's leaf lies: as its parameter; of Adafactor's means, with size 1 in the dims that they are over; of
    moments' exponents, with a last dim of blocks."""
    view = matrix(leaf.param)
    if slot.endswith("_shift"):
        return replace(leaf.param, names=f"{leaf.param.names}_blocks"), leaf.optimizer
    if view is None or slot not in ("rows", "cols"):
        return leaf.param, leaf.optimizer
    names = leaf.param.names.split()
    gone = outputs(view, len(names)) if slot == "rows" else inputs(view)
    place = leaf.optimizer
    axes = tuple(() if dim in gone else axes for dim, axes in enumerate(place.axes))
    kept = ["one" if dim in gone else name for dim, name in enumerate(names)]
    return replace(leaf.param, names=" ".join(kept)), replace(place, names=tuple(kept), axes=axes, pads=())


def own_memory(x: Tensor) -> Tensor:
    """x itself, or a copy where its elements share memory (ranks of a vmap that hold one value)."""
    return x.clone(memory_format=torch.contiguous_format) if 0 in x.stride() and x.numel() > 1 else x
