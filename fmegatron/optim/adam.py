"""Adam and AdamW.

    mu = b1 mu + (1 - b1) g                     u = (mu / (1 - b1^t)) / (sqrt(nu / (1 - b2^t)) + eps)
    nu = b2 nu + (1 - b2) g^2                   p = p - rate (u + weight_decay p)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fmegatron.optim.base import Transform, chain
from fmegatron.optim.decay import Mask, add_decayed_weights
from fmegatron.optim.elementwise import Elementwise, Slots, elementwise
from fmegatron.optim.rate import scale_by_learning_rate
from fmegatron.optim.schedules import Schedule


def adamw(
    learning_rate: float | Tensor | Schedule, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
    weight_decay: float | Tensor | Schedule = 0.1, mask: Mask = None,
) -> Transform:
    """AdamW (Loshchilov and Hutter 2019), decay times the rate as in torch; `mask` says which leaves decay (decay.py)."""
    return chain(scale_by_adam(betas, eps), add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate))


def adam(
    learning_rate: float | Tensor | Schedule, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
) -> Transform:
    """Adam (Kingma and Ba 2015)."""
    return chain(scale_by_adam(betas, eps), scale_by_learning_rate(learning_rate))


def scale_by_adam(betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8) -> Transform:
    """The mean of gradients over the root of the mean of squares, both unbiased. State: {"count", "mu", "nu"}."""
    b1, b2 = betas
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise ValueError(f"betas {betas}: each must be at least 0 and below 1")

    def numbers(count: Tensor) -> dict[str, Tensor]:
        t = (count + 1).double()
        return {"unbias_mu": 1 / (1 - b1**t), "unbias_nu": 1 / (1 - b2**t)}

    def leaf(u: Any, p: Any, slots: Slots, s: dict[str, Any]) -> tuple[Any, Slots]:
        mu, nu = slots["mu"].lerp(u, 1 - b1), slots["nu"].lerp(u * u, 1 - b2)
        return mu * s["unbias_mu"] / ((nu * s["unbias_nu"]).sqrt() + eps), {"mu": mu, "nu": nu}

    return elementwise(Elementwise(leaf, ("mu", "nu"), numbers))
