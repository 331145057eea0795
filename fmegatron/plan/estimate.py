"""A planned step: from a run and a device to memory, traffic, seconds and MFU. Nothing of the mesh's size is ever made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fmegatron import models
from fmegatron.data.batches import NAMES
from fmegatron.models import Model
from fmegatron.optim import Transform
from fmegatron.plan import pipeline
from fmegatron.plan.hardware import STEP, Efficiency, Hardware
from fmegatron.plan.memory import memory_of
from fmegatron.plan.options import PlanConfig
from fmegatron.plan.seconds import DATA, AxisUse, Execution, Machine, per_microbatch, times
from fmegatron.plan.work import Work, first_layers, work_of
from fmegatron.sharding import Sharding, abstract_mesh
from fmegatron.sharding.traffic import Row, wire_bytes
from fmegatron.train import setup
from fmegatron.train.explain import explain
from fmegatron.train.remat import parse_remat


@dataclass(frozen=True)
class Estimate:
    """A planned step; `report.py` prints it. Memory and traffic are one rank's, of the fullest stage, in bytes.

    flops: the model's, of all ranks, by Megatron-LM's formula (causal attention halved). mfu counts attention whole, as
    published tables do; mfu_causal halves it. seconds: the parts of step_seconds. collectives: of a step, as one rank sends
    them; those of a pipeline's stage are counted as if it had both ends of the model.
    """

    name: str
    hardware: str
    mesh: dict[str, int]
    ranks: int
    rules: str
    batch: tuple[int, int]
    microbatches: int
    remat: str
    dtype: str
    schedule: str
    parameters: int
    flops: float
    flops_whole_attention: float
    rank_flops: float
    mfu: float
    mfu_causal: float
    step_seconds: float
    tokens_per_second_per_rank: float
    seconds: dict[str, float]
    bubble: float
    memory_bytes: int
    memory: dict[str, int]
    device_memory: int
    fits: bool
    binds: str
    axes: dict[str, AxisUse]
    collectives: tuple[Row, ...]


def estimate(
    name: str,
    run: PlanConfig,
    model: Model,
    device: Hardware,
    efficiency: Efficiency = STEP,
    execution: Execution | None = None,
) -> Estimate:
    """Plan a run whose mesh is complete and legal (`legal.check`). Raises ValueError as `explain` does.

    execution: how the code runs; None: as this package does under the run's settings.
    """
    t, stages, m = run.training, run.mesh.pp, run.training.microbatches
    rules = setup.rules_of(run.sharding)
    how = execution or Execution(fused=t.compile is not False and device.name != "cpu", prefetch=t.prefetch > 0)
    sizes = {axis: n for axis, n in run.mesh.sizes.items() if n > 1}
    sh = Sharding(abstract_mesh(**{axis: n for axis, n in sizes.items() if axis != "pp"}), rules)
    machine = Machine(device, efficiency, how, _places(sizes), t.dtype)
    tx_of: Callable[[Model], Transform] = lambda part: setup.optimizer_of(run, part, setup.schedule_of(run))  # noqa: E731
    shared: dict[str, Any] = {
        "dtype": setup.dtype_of(run),
        "fields": {key: names for key, names in NAMES.items() if key != "documents" or run.data.document_mask},
        "remat": t.remat,
        "prefetch": t.prefetch,
    } | setup.data_axes_of(run)
    rows = (t.global_batch, run.data.seq)
    work = work_of(model, sh, tx_of, batch=rows, microbatches=m, donate=t.donate, **shared)
    layers = sum(node.layer is not None for node in model.chain) // stages
    stage = first_layers(model, layers)
    one, two = (
        explain(stage, sh, tx=tx_of(stage), batch=(rows[0] // m * k, rows[1]), microbatches=k, **shared) for k in (1, 2)
    )
    micro, once = per_microbatch(one.collectives, two.collectives)
    if stages > 1:
        micro.append(_between_stages(run, model, stages))
    flops, whole = flops_of(model, rows[1], rows[0])
    memory = memory_of(stage, one.leaves, work, run.pipeline.schedule, stages, run.pipeline.virtual, m)

    ranks = math.prod(sizes.values())
    seconds, rank_flops, waits = _seconds(machine, work, run, layers, stages, balanced=_half(model, rows, ranks, t.remat))
    busy = seconds["products"] + seconds["attention"] + seconds["between"]
    axes, hidden = {}, sum((machine.send(row) for row in micro if row.axis in DATA), start=0.0)
    for axis in sizes:
        mine, end = ([row for row in part if row.axis == axis] for part in (micro, once))
        spent = sum(map(machine.send, mine), start=0.0), sum(map(machine.send, end), start=0.0)
        exposed = machine.exposed(axis, spent, busy / m, m, hidden)
        axes[axis] = machine.use(axis, times(mine, end, m), exposed, rank_flops)
        seconds[f"{axis} traffic"] = exposed
    blocking = sum(use.exposed_seconds for axis, use in axes.items() if axis not in DATA)
    seconds["pipeline waits"] = waits * (1 + blocking / busy)
    seconds["optimizer"] = _update(one.per_rank["optimizer"], work, layers, machine)
    step = sum(seconds.values())
    peak = device.flops[t.dtype] * ranks
    limit = run.memory * 1e9 if run.memory is not None else device.memory
    fits = memory["peak"] <= limit
    return Estimate(
        name=name,
        hardware=device.name,
        mesh=sizes,
        ranks=ranks,
        rules=rules.name,
        batch=rows,
        microbatches=m,
        remat=t.remat,
        dtype=t.dtype,
        schedule=run.pipeline.schedule if stages > 1 else "none",
        parameters=model.count(),
        flops=flops,
        flops_whole_attention=whole,
        rank_flops=rank_flops,
        mfu=whole / (step * peak),
        mfu_causal=flops / (step * peak),
        step_seconds=step,
        tokens_per_second_per_rank=rows[0] * rows[1] / step / ranks,
        seconds=seconds,
        bubble=pipeline.bubble(run.pipeline.schedule, stages, run.pipeline.virtual, m),
        memory_bytes=memory["peak"],
        memory=memory,
        device_memory=int(limit),
        fits=fits,
        binds=_binds(seconds, step) if fits else f"memory: a rank needs {memory['peak'] / 1e9:.1f} GB of {limit / 1e9:.0f} GB",
        axes=axes,
        collectives=tuple(times(micro, once, m)),
    )


def flops_of(model: Model, seq: int, batch: int) -> tuple[float, float]:
    """Model FLOPs of a step: (causal attention halved, attention whole)."""
    half, c = setup.flops_of(model, seq, batch), model.config
    if not isinstance(c, models.Config):
        return half, half
    return half, half + 3.0 * c.layers * 2 * batch * seq * seq * c.heads * c.head_dim


def _half(model: Model, rows: tuple[int, int], ranks: int, remat: str) -> float:
    """FLOPs of a rank's attention in a step where its causal half is shared evenly.

    The model's 3 parts are one forward and two backward; the kernel's backward computes the scores again (half a part), and
    remat of layers runs the forward again (one).
    """
    half, whole = flops_of(model, rows[1], rows[0])
    again = parse_remat(remat).every > 0
    return (whole - half) * (4.5 if again else 3.5) / 3 / ranks


def _places(sizes: dict[str, int]) -> dict[str, tuple[int, int]]:
    """{axis: (stride, ranks)}; axes are given outer to inner."""
    inner = list(sizes.values())
    return {axis: (math.prod(inner[i + 1 :]), n) for i, (axis, n) in enumerate(sizes.items())}


def _between_stages(run: PlanConfig, model: Model, stages: int) -> Row:
    """What a rank sends to its neighbours for a microbatch: the stream forward and its cotangent back, for each part."""
    s = run.mesh.sizes
    rows = run.training.global_batch // (s["dp"] * s["fsdp"] * s["ep"] * run.training.microbatches)
    width = 2 if run.training.dtype == "bf16" else 4
    embed = model.sizes.get("embed", 0)
    sp = s["tp"] if any(name == "seq" and "tp" in axes for name, axes in setup.rules_of(run.sharding).lines("compute")) else 1
    each = rows * run.data.seq * (embed if isinstance(embed, int) else embed.n) * width // (s["cp"] * sp)
    count = 2 * run.pipeline.virtual
    return Row("permute", "pp", count, count * each, wire_bytes("permute", stages, count * each))


def _seconds(
    machine: Machine, work: Work, run: PlanConfig, layers: int, stages: int, balanced: float
) -> tuple[dict[str, float], float, float]:
    """(seconds of a step's computation on the slowest stage, its FLOPs, seconds that it waits for other stages)."""
    m, p = run.training.microbatches, run.pipeline
    inside, ends = work.counts["layer"](layers), work.counts["head"](layers) + work.counts["tail"](layers)
    ends = ends + work.counts["rest"](layers)
    if machine.execution.balanced:
        inside, ends = replace(inside, attention=balanced / m), replace(ends, attention=0.0)
    slowest = machine.compute(inside, ends)
    mean = machine.compute(inside, ends * (1 / stages))
    step = {name: value * m for name, value in slowest.items()}
    both = inside + ends
    waits = pipeline.bubble(p.schedule, stages, p.virtual, m) * sum(mean.values()) * m
    return step, (both.matmul + both.attention) * m, waits


def _update(state_bytes: int, work: Work, layers: int, machine: Machine) -> float:
    """Seconds of the optimizer: fused it reads state, parameters (half of AdamW's state) and gradients, and writes two."""
    moved = 3.5 * state_bytes if machine.execution.fused else work.counts["update"](layers).moved
    return moved / (machine.device.bandwidth * machine.efficiency.bytes)


def _binds(seconds: dict[str, float], step: float) -> str:
    name = max(seconds, key=lambda part: seconds[part])
    return f"{name}: {seconds[name] / step:.0%} of the step"
