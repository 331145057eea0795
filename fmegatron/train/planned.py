"""What of a train step is settled before it runs: its settings checked, and every leaf's ways planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from fmegatron.compiled import Compiled
from fmegatron.kernels.launch import choose
from fmegatron.models.model import Model
from fmegatron.programs import Programs
from fmegatron.sharding import Sharding
from fmegatron.sharding.apart import inside
from fmegatron.sharding.bucket import Wire
from fmegatron.split import SPLIT
from fmegatron.train.leaves import Leaf, plan_leaves
from fmegatron.train.meeting import Meeting, meeting_of
from fmegatron.train.microbatches import Parts
from fmegatron.train.pipeline.stages import Pipeline, Placed, place_pipeline, without_pp
from fmegatron.train.precision import PLAIN, Precision
from fmegatron.train.remat import Remat, parse_remat
from fmegatron.train.semisync import SemiSync
from fmegatron.train.weights import ALWAYS, Reshard, parse_reshard
from fmegatron.transforms import AUTOGRAD, FUNC, Engine, inside_transform, why_not_compile


@dataclass(frozen=True)
class Plan:
    """Everything about a step that does not change from step to step."""

    model: Model
    sh: Sharding
    leaves: dict[str, Leaf]
    remat: Remat
    microbatches: Parts = 1
    dtype: torch.dtype | None = None
    prefetch: int = 1
    reshard: Reshard = ALWAYS
    wire: Wire | None = None
    async_tp: int = 1
    compiled: Engine | None = None
    placed: Placed | None = None
    weights: tuple[tuple[str, float], ...] = ()
    precision: Precision = PLAIN
    skip_norm: float | None = None
    count_zeros: bool = False
    meeting: Meeting = field(kw_only=True)  # of replicas that go apart; its sharding is that of all ranks

    @property
    def engine(self) -> Engine:
        """What differentiates blocks here and now."""
        split = self.placed.schedule if self.placed is not None and self.placed.schedule.splits else None
        if not inside_transform():
            return self.compiled or (SPLIT if split else AUTOGRAD)
        if split:
            raise ValueError(f"schedule {split.name} splits backwards, a vmap cannot: use threads (mesh.threads), or 1f1b")
        if self.compiled is not None:
            raise ValueError("a compiled step cannot run under a torch.func transform: make it with compile=False")
        return FUNC


def plan_step(
    model: Model,
    sh: Sharding,
    *,
    microbatches: Parts = 1,
    remat: str | Remat = "none",
    compile: bool = False,
    dtype: torch.dtype | None = None,
    prefetch: int = 1,
    reshard: str = "always",
    reduce_dtype: torch.dtype | None = None,
    sum_dtype: torch.dtype | None = None,
    async_tp: int = 1,
    term_weights: Mapping[str, float] | None = None,
    pipeline: Pipeline | None = None,
    precision: Precision = PLAIN,
    skip_norm: float | None = None,
    count_zeros: bool = False,
    semisync: SemiSync | None = None,
    kernels: Literal["reference", "triton", "auto"] = "reference",
    programs: Programs | None = None,
) -> Plan:
    """Check the settings and plan every leaf's ways; ValueError in one line where something cannot be honoured.

    dtype: of the computation (None: of the parameters). prefetch: blocks whose parameters are gathered ahead. reshard:
    when gathered parameters are freed, see `parse_reshard`. reduce_dtype: in which gradients travel between ranks (None: in
    that of the parameters); sum_dtype: in which the ranks' parts are then added (None: in the same). async_tp: chunks in
    which a product and the gather before it, or the reduce-scatter after it, go (1: whole; on a virtual mesh always).
    term_weights: {term: factor in the loss}, 1 where a term is not named. pipeline: its schedule says the microbatches. On a
    mesh with an axis pp the plan's model and sharding are those of this rank's stages. precision: that of `init`. skip_norm:
    a step whose gradient has a larger norm is skipped. count_zeros: the metric "zeros", of the gradient's elements.
    semisync: how replicas meet that go apart (`Rules.apart`); the plan's sharding is then that of one replica. kernels,
    programs: see docs/kernels.md, docs/startup.md.
    """
    precision.check(dtype, semisync is not None)
    check_terms(model, term_weights or {})
    for name, value, least in (("microbatches", microbatches, 1), ("prefetch", prefetch, 0), ("async_tp", async_tp, 1)):
        if isinstance(value, int) and value < least:
            raise ValueError(f"{name} = {value}: it is at least {least}")
    every, sh = sh, inside(sh)
    policy, placed = parse_remat(remat, sh.mesh.device) if isinstance(remat, str) else remat, None
    if pipeline is not None:
        schedule = pipeline.schedule
        if microbatches not in (1, schedule.microbatches):
            raise ValueError(f"microbatches = {microbatches}, but schedule {schedule.name} has {schedule.microbatches}")
        if compile and schedule.splits:
            raise ValueError(f"schedule {schedule.name} splits backwards, compiled blocks cannot: use 1f1b or compile=False")
        if policy.held is not None and schedule.splits:
            raise ValueError(f"schedule {schedule.name} splits backwards, offload cannot: use 1f1b, or remat without offload")
        if async_tp > 1 and schedule.splits:
            raise ValueError(f"schedule {schedule.name} splits backwards, products in chunks cannot: use 1f1b or async_tp=1")
        placed = place_pipeline(pipeline, model, sh.mesh)
        model, sh, microbatches = placed.model, without_pp(sh), schedule.microbatches
    elif sh.mesh.sizes.get("pp", 1) > 1:
        raise ValueError(f"the mesh has pp={sh.mesh.sizes['pp']}, and no pipeline says how: give its schedule")
    if compile and sh.mesh.stacked:
        raise ValueError("compile: a virtual mesh runs eager; use compile=False, or processes started by torchrun")
    if compile and (missing := why_not_compile()) is not None:
        raise ValueError(f"compile: {missing}; use compile=False to run eager")
    sh = replace(sh.bind(model.sizes), kernels=choose(kernels, torch.device(sh.mesh.device)))
    sh = sh.recomputing(policy.recompute) if policy.parts else sh
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
        compiled=Compiled(programs) if compile else None,
        placed=placed,
        weights=tuple((term_weights or {}).items()),
        precision=precision,
        skip_norm=skip_norm,
        count_zeros=count_zeros,
        meeting=meeting_of(model, without_pp(every).bind(model.sizes), semisync),
    )


def check_terms(model: Model, weights: Mapping[str, float]) -> None:
    """ValueError where the model has no loss, or weights name a term that it has not."""
    terms = [name.removeprefix("loss.") for node in model.chain for name in node.writes if name.startswith("loss.")]
    if not terms:
        raise ValueError("no node of the chain has a loss among its writes: name it loss.TERM, like 'loss.ce'")
    if unknown := weights.keys() - set(terms):
        raise ValueError(f"term_weights name {min(unknown)!r}, but the terms of the loss are {', '.join(terms)}")
