"""Timelines of schedules, simulated from durations or measured in a run: when each rank did what, bubble, peak activations.

    print(simulate(make_schedule("1f1b", 4, 1, 8), Durations()))
"""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from fmegatron.train.pipeline.schedule import Action, Schedule, sends


class Times(Protocol):
    """How long a schedule's computations take, and a send."""

    @property
    def send(self) -> float: ...

    def of(self, action: Action) -> float: ...


@dataclass(frozen=True)
class Durations:
    """How long a stage computes for one microbatch, in any unit; B takes inputs + weights. send: from rank to rank.

    load: a factor for each stage, where they are not alike.
    """

    forward: float = 1.0
    inputs: float = 1.0
    weights: float = 1.0
    send: float = 0.0
    load: tuple[float, ...] = ()

    def of(self, action: Action) -> float:
        """The duration of a computation."""
        whole = {"F": self.forward, "I": self.inputs, "W": self.weights, "B": self.inputs + self.weights}[action.kind]
        return whole * self.load[action.stage] if self.load else whole


@dataclass(frozen=True)
class Bar:
    """One computation on its rank, from start to end."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Bars of all ranks, in the order in which each rank ran them. unit: of the times, for people."""

    name: str
    bars: tuple[Bar, ...]
    unit: str = ""

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return 1 + max(bar.rank for bar in self.bars)

    @property
    def stages(self) -> int:
        """Number of stages."""
        return 1 + max(bar.action.stage for bar in self.bars)

    def row(self, rank: int) -> list[Bar]:
        """The bars of one rank."""
        return [bar for bar in self.bars if bar.rank == rank]

    @property
    def span(self) -> float:
        """From the first start to the last end."""
        return max(bar.end for bar in self.bars) - min(bar.start for bar in self.bars)

    def busy(self, rank: int) -> float:
        """Time that a rank computed."""
        return sum(bar.end - bar.start for bar in self.row(rank))

    @property
    def bubble(self) -> float:
        """Time lost over time needed: span / mean busy time - 1, as Narayanan 2021 defines it."""
        return self.span * self.ranks / sum(self.busy(rank) for rank in range(self.ranks)) - 1

    def peaks(self) -> list[int]:
        """For each rank, the most (stage, microbatch) pairs whose activations it holds at once."""
        most = []
        for rank in range(self.ranks):
            held = peak = 0
            for bar in self.row(rank):
                held += {"F": 1, "I": 0}.get(bar.action.kind, -1)
                peak = max(peak, held)
            most.append(peak)
        return most

    def json(self) -> str:
        """One JSON object: name, unit, span, bubble, peaks, bars of (rank, action, start, end)."""
        bars = [{**asdict(bar), "action": str(bar.action)} for bar in self.bars]
        head = {"name": self.name, "unit": self.unit, "span": self.span, "bubble": self.bubble, "peaks": self.peaks()}
        return json_module.dumps({**head, "bars": bars})

    def __str__(self) -> str:
        """A row a rank, a column a slot of time; F3 forward of microbatch 3; later stages of a rank: b b' b''."""
        head = f"{self.name}: {self.ranks} ranks, {self.stages} stages; span {_number(self.span)}{self.unit}, bubble "
        head += f"{self.bubble:.1%}, peak activations {' '.join(map(str, self.peaks()))}"
        cells = [self._cells(rank) for rank in range(self.ranks)]
        width = max(len(cell) for row in cells for cell in row)
        lines = [" ".join(f"{cell:<{width}}" for cell in row).rstrip() for row in cells]
        return "\n".join([head, *(f"rank {rank:<2} {line}" for rank, line in enumerate(lines))])

    def _cells(self, rank: int) -> list[str]:
        """A rank's slots: as long as the shortest bar of the timeline, so that the picture keeps proportions roughly."""
        slot = max(min(bar.end - bar.start for bar in self.bars), self.span / 200) or 1.0
        start = min(bar.start for bar in self.bars)
        row, stages = list[str](), sorted({bar.action.stage for bar in self.row(rank)})
        for bar in self.row(rank):
            first, last = round((bar.start - start) / slot), round((bar.end - start) / slot)
            row += ["."] * (first - len(row))
            row += [f"{bar.action.kind}{bar.action.microbatch}{chr(39) * stages.index(bar.action.stage)}"]
            row += ["-"] * (last - len(row))
        return row


def simulate(schedule: Schedule, durations: Times | None = None, name: str = "", unit: str = "") -> Timeline:
    """The timeline of ranks that each take their actions in order, as soon as what these need has come.

    Sends take `durations.send` and keep no rank from computing.
    """
    times, durations = dict[Action, tuple[float, float]](), durations or Durations()
    free = [0.0] * schedule.ranks
    bars = []
    for rank, action in schedule.order:
        starts = [times[need][1] + (durations.send if sends(schedule, need) else 0.0) for need in schedule.needs(action)
                  if need.stage != action.stage]  # fmt: skip
        start = max([free[rank], *starts])
        free[rank] = end = start + durations.of(action)
        times[action] = start, end
        bars.append(Bar(rank, action, start, end))
    return Timeline(name or schedule.name, tuple(bars), unit)


def measured(name: str, marks: Sequence[tuple[int, Action, float, float]]) -> Timeline:
    """The timeline of a real run: (rank, action, start, end) in seconds of one clock, shown in ms from the first start."""
    zero = min(start for _, _, start, _ in marks)
    bars = [Bar(rank, action, (start - zero) * 1e3, (end - zero) * 1e3) for rank, action, start, end in marks]
    return Timeline(name, tuple(bars), " ms")


def _number(x: float) -> str:
    return f"{x:.6g}"
