"""The train step: state and batch in, state and metrics out.

    denominators -> [walk the chain for each microbatch] -> gradients at the optimizer's placement -> update -> new state

    step = make_step(model, tx, sh, microbatches=4, remat="full", compile=True)
    state, metrics = step(state, batch)

The same function runs on one device, on a mesh under torchrun, and on a virtual mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fmegatron import random, tree
from fmegatron.compiled import Compiled
from fmegatron.models.model import Model
from fmegatron.nn import watch as watching
from fmegatron.optim import Known, Transform, fuse
from fmegatron.optim.fuse import keep
from fmegatron.sharding import Sharding, spmd
from fmegatron.train.ahead import compile_ahead
from fmegatron.train.chain import Step, add_taps, visits, walk
from fmegatron.train.clock import Mark, unmarked
from fmegatron.train.gradients import Gradients
from fmegatron.train.leaves import add_moves, to_optimizer, to_storage
from fmegatron.train.meeting import settled
from fmegatron.train.microbatches import Batches, microbatches_of, rows_of, shards_of_batch, with_samples
from fmegatron.train.norms import watched
from fmegatron.train.pipeline.across import everywhere, execute, sum_shared
from fmegatron.train.planned import Plan, plan_step
from fmegatron.train.saving import steps_so_far
from fmegatron.train.state import Over, TrainState, check_there, sum_together, take_over
from fmegatron.train.taps import everywhere as tapped_everywhere
from fmegatron.train.weights import Weights
from fmegatron.transforms import FUNC, inside_transform
from fmegatron.tree import Tree

Metrics = dict[str, Tensor]
Limits = Mapping[str, float]  # {metric: what its size must stay below}


def value_and_grad(
    plan: Plan, sh: Sharding, params: Tree, batch: Batches, key: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tree, Metrics]:
    """On one rank: the loss's gradient over a local batch, at the optimizer's placement, and the metrics of the forward.

    params: local shards at storage. batch: this rank's rows, cut into the plan's microbatches. Every term is divided by its
    global count before the first microbatch, in the seed of the backward, and never again. scale: of the loss on the way.
    """
    model, sh = plan.model, sh.watching(sh.watch & watching.KINDS)
    parts = microbatches_of(model, sh, batch, plan.microbatches, even=plan.placed is None)
    local = [model.counts_of(sh, part) for part in parts]
    counts = sum_together(sh, {term: torch.stack([one[term] for one in local]).sum(0) for term in local[0]})
    seeds = {term: dict(plan.weights).get(term, 1.0) / n.clamp(min=1) for term, n in counts.items()}
    stored = tree.to_paths(params)
    engine = plan.engine
    sh = sh.overlapping(1 if engine is FUNC else plan.async_tp)
    free, hold = engine is not FUNC, plan.placed is not None
    weights = Weights(sh, plan.leaves, stored, plan.dtype, plan.prefetch, free, plan.reshard, hold)
    gradients = Gradients(sh, plan.leaves, stored, plan.wire, plan.precision, behind=plan.prefetch > 0)
    scaled = seeds if scale is None else {term: seed * scale for term, seed in seeds.items()}

    def new_step() -> Step:
        return Step(sh, engine, weights, gradients, scaled, key)

    if plan.placed is not None:
        losses, taps = execute(plan.placed, parts, new_step, weights, plan.remat)
        losses, taps = everywhere(plan.placed, losses, taps, counts, sh.watch)
        grads, every = sum_shared(plan.placed, gradients.finish(params, scale)), plan.placed.every(sh)
    else:
        losses, taps, carried = {}, {}, dict[str, Tensor]()
        weights.plan(visits(model.chain, plan.remat, weights) * len(parts))
        for part in parts:
            step = new_step()
            found, carried = walk(model.chain, step, {**part, **carried}, plan.remat, model.carries)
            for name, x in found.items():
                losses[name] = losses[name] + x if name in losses else x
            add_taps(taps, step.taps)
        grads, every = gradients.finish(params, scale), sh
    terms = {name.removeprefix("loss."): x for name, x in losses.items()}
    metrics = {term: x / counts[term].clamp(min=1) for term, x in terms.items()}
    metrics["loss"] = sum((x * seeds[term] for term, x in terms.items()), start=torch.zeros_like(next(iter(terms.values()))))
    return grads, {**tapped_everywhere(every, metrics, taps), **{f"count.{term}": n for term, n in counts.items()}}


def make_step(
    model: Model, tx: Transform, sh: Sharding, *, donate: bool = False, **settings: Any
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`step(state, batch, ...) -> (state, metrics)` on local shards (stacked where one process holds all ranks).

    settings: those of `plan_step`. donate: the step may reuse the old state's memory; its tensors are then empty, and a
    step that is given them raises ValueError. A step whose gradients are not finite or larger than skip_norm, or of which a
    metric is not below its limit ({"loss": inf}: or not finite), leaves params and opt_state as they were, bit for bit,
    donated or not. clock: steps so far, for semisync; None reads it from the state, which waits for the step before. watch:
    kinds of statistics that the metrics hold beside (docs/monitors.md). mark: called on the host with the name of a part of
    the step ("forward_backward", "optimizer") when it has been issued. Under torch.func derivatives go through it.
    """
    if donate and sh.mesh.kind == "virtual":
        raise ValueError("donate: a virtual mesh works on views of the state; use donate=False")
    plan = plan_step(model, sh, **settings)
    finish = fuse(tx, plan.sh.kernels, settings.get("programs"))

    def step(
        state: TrainState, batch: Batches, limits: Limits | None = None, clock: int | None = None,
        watch: frozenset[str] = frozenset(), mark: Mark = unmarked,
    ) -> tuple[TrainState, Metrics]:
        check_there(state)
        at = steps_so_far(state) if clock is None and plan.meeting.rule is not None else clock or 0

        def on_rank(here: Sharding, state: TrainState, batch: Batches, limits: Limits) -> tuple[TrainState, Metrics]:
            here, whole = here.watching(watch), partial(step_on_rank, plan, finish, donate=donate, clock=at)
            if isinstance(plan.compiled, Compiled) and plan.placed is None:  # stages wait for each other's values
                compile_ahead(plan.compiled, whole, here, state, batch, limits)
            return whole(here, state, batch, limits, mark=mark)

        run = spmd(plan.meeting.sh, on_rank)
        with torch.set_grad_enabled(inside_transform() and torch.is_grad_enabled()):  # a derivative may go through it
            given = dict(batch) if isinstance(batch, Mapping) else [dict(one) for one in batch]
            new, metrics = run(state, given, dict(limits or {}))
        return (take_over(state, new) if donate else new), metrics

    return step


def step_on_rank(
    plan: Plan, finish: Callable[..., Any], sh: Sharding, state: TrainState, batch: Batches, limits: Limits | None = None,
    *, donate: bool = False, clock: int = 0, mark: Mark = unmarked,
) -> tuple[TrainState, Metrics]:
    """The whole step as one rank runs it. finish: the optimizer's update, from `fuse`; clock: steps so far, for meetings."""
    model, meeting, every = plan.model, plan.meeting, sh
    batch = with_samples(every, state.consumed, batch) if model.dropout else batch
    sh = replace(plan.sh, rank=every.rank, watch=every.watch) if meeting.rule is not None else every
    key = random.fold_in(state.key, state.consumed) if model.dropout else None
    scale = plan.precision.scale(state.precision)
    grads, metrics = value_and_grad(plan, sh, state.params, batch, key, scale)
    over: Any = Over(sh, plan.leaves)
    if plan.placed is not None:
        over = replace(over, every=plan.placed.every(sh), elsewhere=plan.placed.elsewhere)
    norm = over.norm(grads)
    metrics["grad_norm"] = norm
    metrics |= {} if scale is None else {"loss_scale": scale.clone()}
    metrics |= {"zeros": over.zeros(grads)} if plan.count_zeros or "norms" in sh.watch else {}
    mark("forward_backward")
    over, finite = Known(over, grads, norm), torch.isfinite(norm)
    allowed = torch.ones_like(finite)
    for name, most in (limits or {}).items():
        allowed = allowed & (metrics[name].abs() < most)
    ok = allowed & finite & (norm <= plan.skip_norm if plan.skip_norm is not None else finite)
    ok = meeting.everywhere(every, ok) if limits else ok
    held = (to_optimizer(plan.leaves, state.params, sh), state.opt_state, state.outer)
    old, opt_state, outer = meeting.before(every, clock, held)
    master = plan.precision.master(old, state.precision)
    before = tree.map(torch.clone, master) if donate and "optimizer" in sh.watch else master
    compiled = isinstance(plan.compiled, Compiled)
    master, opt_state = finish(grads, opt_state, master, over=over, ok=ok, donate=donate, compile=compiled)
    if sh.watch:
        metrics |= watched(over.over, plan.placed.whole if plan.placed else model, before, grads, master, opt_state)
    master = add_moves(model, plan.leaves, master, metrics, ok, sh)
    params, kept = plan.precision.update(state.precision, finite, allowed, master)
    params, opt_state, outer = meeting.after(every, clock, (params, opt_state, outer))
    if limits and meeting.due(clock):  # what is refused is to be run again from where it was, and not from the mean
        params, opt_state, outer = keep(ok, (params, opt_state, settled(every, outer)), (*held[:2], settled(every, held[2])))
    params = to_storage(plan.leaves, params, sh)
    new = TrainState(
        step=state.step + ok.long(),
        params=params,
        opt_state=opt_state,
        key=state.key,
        consumed=state.consumed + rows_of(batch) * shards_of_batch(every),
        skipped=state.skipped + (~ok).long(),
        precision=kept,
        outer=outer,
    )
    mark("optimizer")
    return new, meeting.metrics(every, {**metrics, "skipped": new.skipped}, dict(plan.weights))
