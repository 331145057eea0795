"""What a pipeline schedule costs a rank: the time it waits, and the microbatches whose activations it holds.

By the closed forms of train/pipeline/formulas.py where there are some, else by simulating the schedule, with a forward, an
input gradient and a weight gradient of equal length.
"""

from __future__ import annotations

from fmegatron.train.pipeline import formulas
from fmegatron.train.pipeline.schedules import make_schedule
from fmegatron.train.pipeline.timeline import Durations, simulate


def bubble(schedule: str, stages: int, virtual: int, microbatches: int) -> float:
    """Time that a rank waits, as a part of the time it works. Raises ValueError for sizes that a schedule cannot have."""
    if stages == 1:
        return 0.0
    found = formulas.bubble(schedule, stages, virtual, microbatches, Durations())
    return simulate(make_schedule(schedule, stages, virtual, microbatches)).bubble if found is None else found


def in_flight(schedule: str, stages: int, virtual: int, microbatches: int, stage: int = 0) -> float:
    """Microbatches, counted over all layers of a rank, whose activations are alive at once."""
    if stages == 1:
        return 1.0
    peak = formulas.peak(schedule, stages, virtual, microbatches, stage)
    return peak / virtual if peak is not None else float(microbatches)
