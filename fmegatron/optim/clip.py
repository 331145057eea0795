"""Clipping, by the norm of the whole tree or by value."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fmegatron.optim.base import Over, Transform, Tree, scaling
from fmegatron.optim.elementwise import Elementwise, Slots, elementwise


def clip_by_global_norm(max_norm: float) -> Transform:
    """Updates times max_norm / (norm + 1e-6) where that is below 1 (Megatron-LM's and torch's rule)."""
    if max_norm <= 0:
        raise ValueError(f"clip norm {max_norm}: must be above 0; leave the clip out for none")

    def factor(updates: Tree, over: Over) -> Tensor:
        return (max_norm / (over.norm(updates) + 1e-6)).clamp(max=1.0)

    return scaling(factor)


def clip_by_value(max_value: float) -> Transform:
    """Each element to [-max_value, max_value]."""
    if max_value <= 0:
        raise ValueError(f"clip value {max_value}: must be above 0; leave the clip out for none")

    def leaf(u: Any, p: Any, slots: Slots, s: dict[str, Any]) -> tuple[Any, Slots]:
        return u.clamp(-max_value, max_value), {}

    return elementwise(Elementwise(leaf))
