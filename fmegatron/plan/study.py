"""What a run does on a mesh, whatever the device: the rehearsed work, memory and traffic of its fullest rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from fmegatron.data.batches import NAMES
from fmegatron.models import Model
from fmegatron.optim import Transform
from fmegatron.plan.config import PlanConfig
from fmegatron.plan.legal import fullest
from fmegatron.plan.memory import host_of, memory_of
from fmegatron.plan.seconds import per_microbatch
from fmegatron.plan.work import Work, first_layers, work_of
from fmegatron.sharding import abstract_mesh
from fmegatron.sharding.apart import inside, replicas
from fmegatron.sharding.traffic import Row, wire_bytes
from fmegatron.train import setup
from fmegatron.train.explain import explain
from fmegatron.train.explanation import MeetingRow
from fmegatron.train.remat import parse_remat


@dataclass(frozen=True)
class Study:
    """layers: of a stage. micro, once: what a rank sends in a microbatch, and at the end of the step. memory,
    host: by kind.

    optimizer_bytes: of its state on a rank. flops, whole: the model's in a step, causal attention halved or not. attention:
    a rank's FLOPs of it in a step where the causal half is shared evenly. meetings: of replicas that go apart; micro and once
    are then those of one replica. delay: steps that a meeting of parameters has to arrive in.
    """

    run: PlanConfig
    parameters: int
    sizes: dict[str, int]
    layers: int
    work: Work
    micro: tuple[Row, ...]
    once: tuple[Row, ...]
    memory: dict[str, int]
    host: dict[str, int]
    optimizer_bytes: int
    flops: float
    whole: float
    attention: float
    meetings: tuple[MeetingRow, ...] = ()
    delay: int = 0


def study(run: PlanConfig, model: Model) -> Study:
    """Study a run whose mesh is complete and legal (`legal.check`). Raises ValueError as `explain` does.

    Layers are those of the fullest rank, by the run's pipeline.layout or evenly.
    """
    t, stages, m = run.training, run.mesh.pp, run.training.microbatches
    sizes = {axis: n for axis, n in run.mesh.sizes.items() if n > 1}
    rule = setup.semisync_of(run)
    mesh = abstract_mesh(**{axis: n for axis, n in sizes.items() if axis != "pp"})
    every = setup.sharding_of(run, replace(mesh, device="cpu") if run.hardware == "cpu" else mesh)
    sh, rows = inside(every), (t.global_batch, run.data.seq)
    own = (rows[0] // replicas(every), rows[1])  # of a replica that goes apart
    shared: dict[str, Any] = {
        "dtype": setup.dtype_of(run),
        "fields": {key: names for key, names in NAMES.items() if key != "documents" or run.data.document_mask},
        "remat": t.remat,
        "prefetch": t.prefetch,
    } | setup.data_axes_of(run)

    def tx_of(part: Model) -> Transform:
        return setup.optimizer_of(run, part, setup.schedule_of(run))

    flops, whole = flops_of(model, rows[1], rows[0])
    work = work_of(model, sh, tx_of, batch=own, microbatches=m, donate=t.donate, **shared)
    layers = fullest(run, model)
    stage = first_layers(model, layers)
    one, two = (
        explain(stage, sh, tx=tx_of(stage), batch=(own[0] // m * k, own[1]), microbatches=k, **shared) for k in (1, 2)
    )
    micro, once = per_microbatch(one.collectives, two.collectives)
    if stages > 1:
        micro.append(_between_stages(run, model, stages))
    place = (run.pipeline.schedule, stages, run.pipeline.virtual, m)
    on_device = [replace(row, optimizer_bytes=0) for row in one.leaves] if run.optimizer.offload else one.leaves
    memory = memory_of(stage, on_device, work, *place)
    meetings: tuple[MeetingRow, ...] = ()
    if rule is not None and replicas(every) > 1:
        met = explain(stage, every, tx=tx_of(stage), batch=(replicas(every), rows[1]), semisync=rule, **shared)
        meetings, outer = met.meetings, met.per_rank.get("outer", 0)
        memory |= {"outer": outer, "peak": memory["peak"] + outer} if outer else {}
    return Study(
        run=run,
        parameters=model.count(),
        sizes=sizes,
        layers=layers,
        work=work,
        micro=tuple(micro),
        once=tuple(once),
        memory=memory,
        host=host_of(stage, one.leaves, work, *place),
        optimizer_bytes=one.per_rank["optimizer"],
        flops=flops,
        whole=whole,
        attention=_half(model, rows, math.prod(sizes.values()), t.remat),
        meetings=meetings,
        delay=rule.delay if rule is not None else 0,
    )


def flops_of(model: Model, seq: int, batch: int) -> tuple[float, float]:
    """Model FLOPs of a step: (causal attention halved, attention whole)."""
    return setup.flops_of(model, seq, batch), setup.flops_of(model, seq, batch, causal=False)


def _half(model: Model, rows: tuple[int, int], ranks: int, remat: str) -> float:
    """FLOPs of a rank's attention in a step where its causal half is shared evenly.

    The model's 3 parts are one forward and two backward; the kernel's backward computes the scores again (half a part), and
    remat of layers runs the forward again (one).
    """
    half, whole = flops_of(model, rows[1], rows[0])
    again = parse_remat(remat).every > 0
    return (whole - half) * (4.5 if again else 3.5) / 3 / ranks


def _between_stages(run: PlanConfig, model: Model, stages: int) -> Row:
    """What a rank sends to its neighbours for a microbatch: the stream forward and its cotangent back, for each part."""
    s = run.mesh.sizes
    rows = run.training.global_batch // (s["replica"] * s["dp"] * s["fsdp"] * s["ep"] * run.training.microbatches)
    width = 2 if run.training.dtype == "bf16" else 4
    embed = model.sizes.get("embed", 0)
    sp = s["tp"] if any(name == "seq" and "tp" in axes for name, axes in setup.rules_of(run.sharding).lines("compute")) else 1
    each = rows * run.data.seq * (embed if isinstance(embed, int) else embed.n) * width // (s["cp"] * sp)
    count = 2 * run.pipeline.virtual
    return Row("permute", "pp", count, count * each, wire_bytes("permute", stages, count * each))
