"""Seconds of a step's parts, from counts, traffic and hardware.

    microbatch = products / (peak e) + moved / (bandwidth b) + what is sent along tp, cp, ep and pp / (link l)
    step       = microbatch m + waiting of the pipeline + what of the data axes' traffic is not hidden + optimizer

    e, b, l    the efficiencies of hardware.py
    moved      bytes that kernels between the products read and write
    hidden     gathers and reductions of the data axes run beside a microbatch, as prefetch lets them; a reduction at the end
               of the step does not, unless the code overlaps it with the last backward: that of one microbatch, and of as many
               as there are stages where parts are interleaved (they go through the parts together; a part whose last one is
               done reduces beside those of the others). Then what is sent between stages travels beside another part's work
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from fmegatron.plan.hardware import Efficiency, Hardware
from fmegatron.plan.meter import Count
from fmegatron.sharding.traffic import Row

DATA = ("dp", "fsdp")


@dataclass(frozen=True)
class Execution:
    """How the code runs that is planned for; the defaults are this package's compiled step.

    fused: what lies between two products is one kernel; fused_ends: before and after the layers too. overlap: what is sent
    once a step hides behind the last backward and the next forward. narrow: new parameters travel in bf16. async_tp: traffic
    of tp hides behind the products. balanced: on any cp causal attention is half the work. fp8: the layers' products run in
    fp8, and what tp gathers for them travels so. prefetch: gathers hide behind the blocks before. stages: of a pipeline whose
    parts are interleaved, 1 of any other.
    """

    fused: bool = True
    fused_ends: bool = True
    overlap: bool = False
    narrow: bool = False
    async_tp: bool = False
    balanced: bool = False
    fp8: bool = False
    prefetch: bool = True
    stages: int = 1


@dataclass(frozen=True)
class AxisUse:
    """One mesh axis in a step of one rank: its link, what is sent, how long that takes, and how much of it nothing hides.

    intensity: FLOPs of the rank for each byte it sends; ridge: what the link asks for to keep up with the products.
    """

    link: str
    ranks: int
    collectives: int
    bytes: int
    wire: int
    seconds: float
    exposed_seconds: float
    intensity: float
    ridge: float


@dataclass(frozen=True)
class Machine:
    """A device, what a step gets of it, the code, and where the mesh's axes lie: {axis: (stride, ranks)}."""

    device: Hardware
    efficiency: Efficiency
    execution: Execution
    axes: Mapping[str, tuple[int, int]]
    dtype: str

    def compute(self, layers: Count, ends: Count, rest: Count) -> dict[str, float]:
        """Seconds of a microbatch's products, its attention, and of the kernels between. rest: gradients added up, casts."""
        peak, fp8 = self.device.flops[self.dtype], self.device.flops.get("fp8" if self.execution.fp8 else self.dtype)
        if fp8 is None:
            raise ValueError(f"hardware = {self.device.name}: has no fp8")
        e, memory = self.efficiency.flops, self.device.bandwidth * self.efficiency.bytes
        both, how = layers + ends, self.execution
        return {
            "products": layers.matmul / (fp8 * e) + ends.matmul / (peak * e),
            "attention": both.attention / (peak * (self.device.attention or e)),
            "between": sum(
                part.operands if whole else part.moved - part.operands
                for part, whole in ((layers, how.fused), (ends, how.fused and how.fused_ends), (rest, how.fused))
            ) / memory,
        }

    def send(self, row: Row) -> float:
        """Seconds of all collectives of a row."""
        place, link = self.device.link(*self.axes[row.axis])
        latency = self.device.latency[place == "across"]
        half = self.execution.fp8 and (row.axis, row.collective) == ("tp", "all_gather")
        return row.wire * (0.5 if half else 1.0) / (link * self.efficiency.links) + row.count * latency

    def narrowed(self, row: Row) -> Row:
        """What is sent once a step: new parameters in half their bytes where they travel in bf16."""
        half = self.execution.narrow and row.axis in DATA and row.collective == "all_gather"
        return replace(row, wire=row.wire // 2) if half else row

    def use(self, axis: str, rows: Iterable[Row], exposed: float, flops: float) -> AxisUse:
        """What a step makes of an axis."""
        rows = list(rows)
        place, link = self.device.link(*self.axes[axis])
        wire = sum(row.wire for row in rows)
        return AxisUse(
            link=f"{place}, {link / 1e9:.0f} GB/s",
            ranks=self.axes[axis][1],
            collectives=sum(row.count for row in rows),
            bytes=sum(row.bytes for row in rows),
            wire=wire,
            seconds=sum(self.send(row) for row in rows),
            exposed_seconds=exposed,
            intensity=flops / wire if wire else math.inf,
            ridge=self.device.flops[self.dtype] / link,
        )

    def exposed(self, axis: str, spent: tuple[float, float], busy: float, microbatches: int, data: float) -> float:
        """Seconds of an axis's traffic that nothing hides, in a step.

        spent: its seconds in a microbatch, and at the end of the step; busy: seconds of a microbatch's computation; data:
        those of all data axes' traffic in a microbatch, which share what hides them.
        """
        micro, once = spent
        how = self.execution
        if axis not in DATA:
            hidden = busy if axis == "tp" and how.async_tp or axis == "pp" and how.overlap and how.stages > 1 else 0.0
            return max(0.0, micro - hidden) * microbatches + once
        share = micro / data if data else 0.0
        hidden = busy * share if how.prefetch else 0.0
        at_end = busy * how.stages if how.overlap else 0.0
        return max(0.0, micro - hidden) * microbatches + max(0.0, once - at_end)


def per_microbatch(one: Iterable[Row], two: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of a step of one and of two microbatches -> (what each microbatch sends, what the step sends once)."""
    first = {(row.collective, row.axis): row for row in one}
    second = {(row.collective, row.axis): row for row in two}
    none = Row("", "", 0, 0, 0)
    micro = [_combine(second[key], first.get(key, none), -1, key) for key in second]
    by_key = {(row.collective, row.axis): row for row in micro}
    once = [_combine(first[key], by_key[key], -1, key) for key in first]
    return micro, once


def times(micro: Iterable[Row], once: Iterable[Row], microbatches: int) -> list[Row]:
    """The rows of a step of any number of microbatches."""
    end = {(row.collective, row.axis): row for row in once}
    none = Row("", "", 0, 0, 0)
    return [_combine(end.get(key, none), row, microbatches, key)
            for row in micro for key in [(row.collective, row.axis)]]  # fmt: skip


def _combine(a: Row, b: Row, factor: int, key: tuple[str, str]) -> Row:
    return Row(*key, a.count + factor * b.count, a.bytes + factor * b.bytes, a.wire + factor * b.wire)
