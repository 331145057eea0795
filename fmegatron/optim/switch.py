"""Numbers that change once, at a given update: betas, weights of moments, the learning rate. Pure functions of the count.

    betas = (Switch(0.9, 0.999, at=2048, reset=True), 0.999)      the first moment starts anew with update 2048, counted from 0
    rate  = scaled(wsd(1e-3, ...), at=2048, by=4.0)

So a run that is taken up again before, at or after the switch does what the unbroken run does: nothing is kept but the count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fmegatron.optim.schedules import Rate, Schedule, schedule


@dataclass(frozen=True)
class Switch:
    """`before` for the first `at` updates, `after` from then on. reset, of a beta: its moment is zeroed at the switch."""

    before: float
    after: float
    at: int
    reset: bool = False

    def __call__(self, count: Tensor) -> Tensor:
        return choose(count < self.at, self.before, self.after)

    def missing(self, count: Tensor) -> Tensor:
        """The weight that a mean with this beta still lacks after update `count`: the product of the betas since its start."""
        t = (count + 1).double()
        since = (t - self.at).clamp(min=0)
        old = self.before ** t.clamp(max=self.at)
        return torch.where(count < self.at, old, self.after**since * (1.0 if self.reset else old))

    def keep(self, count: Tensor) -> Tensor:
        """0 at the update that zeroes the moment first, else 1."""
        return ((count != self.at) | (not self.reset)).double()


Number = float | Switch


def choose(which: Tensor, yes: float, no: float) -> Tensor:
    """One of two numbers, in fp64."""
    zero = which.double() * 0
    return torch.where(which, zero + yes, zero + no)


def values(x: Number) -> tuple[float, ...]:
    """Every value that a number takes."""
    return (x.before, x.after) if isinstance(x, Switch) else (float(x),)


def missing(beta: Number, count: Tensor) -> Tensor:
    """beta^t after update `count` = t - 1; of a Switch the product of what it was."""
    return beta.missing(count) if isinstance(beta, Switch) else beta ** (count + 1).double()


def scaled(learning_rate: float | Tensor | Schedule, at: int, by: float) -> Rate:
    """A schedule times `by` from update `at` on (counted from 0); its peak stays what it was."""
    rate = schedule(learning_rate)
    return Rate(peak_of(learning_rate), lambda count: rate(count) * choose(count < at, 1.0, by))


def peak_of(learning_rate: float | Tensor | Schedule) -> float | Tensor:
    """lr0: the number itself, or a schedule's peak; ValueError for a bare function, which says none."""
    if isinstance(learning_rate, Rate):
        return learning_rate.peak
    if callable(learning_rate):
        raise ValueError("decay relative to the learning rate needs its peak: make the schedule optim.Rate(peak, function)")
    return learning_rate
