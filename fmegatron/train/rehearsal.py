"""A train step without its mesh: the very step as rank 0 of an abstract mesh, on meta tensors, ready to be watched."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fmegatron import optim, tree
from fmegatron.data.batches import NAMES
from fmegatron.models import Model
from fmegatron.optim import Transform
from fmegatron.sharding import Placement, Sharding, shard, spmd
from fmegatron.sharding.sharding import NO_LAYOUT
from fmegatron.train.leaves import Leaf, to_optimizer
from fmegatron.train.planned import Plan, plan_step
from fmegatron.train.state import TrainState
from fmegatron.train.step import step_on_rank
from fmegatron.transforms import Autograd
from fmegatron.tree import Tree


@dataclass(frozen=True)
class Rehearsal:
    """A step of rank 0 of an abstract mesh, on meta tensors, ready to run: `step()`. held: the state's tensors and batch's.

    host: whether the optimizer's arrays lie in host memory.
    """

    plan: Plan
    opt_state: Tree
    state: TrainState
    held: list[Tensor]
    step: Callable[[], None]
    host: bool


def rehearse(
    model: Model,
    sharding: Sharding,
    engine: Autograd,
    *,
    batch: tuple[int, int],
    tx: Transform | None = None,
    fields: Mapping[str, str] = NAMES,
    donate: bool = False,
    finish: Callable[[Transform], Callable[..., Any]] = optim.fuse,
    **settings: Any,
) -> Rehearsal:
    """A step that can be run without its mesh, differentiated by `engine`.

    settings: those of `plan_step`; finish: the update of an optimizer; the others are `explain`'s. Raises ValueError where
    a leaf or the batch does not divide.
    """
    sh = replace(sharding, layout=NO_LAYOUT).bind(model.sizes)
    rows, seq = batch
    bound = sh.bind({"batch": rows, "seq": seq, "loss_seq": seq})
    for names in ("batch seq", "batch seq embed", "batch loss_seq"):
        bound.placement(names, leaf="the batch")
    plan = replace(plan_step(model, sh, **settings), compiled=engine)
    tx = optim.adamw(1e-3) if tx is None else tx
    shapes = {path: local_shape(sh, leaf, leaf.storage) for path, leaf in plan.leaves.items()}
    params = tree.map_with_path(lambda path, _: _empty(shapes[path]), plan.model.declare)
    data = {key: shard(sh, _empty((rows, seq)[: len(names.split())], _dtype(key)), names) for key, names in fields.items()}
    with torch.no_grad():
        held = spmd(plan.sh, lambda here: to_optimizer(plan.leaves, params, here))()
        opt_state, outer = tx.init(held), plan.meeting.outer(held)
    zero = _empty((), torch.int64)
    state = TrainState(zero, params, opt_state, zero, zero, zero, outer=outer)
    run = spmd(plan.meeting.sh, lambda here: step_on_rank(plan, finish(tx), here, state, data, donate=donate or tx.host))

    def step() -> None:
        with torch.no_grad():
            run()

    return Rehearsal(plan, opt_state, state, [*tree.leaves(params), *tree.leaves(opt_state), *data.values()], step, tx.host)


def _empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _dtype(key: str) -> torch.dtype:
    return torch.float32 if key == "weights" else torch.int64


def local_shape(sh: Sharding, leaf: Leaf, place: Placement) -> tuple[int, ...]:
    """A leaf's shape on one rank, where it lies as `place`."""
    sh = sh if leaf.param.layers is None else sh.bind({"layers": leaf.param.layers})
    ranks = [math.prod(sh.mesh[axis].size for axis in axes) for axes in place.axes]
    return tuple((sh.size(name) + place.pad(dim)) // n for dim, (name, n) in enumerate(zip(place.names, ranks, strict=True)))
