"""The train step: state and batch in, state and metrics out.

    denominators -> [walk the chain for each microbatch] -> gradients at the optimizer's placement -> update -> new state

    step = make_step(model, tx, sh, microbatches=4, remat="full", compile=True)
    state, metrics = step(state, batch)

The same function runs on one device, on a mesh under torchrun, and on a virtual mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmegatron import random, tree
from fmegatron.models.model import Model, Values
from fmegatron.optim import Known, Transform, fuse
from fmegatron.sharding import Sharding, spmd
from fmegatron.sharding.bucket import Wire
from fmegatron.sharding.collectives import Pmax, Psum
from fmegatron.train.chain import Step, add_taps, visits, walk
from fmegatron.train.gradients import Gradients
from fmegatron.train.leaves import Leaf, plan_leaves, to_optimizer, to_storage
from fmegatron.train.remat import Remat, parse_remat
from fmegatron.train.state import Over, TrainState, over_ranks
from fmegatron.train.weights import ALWAYS, Reshard, Weights, parse_reshard
from fmegatron.transforms import AUTOGRAD, FUNC, Compiled, Engine, inside_transform, why_not_compile
from fmegatron.tree import Tree

Batch = Mapping[str, Tensor]
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """Everything about a step that does not change from step to step."""

    model: Model
    sh: Sharding
    leaves: dict[str, Leaf]
    remat: Remat
    microbatches: int = 1
    dtype: torch.dtype | None = None
    prefetch: int = 1
    reshard: Reshard = ALWAYS
    wire: Wire | None = None
    async_tp: int = 1
    compiled: Engine | None = None
    weights: tuple[tuple[str, float], ...] = ()

    @property
    def engine(self) -> Engine:
        """What differentiates blocks here and now."""
        if not inside_transform():
            return self.compiled or AUTOGRAD
        if self.compiled is not None:
            raise ValueError("a compiled step cannot run under a torch.func transform: make it with compile=False")
        return FUNC


def plan_step(
    model: Model,
    sh: Sharding,
    *,
    microbatches: int = 1,
    remat: str | Remat = "none",
    compile: bool = False,
    dtype: torch.dtype | None = None,
    prefetch: int = 1,
    reshard: str = "always",
    reduce_dtype: torch.dtype | None = None,
    sum_dtype: torch.dtype | None = None,
    async_tp: int = 1,
    term_weights: Mapping[str, float] | None = None,
) -> Plan:
    """Check the settings and plan every leaf's ways; raises ValueError in one line where something cannot be honoured.

    dtype: of the computation (None: of the parameters). prefetch: blocks whose parameters are gathered ahead. reshard:
    when gathered parameters are freed, see `parse_reshard`. reduce_dtype: in which gradients travel between ranks (None: in
    that of the parameters); sum_dtype: in which the ranks' parts are then added (None: in the same). async_tp: chunks in
    which a product and the gather before it, or the reduce-scatter after it, go (1: whole; on a virtual mesh always).
    term_weights: {term: factor in the loss}, 1 where a term is not named.
    """
    if compile and sh.mesh.stacked:
        raise ValueError("compile: a virtual mesh runs eager; use compile=False, or processes started by torchrun")
    if compile and (missing := why_not_compile()) is not None:
        raise ValueError(f"compile: {missing}; use compile=False to run eager")
    sh = sh.bind(model.sizes)
    policy = parse_remat(remat) if isinstance(remat, str) else remat
    if policy.parts:
        sh = sh.recomputing(policy.recompute)
    weights = tuple((term_weights or {}).items())
    compiled = Compiled() if compile else None
    if sum_dtype is not None and reduce_dtype is None:
        raise ValueError(f"sum_dtype = {sum_dtype}: it is of gradients that travel in fewer bits, give reduce_dtype too")
    wire = Wire(reduce_dtype, sum_dtype or reduce_dtype) if reduce_dtype is not None else None
    return Plan(
        model=model,
        sh=sh,
        leaves=plan_leaves(model, sh),
        remat=policy,
        microbatches=microbatches,
        dtype=dtype,
        prefetch=prefetch,
        reshard=parse_reshard(reshard),
        wire=wire,
        async_tp=async_tp,
        compiled=compiled,
        weights=weights,
    )


def value_and_grad(plan: Plan, sh: Sharding, params: Tree, batch: Batch, key: Tensor | None = None) -> tuple[Tree, Metrics]:
    """On one rank: the loss's gradient over a local batch, at the optimizer's placement, and the metrics of the forward.

    params: local shards at storage. batch: this rank's rows, cut into the plan's microbatches. Every term is divided by its
    global count before the first microbatch, in the seed of the backward, and never again.
    """
    model = plan.model
    values = model.inputs(sh, batch)
    counts = sum_together(sh, model.counts_of(sh, values))
    factors = dict(plan.weights)
    seeds = {term: factors.get(term, 1.0) / n.clamp(min=1) for term, n in counts.items()}
    stored = tree.to_paths(params)
    engine = plan.engine
    sh = sh.overlapping(plan.async_tp if engine is not FUNC else 1)
    weights = Weights(sh, plan.leaves, stored, plan.dtype, plan.prefetch, free=engine is not FUNC, reshard=plan.reshard)
    weights.plan(visits(model.chain, plan.remat, weights) * plan.microbatches)
    gradients = Gradients(sh, plan.leaves, stored, plan.wire)
    losses: dict[str, Tensor] = {}
    taps: dict[str, Tensor] = {}
    for part in split(values, plan.microbatches):
        step = Step(sh, engine, weights, gradients, seeds, key)
        for name, x in walk(model.chain, step, part, plan.remat).items():
            losses[name] = losses[name] + x if name in losses else x
        add_taps(taps, step.taps)
    grads = gradients.finish(params)
    terms = {name.removeprefix("loss."): x for name, x in losses.items()}
    metrics = {term: x / counts[term].clamp(min=1) for term, x in terms.items()}
    metrics["loss"] = sum((x * seeds[term] for term, x in terms.items()), start=torch.zeros_like(next(iter(terms.values()))))
    sums = {**metrics, **{name: x for name, x in taps.items() if not name.startswith("tap.max.")}}
    out = sum_together(sh, sums)
    out |= {name: over_ranks(sh, x, Pmax) for name, x in taps.items() if name.startswith("tap.max.")}
    return grads, {**out, **{f"count.{term}": n for term, n in counts.items()}}


def split(values: Values, parts: int) -> list[Values]:
    """Microbatches: rows of a local batch in equal, neighbouring parts; raises ValueError where they are not equal."""
    rows = values["tokens"].shape[0] if "tokens" in values else next(iter(values.values())).shape[0]
    if rows % parts:
        legal = [n for n in range(1, rows + 1) if rows % n == 0]
        raise ValueError(f"{rows} samples a rank do not divide into {parts} microbatches: use one of {legal}")
    size = rows // parts
    return [{name: x.narrow(0, i * size, size) for name, x in values.items()} for i in range(parts)]


def make_step(
    model: Model, tx: Transform, sh: Sharding, *, donate: bool = False, **settings: Any
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`step(state, batch) -> (state, metrics)` on local shards (stacked where one process holds all ranks).

    settings: those of `plan_step`. donate: the step may reuse the old state's memory; its tensors are then empty, and a
    step that is given them raises ValueError. A step whose gradients are not finite changes nothing but `consumed` and
    `skipped`.
    """
    if donate and sh.mesh.kind == "virtual":
        raise ValueError("donate: a virtual mesh works on views of the state; use donate=False")
    plan = plan_step(model, sh, **settings)
    finish = fuse(tx)

    def on_rank(here: Sharding, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return step_on_rank(plan, finish, here, state, batch, donate)

    run = spmd(plan.sh, on_rank)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if state.step.numel() == 0:
            raise ValueError("this state was given away to a step that reuses memory (donate): go on from what it returned")
        with torch.no_grad():
            new, metrics = run(state, dict(batch))
        return (take_over(state, new) if donate else new), metrics

    return step


def take_over(old: TrainState, new: TrainState) -> TrainState:
    """`new` as tensors of its own; those of `old`, whose memory it may hold, are emptied."""
    own: TrainState = tree.map(lambda x: x.detach(), new)
    for x in tree.to_paths(old).values():
        x.set_()
    return own


def step_on_rank(
    plan: Plan, finish: Callable[..., Any], sh: Sharding, state: TrainState, batch: Batch, donate: bool = False
) -> tuple[TrainState, Metrics]:
    """The whole step as one rank runs it. finish: the optimizer's update, from `fuse`."""
    model = plan.model
    batch = with_samples(sh, state, batch) if model.dropout else batch
    key = random.fold_in(state.key, state.consumed) if model.dropout else None
    grads, metrics = value_and_grad(plan, sh, state.params, batch, key)
    over: Any = Over(sh, plan.leaves)
    norm = over.norm(grads)
    over, ok = Known(over, grads, norm), torch.isfinite(norm)
    old = to_optimizer(plan.leaves, state.params, sh)
    compiled = isinstance(plan.compiled, Compiled)
    params, opt_state = finish(grads, state.opt_state, old, over=over, ok=ok, donate=donate, compile=compiled)
    params = to_storage(plan.leaves, params, sh)
    rows = batch["tokens"].shape[0] if "tokens" in batch else next(iter(batch.values())).shape[0]
    new = TrainState(
        step=state.step + ok.long(),
        params=params,
        opt_state=opt_state,
        key=state.key,
        consumed=state.consumed + rows * shards_of_batch(sh),
        skipped=state.skipped + (~ok).long(),
    )
    return new, {**metrics, "grad_norm": norm, "skipped": new.skipped}


def with_samples(sh: Sharding, state: TrainState, batch: Batch) -> Batch:
    """A batch whose rows have sample ids, so that dropout does not depend on how rows lie."""
    if "sample" in batch:
        return batch
    return {**batch, "sample": state.consumed + sh.index("batch", "batch seq", batch["tokens"])}


def shards_of_batch(sh: Sharding) -> int:
    """The number of different local batches."""
    size = 1
    for axis in sh.placement("batch").of("batch"):
        size *= sh.mesh[axis].size
    return size


def sum_together(sh: Sharding, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sums over all ranks of several 0-D values, in one collective an axis."""
    summed = over_ranks(sh, torch.stack([x.to(torch.float64) for x in values.values()]), Psum)
    return {name: x.to(values[name].dtype) for name, x in zip(values, summed.unbind(0), strict=True)}
