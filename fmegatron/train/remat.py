"""Remat policies: which activations are computed again in the backward pass instead of kept.

none        every node's graph is kept
full        a layer keeps only what it read, and runs again
every-K     K layers in a row do so together
selective   within a layer, the named parts: core_attention, mlp_activation, norm

One more part is asked for by name: mla_up, the way of latent attention from its latents to its output. Then only the
latents are kept of it; core_attention is inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fmegatron.models.model import Node
from fmegatron.transforms import checkpoint

SELECTIVE = ("core_attention", "mlp_activation", "norm")
PARTS = (*SELECTIVE, "mla_up")


@dataclass(frozen=True)
class Remat:
    """every: layers that are computed again together, 0 for none. parts: names of parts to compute again."""

    every: int = 0
    parts: tuple[str, ...] = ()

    def segments(self, chain: Sequence[Node]) -> list[tuple[list[Node], bool]]:
        """The chain in pieces: (nodes, whether they are computed again)."""
        if not self.every:
            return [(list(chain), False)]
        pieces: list[tuple[list[Node], bool]] = []
        for node in chain:
            again = node.layer is not None
            if pieces and pieces[-1][1] == again and (not again or len(pieces[-1][0]) < self.every):
                pieces[-1][0].append(node)
            else:
                pieces.append(([node], again))
        return pieces

    def recompute(self, name: str) -> Callable[..., Any] | None:
        """What `sh.remat` asks: a wrapper for a named part, or None."""
        return checkpoint if name in self.parts else None


def parse_remat(text: str) -> Remat:
    """The policy of a name; raises ValueError naming the legal ones."""
    if text == "none":
        return Remat()
    if text == "full":
        return Remat(every=1)
    if text == "selective":
        return Remat(parts=SELECTIVE)
    every = text.removeprefix("every-")
    if text.startswith("every-") and every.isdigit() and int(every) > 0:
        return Remat(every=int(every))
    parts = tuple(text.removeprefix("selective:").split(","))
    if text.startswith("selective:") and all(part in PARTS for part in parts):
        return Remat(parts=parts)
    raise ValueError(
        f"remat is none, full, every-K (every-2), selective, or selective:PART,PART of {', '.join(PARTS)}; not {text!r}"
    )
