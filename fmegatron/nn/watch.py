"""Statistics that blocks leave where a step asks for them: nothing is computed, and no op is added, where it does not.

    activations/03.attn/kurtosis, ...        of named activations of node 3: moments (sharding/moments.py) and the largest size
    attention/03.max_logit                   the largest score that enters node 3's softmax: scaled, capped, of keys seen
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from fmegatron.sharding import Sharding


def activation(sh: Sharding, name: str, x: Tensor, names: str) -> None:
    """Tap the statistics of an activation, [.., features] with dims `names`."""
    if sh.watches("activations"):
        place = f"activations/{{layer}}.{name}"
        sh.tap(place, x, names, "moments")
        sh.tap(f"{place}/max", x.detach().abs(), names, "max")


def max_logit(sh: Sharding, largest: Tensor) -> None:
    """Tap the largest score of a layer's attention, from those of some queries or heads."""
    sh.tap("attention/{layer}.max_logit", largest, "", "max")
