"""A planned step: from a run and a device to memory, traffic, seconds and MFU. Nothing of the mesh's size is ever made."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fmegatron.plan import pipeline
from fmegatron.plan.hardware import STEP, Efficiency, Hardware
from fmegatron.plan.seconds import DATA, AxisUse, Execution, Machine, times
from fmegatron.plan.study import Study
from fmegatron.sharding.mesh import REPLICA
from fmegatron.sharding.traffic import Row, wire_bytes
from fmegatron.train import setup
from fmegatron.train.explanation import MeetingRow


@dataclass(frozen=True)
class Estimate:
    """A planned step; `report.py` prints it. Memory (host: in host memory) and traffic are one rank's, of the fullest stage,
    in bytes.

    flops: the model's, of all ranks, by Megatron-LM's formula (causal attention halved). mfu counts attention whole, as
    published tables do; mfu_causal halves it. seconds: the parts of step_seconds. collectives: of a step, as one rank sends
    them; those of a pipeline's stage are counted as if it had both ends of the model. meetings: of replicas that go
    apart, each in its own period; the axis "replica" has them on the mean of steps.
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
    host: dict[str, int]
    device_memory: int
    fits: bool
    binds: str
    axes: dict[str, AxisUse]
    collectives: tuple[Row, ...]
    meetings: tuple[MeetingRow, ...] = ()


def estimate(
    name: str, study: Study, device: Hardware, efficiency: Efficiency = STEP, execution: Execution | None = None
) -> Estimate:
    """What a studied run takes on a device. execution: how the code runs; None: as this package does under its settings."""
    run, m, memory = study.run, study.run.training.microbatches, study.memory
    t, p, stages = run.training, run.pipeline, run.mesh.pp
    how = execution or Execution(fused=t.compile is not False and device.name != "cpu", prefetch=t.prefetch > 0)
    how = replace(how, stages=stages if p.virtual > 1 else 1)
    machine = Machine(device, efficiency, how, _places(study.sizes), t.dtype)
    ranks = math.prod(study.sizes.values())
    seconds, rank_flops, waits = _seconds(machine, study)
    busy = seconds["products"] + seconds["attention"] + seconds["between"]
    axes, hidden = {}, sum((machine.send(row) for row in study.micro if row.axis in DATA), start=0.0)
    for axis in study.sizes:
        if axis == REPLICA and study.meetings:
            axes[axis] = _meetings(machine, study, busy, rank_flops)
            seconds["meetings of replicas"] = axes[axis].exposed_seconds
            continue
        mine, end = ([row for row in part if row.axis == axis] for part in (study.micro, study.once))
        spent = sum(map(machine.send, mine), start=0.0), sum(map(machine.send, map(machine.narrowed, end)), start=0.0)
        exposed = machine.exposed(axis, spent, busy / m, m, hidden)
        axes[axis] = machine.use(axis, times(mine, end, m), exposed, rank_flops)
        seconds[f"{axis} traffic"] = exposed
    blocking = sum(use.exposed_seconds for axis, use in axes.items() if axis not in DATA)
    seconds["pipeline waits"] = waits * (1 + blocking / busy)
    seconds["optimizer"] = _update(machine, study)
    seconds["host link"] = _link(machine, study.work.link(study.layers), busy / m) * m
    step = sum(seconds.values())
    peak = device.flops[t.dtype] * ranks
    limit = run.memory * 1e9 if run.memory is not None else device.memory
    fits = memory["peak"] <= limit
    return Estimate(
        name=name,
        hardware=device.name,
        mesh=study.sizes,
        ranks=ranks,
        rules=setup.rules_of(run.sharding).name,
        batch=(t.global_batch, run.data.seq),
        microbatches=m,
        remat=t.remat,
        dtype=t.dtype,
        schedule=p.schedule if stages > 1 else "none",
        parameters=study.parameters,
        flops=study.flops,
        flops_whole_attention=study.whole,
        rank_flops=rank_flops,
        mfu=study.whole / (step * peak),
        mfu_causal=study.flops / (step * peak),
        step_seconds=step,
        tokens_per_second_per_rank=t.global_batch * run.data.seq / step / ranks,
        seconds=seconds,
        bubble=pipeline.bubble(p.schedule, stages, p.virtual, m),
        memory_bytes=memory["peak"],
        memory=memory,
        host=study.host,
        device_memory=int(limit),
        fits=fits,
        binds=_binds(seconds, step) if fits else f"memory: a rank needs {memory['peak'] / 1e9:.1f} GB of {limit / 1e9:.0f} GB",
        axes=axes,
        collectives=tuple(times(study.micro, study.once, m)),
        meetings=study.meetings,
    )


def _meetings(machine: Machine, study: Study, busy: float, flops: float) -> AxisUse:
    """The axis of replicas on the mean of steps. busy: seconds of a step's computation, so many of which hide a meeting of
    parameters as its delay has."""
    n, mean, exposed = study.sizes[REPLICA], Row("all_reduce", REPLICA, 0, 0, 0), 0.0
    for met in study.meetings:
        row = Row("all_reduce", REPLICA, met.count, met.bytes, wire_bytes("all_reduce", n, met.bytes))
        hidden = busy * study.delay if met.what == "params" else 0.0
        exposed += max(0.0, machine.send(row) - hidden) / met.every
        mean = replace(mean, bytes=mean.bytes + row.bytes // met.every, wire=mean.wire + row.wire // met.every)
    return machine.use(REPLICA, [replace(mean, count=1)], exposed, flops)


def _places(sizes: dict[str, int]) -> dict[str, tuple[int, int]]:
    """{axis: (stride, ranks)}; axes are given outer to inner."""
    inner = list(sizes.values())
    return {axis: (math.prod(inner[i + 1 :]), n) for i, (axis, n) in enumerate(sizes.items())}


def _seconds(machine: Machine, study: Study) -> tuple[dict[str, float], float, float]:
    """(seconds of a step's computation on the slowest stage, its FLOPs, seconds that it waits for other stages)."""
    m, p, stages = study.run.training.microbatches, study.run.pipeline, study.run.mesh.pp
    at = {part: line(study.layers) for part, line in study.work.counts.items()}
    inside, ends = at["layer"], at["head"] + at["tail"]
    if machine.execution.balanced:
        inside, ends = replace(inside, attention=study.attention / m), replace(ends, attention=0.0)
    slowest = machine.compute(inside, ends, at["rest"])
    mean = machine.compute(inside, ends * (1 / stages), at["rest"])
    both = inside + ends
    waits = pipeline.bubble(p.schedule, stages, p.virtual, m) * sum(mean.values()) * m
    return {name: value * m for name, value in slowest.items()}, (both.matmul + both.attention) * m, waits


def _update(machine: Machine, study: Study) -> float:
    """Seconds of the optimizer: fused it reads state, parameters (half of AdamW's state) and gradients, writes two; of state
    in host memory those of its way here or back, if these are more.
    """
    moved = study.work.counts["update"](study.layers).moved
    moved = 3.5 * study.optimizer_bytes if machine.execution.fused else moved
    swap = study.work.swap(study.layers) / 2 / (machine.device.host * machine.efficiency.links)
    return max(moved / (machine.device.bandwidth * machine.efficiency.bytes), swap)


def _link(machine: Machine, moved: float, busy: float) -> float:
    """Seconds in which a microbatch waits for host memory: half is sent under its forward, half comes under its backward."""
    each = moved / 2 / (machine.device.host * machine.efficiency.links)
    return max(0.0, each - busy / 3) + max(0.0, each - busy * 2 / 3)


def _binds(seconds: dict[str, float], step: float) -> str:
    name = max(seconds, key=lambda part: seconds[part])
    return f"{name}: {seconds[name] / step:.0%} of the step"
