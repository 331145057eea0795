"""The learning rate: updates times minus the schedule's value, the last link of most chains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fmegatron import tree
from fmegatron.optim.base import Transform
from fmegatron.optim.elementwise import Elementwise, Slots, elementwise
from fmegatron.optim.schedules import Schedule, schedule


def scale_by_learning_rate(learning_rate: float | Tensor | Schedule) -> Transform:
    """u <- -rate(count) u. State: {"count"}, also for a constant rate, so that a checkpoint outlives its schedule."""
    rate = schedule(learning_rate)

    def leaf(u: Any, p: Any, slots: Slots, s: dict[str, Any]) -> tuple[Any, Slots]:
        return u * s["step"], {}

    return elementwise(Elementwise(leaf, numbers=lambda count: {"step": -rate(count)}, known=("rate",)))


def scale_by_leaf(factors: Mapping[str, float]) -> Transform:
    """u <- u factors[path]; KeyError for a leaf that has none."""

    def leaf(u: Any, p: Any, slots: Slots, s: dict[str, Any]) -> tuple[Any, Slots]:
        return u * s["each"], {}

    return elementwise(Elementwise(leaf, each=lambda params: [factors[path] for path in tree.to_paths(params)]))
