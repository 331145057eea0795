"""Statistics that blocks leave where a step asks for them: nothing is computed, and no op is added, where it does not.

    activations/03.attn/kurtosis, ...        of named activations of node 3: moments (sharding/moments.py) and the largest size
    attention/03.max_logits                  that of each head, where QK-Clip is on
    attention/03.max_logit                   the largest score that enters node 3's softmax: scaled, capped, of keys seen
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fmegatron.sharding import Sharding

KINDS = frozenset({"activations", "attention", "routes"})  # what blocks look for; other kinds make no other block of them


def activation(sh: Sharding, name: str, x: Tensor, names: str) -> None:
    """Tap the statistics of an activation, [.., features] with dims `names`."""
    if sh.watches("activations"):
        place = f"activations/{{layer}}.{name}"
        sh.tap(place, x, names, "moments")
        sh.tap(f"{place}/max", x.detach().abs(), names, "max")


def max_logit(sh: Sharding, largest: Tensor, queries: Tensor, clip: bool) -> None:
    """Tap the largest score of a layer's attention, from those of this rank's heads; clip: and that of each head.

    largest: [local heads]. queries: "batch q_seq q_heads hd", as they lie.
    """
    if sh.watches("attention"):
        sh.tap("attention/{layer}.max_logit", largest, "", "max")
    if clip and sh.taps is not None:
        mine = sh.index("q_heads", "batch q_seq q_heads hd", queries)[:, None] == torch.arange(
            sh.size("heads"), device=largest.device
        )
        each = torch.where(mine, largest[:, None], torch.full_like(largest, -torch.inf)[:, None]).amax(0)
        sh.tap("attention/{layer}.max_logits", each, "", "max", keep="heads")
