"""What a mesh must satisfy, checked before anything is planned: each mistake is one line with the nearest legal choice."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from fmegatron.config import ConfigError
from fmegatron.models import Model
from fmegatron.plan.config import PlanConfig
from fmegatron.sharding import Sharding, abstract_mesh
from fmegatron.train import setup
from fmegatron.train.leaves import plan_leaves
from fmegatron.train.pipeline.schedules import make_schedule


def complete(run: PlanConfig, auto: frozenset[str] = frozenset()) -> PlanConfig:
    """The run with its mesh filled up to the devices there are, and with what was left open: batch and microbatches."""
    mesh = run.mesh
    if mesh.replica == -1:
        raise ConfigError("mesh.replica = -1: a plan is of a number of replicas, give it")
    others = math.prod(n for axis, n in mesh.sizes.items() if axis != "dp")
    if mesh.dp == -1:
        if run.gpus is None:
            raise ConfigError("mesh.dp = -1: give a number, or gpus = N to take what is left")
        if run.gpus % others:
            raise ConfigError(f"gpus = {run.gpus} do not divide by {others}, the ranks of the other axes: "
                              f"use gpus = {_near(range(others, 2 * run.gpus + others, others), run.gpus)}")
        mesh = replace(mesh, dp=run.gpus // others)
    ranks = math.prod(mesh.sizes.values())
    if run.gpus is not None and ranks != run.gpus:
        legal = run.gpus // others if run.gpus % others == 0 else None
        hint = f"use mesh.dp = {legal}" if legal else f"use gpus = {ranks}"
        raise ConfigError(f"the mesh has {ranks} ranks ({_shown(mesh.sizes)}) and gpus = {run.gpus}: {hint}")
    t, shards = run.training, shards_of(mesh.sizes)
    batch = shards * (8 * mesh.pp if mesh.pp > 1 else 1) if "global_batch" in auto else t.global_batch
    parts = max(1, batch // shards) if "microbatches" in auto else t.microbatches
    if batch % shards == 0:
        t = replace(t, global_batch=batch, microbatches=parts)
        run = replace(run, mesh=mesh, training=t)
    else:
        run = replace(run, mesh=mesh)
    setup.check_batch(run, shards)
    return run


def check(run: PlanConfig, model: Model) -> None:
    """ConfigError where the rules do not fit the model's sizes, or the pipeline its layers and microbatches."""
    sizes = {axis: n for axis, n in run.mesh.sizes.items() if axis != "pp"}
    wrong = misplaced(run, model, sizes)
    if wrong is not None:
        for axis in ("tp", "cp"):  # the batch was checked before
            legal = [n for n in range(1, 2 * sizes[axis]) if misplaced(run, model, sizes | {axis: n}) is None]
            if sizes[axis] > 1 and legal:
                raise ConfigError(f"{wrong.partition(': use')[0]}: use {axis}={_near(legal, sizes[axis], f' or {axis}=')}")
        raise ConfigError(wrong)
    p, stages, m = run.pipeline, run.mesh.pp, run.training.microbatches
    if laid_out(run):
        setup.pipeline_of(run, model)
        return
    layers = sum(node.is_layer for node in model.chain)
    if layers % stages:
        ends = ", or count embedding and loss as layers with pipeline.count_embedding and pipeline.count_loss"
        more = ends if (layers + 2) % stages == 0 else ""
        raise ConfigError(f"{layers} layers do not divide over mesh.pp = {stages}: use pp = {_divisor(layers, stages)}{more}")
    each = layers // stages
    if stages > 1 and each % p.virtual:
        raise ConfigError(f"{each} layers a stage do not divide into pipeline.virtual = {p.virtual} parts: "
                          f"use virtual = {_divisor(each, p.virtual)}")
    if stages > 1:
        make_schedule(p.schedule, stages, p.virtual, m)


def laid_out(run: PlanConfig) -> bool:
    """Whether the run says how many layers each stage has."""
    p = run.pipeline
    return run.mesh.pp > 1 and (p.layout, p.first, p.last, p.count_embedding, p.count_loss) != (None, None, None, False, False)


def fullest(run: PlanConfig, model: Model) -> int:
    """Layers of the rank that has most of them."""
    pipeline = setup.pipeline_of(run, model) if laid_out(run) else None
    if pipeline is None or pipeline.layout is None:
        return -(-sum(node.is_layer for node in model.chain) // run.mesh.pp)
    ranks = [pipeline.schedule.stages_of(rank) for rank in range(run.mesh.pp)]
    return max(sum(len(pipeline.layout.layers(stage)) for stage in stages) for stages in ranks)


def misplaced(run: PlanConfig, model: Model, sizes: dict[str, int]) -> str | None:
    """What of the model or its batch does not lie on a mesh of these sizes, in one line."""
    try:
        sh = Sharding(abstract_mesh(**{axis: n for axis, n in sizes.items() if n > 1}), setup.rules_of(run.sharding))
        plan_leaves(model, sh.bind(model.sizes))
        seq = {"seq": run.data.seq, "loss_seq": run.data.seq}
        for names in ("batch seq", "batch seq embed", "batch loss_seq"):
            sh.bind(model.sizes).bind(seq).placement(names, leaf="the batch")
    except ValueError as error:
        return str(error)
    return None


def shards_of(sizes: dict[str, int]) -> int:
    """Ranks with different rows of the batch."""
    return sizes.get("replica", 1) * sizes["dp"] * sizes["fsdp"] * sizes["ep"]


def _divisor(n: int, wanted: int) -> str:
    return _near((k for k in range(1, n + 1) if n % k == 0), wanted)


def _near(legal: Iterable[int], wanted: int, between: str = " or ") -> str:
    """The nearest one below and above."""
    values = sorted(legal)
    below, above = [k for k in values if k <= wanted][-1:], [k for k in values if k > wanted][:1]
    return between.join(map(str, below + above))


def _shown(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "one device"
