"""The state of a training run, one tree of local shards: made here, moved to other meshes by checkpoint.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmegatron import random, tree
from fmegatron.models.model import Model
from fmegatron.nn import param
from fmegatron.optim import Transform
from fmegatron.optim.base import Dims, Views, rows_and_columns
from fmegatron.sharding import Sharding, spmd
from fmegatron.sharding.apart import inside
from fmegatron.sharding.collectives import Once, Pmax, Psum, apply
from fmegatron.sharding.relayout import run
from fmegatron.train.leaves import Leaf, plan_leaves, to_optimizer
from fmegatron.train.matrices import mean_over, on_matrices
from fmegatron.train.meeting import meeting_of
from fmegatron.train.precision import PLAIN, Precision
from fmegatron.train.semisync import SemiSync
from fmegatron.tree import Tree


class TrainState(NamedTuple):
    """step: applied updates. consumed: samples seen. skipped: steps that changed nothing else. All 0-D int64.

    precision: what the run's precision keeps from step to step (loss scale, remainders; see precision.py), or nothing.
    outer: what semi-synchronous replicas keep of their outer optimizer (semisync.py), or nothing.
    """

    step: Tensor
    params: Tree
    opt_state: Tree
    key: Tensor
    consumed: Tensor
    skipped: Tensor
    precision: Tree = ()
    outer: Tree = ()


def init(
    model: Model,
    tx: Transform,
    sh: Sharding,
    key: int | Tensor = 0,
    params: Tree = None,
    dtype: torch.dtype = torch.float32,
    precision: Precision = PLAIN,
    semisync: SemiSync | None = None,
) -> TrainState:
    """The state before the first step: local shards, stacked where one process holds all ranks.

    params: local shards to start from (of `models.from_hf`, say); None draws them from `key`, each rank its own shards only,
    with bit-equal values on every mesh. dtype: of the parameters at rest. precision: what is kept beside
    them. semisync: the step's.
    """
    meeting = meeting_of(model, sh.bind(model.sizes), semisync)
    one = inside(meeting.sh)
    leaves = plan_leaves(model, one)
    seed = random.key(key) if isinstance(key, int) else key

    def on_rank(here: Sharding, like: Tensor, given: Tree) -> TrainState:
        here = replace(one, rank=here.rank)
        own = given if given is not None else init_params(model, here, leaves, seed.to(like.device), dtype)
        zero = tree.leaves(own)[0].new_zeros((), dtype=torch.int64)
        held = to_optimizer(leaves, own, here)
        key = seed.to(like.device) + zero
        kept, outer = precision.init(zero, held), meeting.outer(held)
        return TrainState(zero, precision.at_rest(own), tx.init(held), key, zero.clone(), zero.clone(), kept, outer)

    like = torch.zeros(sh.mesh.size if sh.mesh.stacked else (), device=sh.mesh.device)
    return spmd(meeting.sh, on_rank)(like, params)


def init_params(model: Model, sh: Sharding, leaves: dict[str, Leaf], key: Tensor, dtype: torch.dtype) -> Tree:
    """This rank's shards of the initial parameters, as they are stored."""

    def leaf(path: str, declared: param.Param) -> Tensor:
        here = sh if declared.layers is None else sh.bind({"layers": declared.layers})
        place = leaves[path].storage
        names = zip(place.names, place.axes, place.pads or (0,) * len(place.names), strict=True)
        index = [here.slice_index(name, axes, key, pad) for name, axes, pad in names]
        return param.init_leaf(declared, path, key, model.sizes, index, dtype, place.pads)

    return tree.map_with_path(leaf, model.declare)


def check_there(state: TrainState) -> None:
    """ValueError for a state that was given away."""
    if state.step.numel() == 0:
        raise ValueError("this state was given away to a step that reuses memory (donate): go on from what it returned")


def take_over(old: TrainState, new: TrainState) -> TrainState:
    """`new` as tensors of its own; those of `old`, whose memory it may hold, are emptied."""
    own: TrainState = tree.map(lambda x: x.detach(), new)
    for x in tree.to_paths(old).values():
        x.set_()
    return own


@dataclass(frozen=True)
class Over:
    """What an optimizer sees across shards: `over` of `Transform.update`, for trees in the optimizer's placement."""

    sh: Sharding
    leaves: dict[str, Leaf]
    every: Sharding | None = None  # with the axis of pipeline stages, where these are ranks
    elsewhere: frozenset[str] = frozenset()  # leaves that an earlier stage holds and counts

    def norm(self, grads: Tree) -> Tensor:
        """The L2 norm of the whole tree; each element counts once, however many ranks hold it."""

        def square(x: Tensor) -> Tensor:
            return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).square()

        return self._total(grads, square).sqrt()

    def zeros(self, grads: Tree) -> Tensor:
        """How many elements of the whole tree are zero, int64; pads left out."""
        sizes = [leaf.param.true_shape(self.sh.sizes) for path, leaf in self.leaves.items() if path not in self.elsewhere]
        one = tree.leaves(grads)[0].new_ones((), dtype=torch.int64)
        for axis in (self.every or self.sh).mesh.axes:  # the same on all ranks of a stage
            if axis.size > 1 and axis.name != "pp":
                assert self.sh.rank is not None
                one = apply(one, self.sh.rank, Once(axis))
        every = over_ranks(self.every or self.sh, one * sum(map(math.prod, sizes)), Psum)
        return every - self._total(grads, lambda x: x.count_nonzero())

    def _total(self, grads: Tree, of: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum of a number of each shard, over the ranks that hold different ones."""
        total: Any = 0
        for path, x in tree.to_paths(grads).items():
            if path in self.elsewhere:
                continue
            number = of(x)
            for axis in self.sh.mesh.axes:
                if axis.size > 1 and axis.name not in self.leaves[path].optimizer.placed:
                    assert self.sh.rank is not None
                    number = apply(number, self.sh.rank, Once(axis))
            total = total + number
        total = total if isinstance(total, Tensor) else torch.zeros((), device=self.sh.mesh.device)  # of a group without leaves
        return over_ranks(self.every or self.sh, total, Psum)

    def mean(self, updates: Tree, dims: Dims, square: bool = False) -> Tree:
        """Each leaf's mean over its dims `dims[path]`, which stay with size 1, or that of its squares."""
        return mean_over(self.sh, self.leaves, updates, dims, square)

    def whole(self, fn: Callable[[Tensor], Tensor], updates: Tree, views: Views) -> Tree:
        """fn of all leaves' whole matrices, shared out over the ranks."""
        return on_matrices(self.sh, self.leaves, fn, updates, views)

    def index(self, path: str, leaf: Tensor) -> tuple[str, Tensor, Tensor]:
        """A leaf's name without its run, and its elements' global index, layers by their global numbers."""
        declared, place = self.leaves[path].param, self.leaves[path].optimizer
        sh = self.sh if declared.layers is None else self.sh.bind({"layers": declared.layers})
        name, first = param.canonical(path, declared)
        index = [sh.slice_index(dim, place.axes[i], leaf, place.pad(i)) for i, dim in enumerate(place.names)]
        index = [x + first if dim == 0 else x for dim, x in enumerate(index)]
        return name, *rows_and_columns(index, declared.true_shape(sh.sizes), leaf)


def over_ranks(sh: Sharding, x: Tensor, op: type[Psum] | type[Pmax]) -> Tensor:
    """The sum or the maximum over all ranks."""
    return run(x, sh.rank, [op(axis) for axis in sh.mesh.axes if axis.size > 1])


def sum_together(sh: Sharding, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums over all ranks of several values, in one collective an axis."""
    summed = tree.as_one(values, lambda flat: over_ranks(sh, flat, Psum))
    return {name: x.to(values[name].dtype) for name, x in summed.items()}
