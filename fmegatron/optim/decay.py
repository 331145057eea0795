"""Weight decay, and the masks that say which leaves decay.

A mask is a function (dotted path, leaf) -> bool or number, or a tree of them with the structure of params (the model's
declarations give one), or None: matrices decay, vectors do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fmegatron import tree
from fmegatron.optim.base import Transform, Tree
from fmegatron.optim.elementwise import Elementwise, Slots, elementwise
from fmegatron.optim.schedules import Schedule, schedule

Mask = Callable[[str, Tensor], bool | float] | Tree | None


def matrices(path: str, leaf: Tensor) -> bool:
    """Whether a leaf has two dims or more, not counting the dim on which `layers` are stacked."""
    return leaf.dim() - ("layers" in path.split(".")) >= 2


def add_decayed_weights(weight_decay: float | Tensor | Schedule, mask: Mask = None) -> Transform:
    """u <- u + weight_decay m p, with m the mask's number of the leaf. State: {"count"}."""
    rate = schedule(weight_decay)

    def each(params: Tree) -> list[float]:
        if mask is not None and not callable(mask):
            of = tree.to_paths(mask)  # by path: params may be one group's
            return [float(of[path]) for path in tree.to_paths(params)]
        return [float(m) for m in tree.leaves(tree.map_with_path(mask or matrices, params))]

    def leaf(u: Any, p: Any, slots: Slots, s: dict[str, Any]) -> tuple[Any, Slots]:
        return u + p * s["each"] * s["decay"], {}

    return elementwise(Elementwise(leaf, numbers=lambda count: {"decay": rate(count)}, each=each, known=("decay",)))
