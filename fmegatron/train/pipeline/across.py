"""What a step's stages do together: leaves that several hold, the loss and statistics that some have, the gradient's norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fmegatron import tree
from fmegatron.models.model import Node, Values
from fmegatron.train.chain import Step
from fmegatron.train.pipeline.executor import Execution, plan_visits
from fmegatron.train.pipeline.stages import Placed
from fmegatron.train.pipeline.transports import Imagined, Local, PointToPoint, Transport, imagine
from fmegatron.train.remat import Remat
from fmegatron.train.taps import nothing
from fmegatron.train.weights import Weights
from fmegatron.tree import Tree


def transport_of(placed: Placed) -> Transport:
    """How this process's stages reach the others."""
    specs = placed.memo.setdefault("specs", {})
    if placed.rank is None:
        return Local(specs)
    if placed.mesh.kind == "abstract":
        return Imagined(placed.mesh, specs)
    return PointToPoint(placed.mesh, placed.schedule.rank_of, specs)


def execute(
    placed: Placed, parts: Sequence[Values], new_step: Callable[[], Step], weights: Weights, remat: Remat
) -> tuple[Values, Values]:
    """Run a step's actions over microbatches; the sums of the losses, and what was tapped, of this process's stages."""
    weights.plan(plan_visits(placed, remat, weights))
    execution = Execution(placed, parts, new_step, remat, transport_of(placed))
    execution.run()
    return execution.losses, execution.taps


def execute_forward(
    placed: Placed, parts: Sequence[Values], evaluate: Callable[[Sequence[Node], Values], Values], weights: Weights
) -> Values:
    """The sums of the losses of this process's stages over at most the schedule's microbatches, forward only."""
    weights.plan(plan_visits(placed, Remat(), weights, len(parts)))
    execution = Execution(placed, parts, _no_step, Remat(), transport_of(placed), evaluate)
    execution.run()
    return execution.losses


def _no_step() -> Step:
    raise AssertionError("nothing is differentiated")


def sum_shared(placed: Placed, grads: Tree) -> Tree:
    """Gradients of leaves that several ranks hold, summed over these, in their order: all get the same bits."""
    if placed.rank is None:
        return grads
    values = tree.to_paths(grads)
    axis, here = placed.mesh["pp"], placed.mesh.rank
    assert here is not None
    for path, ranks in placed.holders.items():
        if placed.rank not in ranks:
            continue
        mine = values[path].contiguous()
        if placed.mesh.kind == "abstract":
            imagine(placed.mesh, [mine] * (len(ranks) - 1))
            continue
        found = {rank: torch.empty_like(mine) for rank in ranks if rank != placed.rank}
        ops = []
        for rank, x in found.items():
            peer = here + (rank - placed.rank) * axis.stride
            ops += [dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, x, peer)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        found[placed.rank] = mine
        values[path] = sum((found[rank] for rank in ranks[1:]), start=found[ranks[0]])
    return tree.unflatten(tree.flatten(grads)[1], list(values.values()))


def everywhere(
    placed: Placed, losses: Values, taps: Values, counts: Mapping[str, Tensor], watch: frozenset[str]
) -> tuple[Values, Values]:
    """Losses and taps under one set of names on all stages: where a stage has none, what adds nothing. watch: what was
    tapped, which says the names."""
    if placed.rank is None:
        placed.memo["taps"] = sorted(taps)
        return losses, taps
    some = next(iter(counts.values()))
    losses = {f"loss.{term}": losses.get(f"loss.{term}", torch.zeros_like(some)) for term in counts}
    if ("taps", watch) not in placed.memo:
        own = sorted((name, tuple(x.shape)) for name, x in taps.items())
        names: list[Any] = [own] * (dist.get_world_size() if dist.is_initialized() else 1)  # a rehearsal has no peers
        if dist.is_initialized():
            dist.all_gather_object(names, own)
        placed.memo["taps", watch] = sorted({pair for found in names for pair in found})
    every = placed.memo["taps", watch]
    return losses, {name: taps[name] if name in taps else nothing(name, shape, some) for name, shape in every}
