"""Schedules: pure functions from the count of updates before this one to a 0-D fp64 tensor, with Megatron-LM's formulas.

    rate(t) = init + (peak - init) t / warmup                for t <= warmup
              min + c(r) (peak - min),  r = (t - warmup) / (steps - warmup)
              min                                            for t > steps

No branch depends on a value, so a schedule can be mapped (over peaks, over ranks) and its step never recompiles. peak may
be a 0-D tensor. Count 0 is the first update, as in optax and in transformers: with a warmup from 0 it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Schedule = Callable[[Tensor], Tensor]
SHAPES = ("linear", "cosine", "exponential", "minus_sqrt")


@dataclass(frozen=True)
class Rate:
    """A schedule that knows its peak, the lr0 of a decay that is relative to it."""

    peak: float | Tensor
    fn: Schedule

    def __call__(self, count: Tensor) -> Tensor:
        return self.fn(count)


def constant(peak: float | Tensor, *, warmup: int = 0, init: float = 0.0) -> Rate:
    """peak, after the warmup."""
    return _warmed(peak, warmup, init, lambda t: torch.zeros_like(t) + peak)


def linear(
    peak: float | Tensor, *, warmup: int = 0, steps: int, min: float | Tensor = 0.0, init: float = 0.0
) -> Rate:
    """A straight line from peak to min: c = 1 - r."""
    return _decayed(peak, warmup, steps, min, init, lambda r: 1 - r)


def cosine(
    peak: float | Tensor, *, warmup: int = 0, steps: int, min: float | Tensor = 0.0, init: float = 0.0
) -> Rate:
    """Half a cosine from peak to min: c = (1 + cos(pi r)) / 2."""
    return _decayed(peak, warmup, steps, min, init, lambda r: 0.5 * (torch.cos(math.pi * r) + 1))


def inverse_sqrt(
    peak: float | Tensor, *, warmup: int = 0, steps: int | None = None, min: float | Tensor = 0.0, init: float = 0.0
) -> Rate:
    """max(min, peak sqrt(warmup / t)), both counted as at least 1; min after `steps`, if given."""

    def after(t: Tensor) -> Tensor:
        floor = torch.zeros_like(t) + min
        rate = torch.maximum(floor, peak * (max(warmup, 1) / t.clamp(min=1)).sqrt())
        return rate if steps is None else torch.where(t > steps, floor, rate)

    return _warmed(peak, warmup, init, after)


def wsd(
    peak: float | Tensor, *, warmup: int = 0, steps: int, decay: int, shape: str = "linear",
    min: float | Tensor = 0.0, init: float = 0.0,
) -> Rate:
    """Warmup, stable, decay: peak until the last `decay` of `steps`, then with q from 0 to 1 by shape:
    linear 1 - q, cosine (1 + cos(pi q)) / 2, exponential 2 * 0.5**q - 1, minus_sqrt 1 - sqrt(q)."""
    if shape not in SHAPES:
        raise ValueError(f"wsd shape {shape!r}: must be one of {', '.join(SHAPES)}")
    if not 0 < decay <= steps - warmup:
        raise ValueError(f"wsd decay of {decay} steps: must be between 1 and steps - warmup = {steps - warmup}")

    def c(r: Tensor) -> Tensor:
        q = ((r * (steps - warmup) - (steps - warmup - decay)) / decay).clamp(min=0)
        return {"linear": lambda: 1 - q, "cosine": lambda: 0.5 * (torch.cos(math.pi * q) + 1),
                "exponential": lambda: 2 * torch.pow(0.5, q) - 1, "minus_sqrt": lambda: 1 - q.sqrt()}[shape]()

    return _decayed(peak, warmup, steps, min, init, c)


def schedule(value: float | Tensor | Schedule) -> Schedule:
    """A schedule from a schedule, a number or a 0-D tensor."""
    return value if callable(value) else constant(value)


def _decayed(
    peak: float | Tensor, warmup: int, steps: int, min: float | Tensor, init: float, c: Callable[[Tensor], Tensor]
) -> Rate:
    """min + c(r) (peak - min) after the warmup, min after `steps`."""
    if warmup > steps:
        raise ValueError(f"a warmup of {warmup} steps does not fit into {steps} steps")

    def after(t: Tensor) -> Tensor:
        r = ((t - warmup) / max(steps - warmup, 1)).clamp(0, 1)
        return torch.where(t > steps, torch.zeros_like(t) + min, min + c(r) * (peak - min))

    return _warmed(peak, warmup, init, after)


def _warmed(peak: float | Tensor, warmup: int, init: float, after: Callable[[Tensor], Tensor]) -> Rate:
    """The line from init to peak until `warmup`, then `after`."""
    if warmup < 0:
        raise ValueError(f"a warmup of {warmup} steps: must be at least 0")

    def rate(count: Tensor) -> Tensor:
        t = count.double()
        return torch.where(t <= warmup, init + (peak - init) * (t / warmup), after(t)) if warmup else after(t)

    return Rate(peak, rate)


def increment(start: float, end: float, *, steps: int, shape: str = "constant") -> Rate:
    """Megatron-LM's weight decay: from start to end over `steps`, then end, with r = t / steps by shape:
    constant (start must be end), linear r, cosine (1 + cos(pi (1 - r))) / 2."""
    if shape not in ("constant", "linear", "cosine"):
        raise ValueError(f"increment shape {shape!r}: must be one of constant, linear, cosine")
    if shape == "constant" and start != end:
        raise ValueError(f"a constant value cannot go from {start} to {end}: use shape linear or cosine")

    def value(count: Tensor) -> Tensor:
        r = (count.double() / max(steps, 1)).clamp(max=1)
        c = 0.5 * (torch.cos(math.pi * (1 - r)) + 1) if shape == "cosine" else r
        return start + c * (end - start)

    return Rate(end, value)


def by_samples(rate: Schedule, samples: Schedule | int) -> Rate:
    """A schedule of samples as one of updates. samples: in each batch, or {count of updates -> samples before it}."""
    consumed = samples if callable(samples) else lambda count: count * samples
    return Rate(rate.peak if isinstance(rate, Rate) else math.nan, lambda count: rate(consumed(count)))
