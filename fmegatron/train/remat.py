"""Remat policies: which activations are computed again in the backward pass instead of kept, and which wait on the host.

none        every node's graph is kept
full        a layer keeps only what it read, and runs again
every-K     K layers in a row do so together
selective   within a layer, the named parts: core_attention, mlp_activation, norm
offload-K   what the layers keep waits in host memory, that of K layers at most is on the device; offload: of two. Behind
            another policy and a plus (full+offload, selective+offload-3) it is what that one keeps

One more part is asked for by name: mla_up, the way of latent attention from its latents to its output. Then only the
latents are kept of it; core_attention is inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fmegatron.models.model import Node
from fmegatron.offload import Copies, Offload, Plain, copies_of
from fmegatron.transforms import checkpoint, inside_transform

SELECTIVE = ("core_attention", "mlp_activation", "norm")
PARTS = (*SELECTIVE, "mla_up")


@dataclass(frozen=True)
class Remat:
    """every: layers that are computed again together, 0 for none. parts: names of parts to compute again.

    held: pieces (layers, or what is computed again together) whose residuals may be on the device, None: all; copies: how
    those of the others travel.
    """

    every: int = 0
    parts: tuple[str, ...] = ()
    held: int | None = None
    copies: Copies = Plain()

    def offload(self, chain: Sequence[Node]) -> Offload:
        """Where the residuals of a walk over the chain wait; under a transform tensors have no memory that could be freed."""
        pieces = sum(again for _, again in self.segments(chain)) if self.every else sum(map(_is_layer, chain))
        return Offload(self.copies, None if inside_transform() else self.held, pieces)

    def segments(self, chain: Sequence[Node]) -> list[tuple[list[Node], bool]]:
        """The chain in pieces: (nodes, whether they are computed again)."""
        if not self.every:
            return [(list(chain), False)]
        pieces: list[tuple[list[Node], bool]] = []
        for node in chain:
            again = _is_layer(node)
            if pieces and pieces[-1][1] == again and (not again or len(pieces[-1][0]) < self.every):
                pieces[-1][0].append(node)
            else:
                pieces.append(([node], again))
        return pieces

    def recompute(self, name: str) -> Callable[..., Any] | None:
        """What `sh.remat` asks: a wrapper for a named part, or None."""
        return checkpoint if name in self.parts else None


def _is_layer(node: Node) -> bool:
    return node.layer is not None


def parse_remat(text: str, device: torch.device | str = "cpu") -> Remat:
    """The policy of a name, for a device; raises ValueError naming the legal ones."""
    first, _, last = text.rpartition("+")
    if last.split("-")[0] == "offload" and first != "offload":
        held = last.removeprefix("offload").removeprefix("-") or "2"
        if not held.isdigit() or int(held) < 1 or last == "offload-":
            raise ValueError(f"remat {text!r}: offload-K keeps K >= 1 layers' residuals on the device (offload is offload-2)")
        return replace(parse_remat(first or "none"), held=int(held), copies=copies_of(torch.device(device)))
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
        f"remat is none, full, every-K (every-2), selective, or selective:PART,PART of {', '.join(PARTS)}, "
        f"alone or with +offload or +offload-K; or offload, offload-K; not {text!r}"
    )
