"""What a run knows of its numbers so far: which are out of bounds, which samples are left out. It goes into checkpoints.

    limits = watch.limits(config.faults)          for the step, which refuses what is not below them
    watch = watch.saw(values, config.faults)      after an accepted step
    watch = watch.without(first, stop)            samples that are left out from now on

A loss spikes where it is at least `factor` times the largest of the first `spike_samples` accepted ones (Megatron-LM's rule);
one that is not finite is refused at any time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from fmegatron.config.faults import Faults
from fmegatron.toml import ConfigError


@dataclass(frozen=True)
class Suspect:
    """A step that was refused twice on these devices (a name a rank), and waits to be run on others."""

    step: int
    devices: tuple[str, ...]
    said: str


@dataclass(frozen=True)
class Watch:
    """largest: {metric: of the accepted steps, `seen` of them}. skip: [first, stop) of the run's samples that are left out."""

    largest: Mapping[str, float] = field(default_factory=dict)
    seen: int = 0
    skip: tuple[tuple[int, int], ...] = ()
    rollbacks: int = 0
    suspect: Suspect | None = None

    def limits(self, c: Faults, overflows: bool = False) -> dict[str, float]:
        """{metric: what its size must stay below}, inf where it only must be finite.

        overflows: gradients that are not finite are nothing unusual (fp16, whose loss scale then goes down).
        """
        limits = {"loss": math.inf} | ({} if overflows else {"grad_norm": math.inf})
        for name, factor in spikes(c).items():
            most = self.largest[name] * factor if self.seen >= c.spike_samples else math.inf
            limits[name] = min(limits.get(name, math.inf), float(np.float32(most)))  # as the step compares
        return limits

    def saw(self, values: Mapping[str, float], c: Faults) -> Watch:
        """With the values of one more accepted step."""
        if self.seen >= c.spike_samples:
            return self
        largest = {name: max(self.largest.get(name, 0.0), abs(values[name])) for name in spikes(c)}
        return replace(self, largest=largest, seen=self.seen + 1)

    def without(self, first: int, stop: int) -> Watch:
        """With samples first ... stop - 1 of the run left out; ranges that touch become one."""
        merged: list[tuple[int, int]] = []
        for one in sorted([*self.skip, (first, stop)]):
            if merged and one[0] <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(merged[-1][1], one[1])
            else:
                merged.append(one)
        return replace(self, skip=tuple(merged))

    def as_json(self) -> dict[str, Any]:
        """Strict JSON; the inverse of `from_json`."""
        return asdict(self)


def from_json(given: Mapping[str, Any] | None) -> Watch:
    """What a checkpoint's meta says under "watch"; a new one where it says nothing."""
    if not given:
        return Watch()
    suspect = given["suspect"]
    return Watch(
        dict(given["largest"]),
        given["seen"],
        tuple((first, stop) for first, stop in given["skip"]),
        given["rollbacks"],
        Suspect(suspect["step"], tuple(suspect["devices"]), suspect["said"]) if suspect else None,
    )


def spikes(c: Faults) -> dict[str, float]:
    """{metric: factor} of `faults.spike`. Raises ConfigError for what is no factor."""
    try:
        factors = {name: float(factor) for name, factor in c.spike.items()}
    except (TypeError, ValueError):
        factors = {"": 0.0}
    if any(not factor > 1 for factor in factors.values()):
        raise ConfigError(f"faults.spike = {c.spike}: expected metric = factor, each above 1")
    return factors
