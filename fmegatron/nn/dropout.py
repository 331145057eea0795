"""Dropout keyed by where an element is: (key, sample, place in the sequence, feature), the same on every mesh.

Keys differ by layer and by site; the sample id and the order of a token travel with the batch, so that a mask does not
depend on microbatches, on a zigzag layout or on the mesh.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fmegatron import random

if TYPE_CHECKING:
    from fmegatron.sharding import Sharding


def places(sh: Sharding, v: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """What the masks are keyed by, from a batch's tokens, and sample and order where it has them.

    index: [1, seq], the index along the sequence. Returns sample [batch], and the order [batch or 1, seq] where the
    residual stream lies (place.h).
    """
    order = v.get("order", index)
    return {
        "sample": v["sample"] if "sample" in v else sh.index("batch", "batch seq", v["tokens"]),
        "place.h": order,
    }


def apply(sh: Sharding, rate: float, key: Tensor | None, x: Tensor, v: dict[str, Tensor]) -> Tensor:
    """Drop features of the residual stream [batch, seq, embed]; no key, no dropout."""
    if not rate or key is None:
        return x
    feature = sh.index("embed", "batch seq embed", x)
    return random.dropout(x, rate, key, (v["sample"][:, None, None], v["place.h"][:, :, None], feature))


def of_scores(sh: Sharding, key: Tensor, queries: Tensor, sample: Tensor, order: Tensor) -> Tensor:
    """Of attention weights: the key of each row [batch, heads, seq, 1], for queries at `order` [batch or 1, seq].

    A column's index is the order of its key.
    """
    heads = sh.index("q_heads", "batch q_seq q_heads hd", queries)
    row = random.fold_in(random.fold_in(key, sample)[:, None], heads)[:, :, None]
    return random.fold_in(row, order[:, None, :])[..., None]
