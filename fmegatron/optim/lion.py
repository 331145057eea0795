"""Lion: the sign of a momentum.

    u = sign(b1 mu + (1 - b1) g)         p = p - rate (u + weight_decay p)
    mu = b2 mu + (1 - b2) g
"""

from __future__ import annotations

from typing import Any

from fmegatron.optim.adam import Moving
from fmegatron.optim.base import Transform, chain
from fmegatron.optim.decay import Mask, add_decayed_weights
from fmegatron.optim.elementwise import Elementwise, Slots, elementwise
from fmegatron.optim.rate import scale_by_learning_rate


def lion(
    learning_rate: Moving, betas: tuple[float, float] = (0.95, 0.98), weight_decay: Moving = 0.0, mask: Mask = None
) -> Transform:
    """Lion (Chen et al. 2023), with Megatron-LM's betas for language models."""
    return chain(scale_by_lion(betas), add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate))


def scale_by_lion(betas: tuple[float, float] = (0.95, 0.98)) -> Transform:
    """State: {"mu"}."""
    b1, b2 = betas
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise ValueError(f"betas {betas}: each must be at least 0 and below 1")

    def leaf(u: Any, p: Any, slots: Slots, s: dict[str, Any]) -> tuple[Any, Slots]:
        return slots["mu"].lerp(u, 1 - b1).sign(), {"mu": slots["mu"].lerp(u, 1 - b2)}

    return elementwise(Elementwise(leaf, ("mu",)))
