"""A planned step as tables for people, and as JSON for programs."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict

from fmegatron.plan.estimate import Estimate
from fmegatron.sharding.traffic import columns


def to_json(plan: Estimate) -> str:
    """One JSON object with the fields of `Estimate`."""
    return json_module.dumps(asdict(plan), indent=2)


def to_text(plan: Estimate) -> str:
    """Memory by kind, traffic by axis, seconds by part, and what binds."""
    mesh = " x ".join(f"{axis}={n}" for axis, n in plan.mesh.items()) or "one device"
    head = [
        f"{plan.name}: {plan.parameters:,} parameters on {plan.ranks:,} {plan.hardware} ({mesh}) by {plan.rules!r}",
        f"a step of {plan.batch[0]} x {plan.batch[1]} tokens in {plan.microbatches} microbatch(es), remat {plan.remat}, "
        f"{plan.dtype}, pipeline {plan.schedule}",
    ]
    memory = [["memory of a rank, eager", "GB"], *([kind, f"{n / 1e9:,.2f}"] for kind, n in plan.memory.items())]
    memory += [[f"{kind} in host memory", f"{n / 1e9:,.2f}"] for kind, n in plan.host.items() if n]
    memory.append(["device", f"{plan.device_memory / 1e9:,.2f}"])
    axes = [["axis", "link", "ranks", "collectives", "GB sent", "seconds", "not hidden", "FLOP/byte", "link's ridge"]]
    for axis, use in plan.axes.items():
        numbers = [f"{use.ranks}", f"{use.collectives:,}", f"{use.wire / 1e9:,.2f}", _s(use.seconds), _s(use.exposed_seconds)]
        axes.append([axis, use.link, *numbers, f"{use.intensity:,.0f}", f"{use.ridge:,.0f}"])
    seconds = [["part of the step", "seconds", "share"]]
    seconds += [[part, _s(n), f"{n / plan.step_seconds:.1%}"] for part, n in plan.seconds.items() if n]
    sent = [["collective", "axis", "count", "bytes", "sent by ring"]]
    sent += [[row.collective, row.axis, f"{row.count:,}", f"{row.bytes:,}", f"{row.wire:,}"] for row in plan.collectives]
    met = [["replicas meet", "every", "bytes", "bytes a step"]]
    met += [[row.what, f"{row.every}", f"{row.bytes:,}", f"{row.bytes / row.every:,.0f}"] for row in plan.meetings]
    tail = [
        f"FLOPs of a step: {plan.flops:.4e} (causal attention halved), {plan.flops_whole_attention:.4e} (attention whole)",
        f"step {_s(plan.step_seconds)} s, {plan.tokens_per_second_per_rank:,.0f} tokens/s a rank, bubble {plan.bubble:.1%}",
        f"MFU {plan.mfu:.1%} (attention whole), {plan.mfu_causal:.1%} (causal attention halved)",
        f"binds: {plan.binds}",
    ]
    tables = [columns(memory, 1), columns(axes, 2) if plan.axes else ["no axes"], columns(sent, 2), columns(seconds, 1)]
    tables += [columns(met, 1)] if plan.meetings else []
    return "\n".join([*head, "", *("\n".join([*table, ""]) for table in tables), *tail])


def _s(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 100 else f"{seconds:,.0f}"
