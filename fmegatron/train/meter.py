"""A run's step as it is asked for: with the statistics that are due, and with a clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fmegatron.config.monitors import Monitors
from fmegatron.train.clock import Clock

KINDS = ("norms", "optimizer", "activations", "attention")


def due(c: Monitors, step: int) -> frozenset[str]:
    """The kinds of statistics that step number `step` watches: those whose interval divides it."""
    kinds = {kind for kind in KINDS if getattr(c, kind) and step % getattr(c, kind) == 0}
    return frozenset(kinds | ({"parameters"} if "optimizer" in kinds and c.per_parameter else set()))


class Meter:
    """`step(state, batch, limits)` with what is due at the step that `begin` named; `clock` has the times of its parts.

    A step that is run again keeps the time at which its first batch came.
    """

    def __init__(self, monitors: Monitors, step: Callable[..., Any], device: torch.device | str) -> None:
        self.monitors, self.step, self.device = monitors, step, device
        self.begin(1)

    def begin(self, number: int) -> None:
        """Step `number` begins: with waiting for its batch."""
        self.number, self.clock = number, Clock(self.device)

    def __call__(self, state: Any, batch: Any, limits: Any) -> Any:
        if "data" not in self.clock.marks:
            self.clock.mark("data")
        watch = due(self.monitors, self.number)
        return self.step(state, batch, limits, clock=self.number - 1, watch=watch, mark=self.clock.mark)
