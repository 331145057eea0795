"""Timelines of real runs, in the form of simulated ones.

    marks = []
    step = make_step(model, tx, sh, pipeline=Pipeline(schedule, marks=marks));  step(state, batch)
    replay(schedule, marks)                  all ranks in one process: each computation as long as it took, side by side
    zero = together(); step(...); gather("a run", marks, zero)      a process a rank: as it was
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fmegatron.models.model import Model
from fmegatron.sharding import SINGLE
from fmegatron.train.pipeline.schedule import Action, Schedule
from fmegatron.train.pipeline.stages import Mark, Pipeline
from fmegatron.train.pipeline.timeline import Timeline, measured, simulate
from fmegatron.train.planned import plan_step
from fmegatron.train.step import value_and_grad


@dataclass(frozen=True)
class Taken:
    """Durations that were measured, in ms; transfers cost nothing here."""

    times: Mapping[Action, float]
    send: float = 0.0

    def of(self, action: Action) -> float:
        """The duration of a computation."""
        return self.times[action]


def replay(schedule: Schedule, marks: Sequence[Mark], name: str = "") -> Timeline:
    """The timeline of ranks side by side, from steps in which one process did the work of all: of each action the fastest."""
    times: dict[Action, float] = {}
    for _, action, start, end in marks:
        times[action] = min(times.get(action, torch.inf), (end - start) * 1e3)
    return simulate(schedule, Taken(times), name or f"{schedule.name}, measured", " ms")


def together() -> float:
    """The time on this process's clock at which all processes are here: the zero of `gather`."""
    dist.barrier()
    return time.perf_counter()


def gather(name: str, marks: Sequence[Mark], zero: float) -> Timeline:
    """The timeline of a run of processes, each with its marks since its `together`; one process a rank. All get it."""
    every: list[list[Mark]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, [(rank, action, start - zero, end - zero) for rank, action, start, end in marks])
    return measured(name, [mark for found in every for mark in found])


def measure(model: Model, schedule: Schedule, length: int) -> Timeline:
    """The replayed timeline of three steps on one device, after one that is not measured: one sample a microbatch."""
    marks: list[Mark] = []
    plan = plan_step(model, SINGLE, pipeline=Pipeline(schedule, marks=marks))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, plan.sh.true_size("vocab"), (schedule.microbatches, length), generator=generator)
    params = model.init(0)
    with torch.no_grad():
        for warm in (False, True, True, True):
            value_and_grad(plan, plan.sh, params, {"tokens": tokens})
            if not warm:
                marks.clear()
    return replay(schedule, marks)
