"""Stochastic gradient descent: plain, with momentum, with Nesterov's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fmegatron.optim.base import Transform, chain
from fmegatron.optim.decay import Mask, add_decayed_weights
from fmegatron.optim.elementwise import Elementwise, Slots, elementwise
from fmegatron.optim.rate import scale_by_learning_rate
from fmegatron.optim.schedules import Schedule


def sgd(
    learning_rate: float | Tensor | Schedule, momentum: float = 0.0, nesterov: bool = False,
    weight_decay: float | Tensor | Schedule = 0.0, mask: Mask = None,
) -> Transform:
    """SGD with torch's momentum; weight_decay is coupled, added to the gradient before the momentum, as in torch."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum {momentum}: must be at least 0 and below 1")
    decay = [] if isinstance(weight_decay, float | int) and weight_decay == 0 else [add_decayed_weights(weight_decay, mask)]
    trace = [scale_by_momentum(momentum, nesterov)] if momentum else []
    return chain(*decay, *trace, scale_by_learning_rate(learning_rate))


def scale_by_momentum(momentum: float = 0.9, nesterov: bool = False) -> Transform:
    """trace = momentum trace + u, returned as it is or, Nesterov's, as u + momentum trace. State: {"trace"}."""

    def leaf(u: Any, p: Any, slots: Slots, s: dict[str, Any]) -> tuple[Any, Slots]:
        trace = slots["trace"] * momentum + u
        return trace * momentum + u if nesterov else trace, {"trace": trace}

    return elementwise(Elementwise(leaf, ("trace",)))
