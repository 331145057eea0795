"""Zigzag: a causal sequence cut so that every rank of an axis has equal work, one part of its head and one of its tail.

    natural   0 1 2 3 4 5 6 7          2 n chunks of a sequence, n = 4 ranks
    stored    0 7 | 1 6 | 2 5 | 3 4    rank r holds chunks r and 2 n - 1 - r

`zigzag` and `unzigzag` are inverse. n = 1 is the identity.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fmegatron.sharding.sharding import Layout


def chunks(n: int) -> list[int]:
    """The chunk that is stored at each place: [0, 2n-1, 1, 2n-2, ...]."""
    return [chunk for r in range(n) for chunk in (r, 2 * n - 1 - r)]


def zigzag(x: Tensor, dim: int, n: int) -> Tensor:
    """From natural to stored order along `dim`. Raises ValueError where its size is no multiple of 2 n."""
    check_length(x.shape[dim], n)
    return x if n == 1 else _select(x, dim, chunks(n))


def unzigzag(x: Tensor, dim: int, n: int) -> Tensor:
    """From stored to natural order along `dim`, the inverse of `zigzag`."""
    check_length(x.shape[dim], n)
    order = chunks(n)
    return x if n == 1 else _select(x, dim, [order.index(chunk) for chunk in range(2 * n)])


def places(index: Tensor, length: int, n: int) -> Tensor:
    """Natural places of stored indices (int64, any shape) of a sequence of `length`."""
    if n == 1:
        return index
    size = length // (2 * n)
    rank, offset = index // (2 * size), index % (2 * size)
    return torch.where(offset < size, rank * size + offset, (2 * n - 1 - rank) * size + offset - size)


def check_length(length: int, n: int) -> None:
    """ValueError, with the nearest legal lengths, where a sequence does not cut into 2 n chunks."""
    unit = 2 * n
    if n > 1 and length % unit:
        near = [k for k in (length // unit * unit, -(-length // unit) * unit) if k]
        raise ValueError(
            f"a zigzag sequence of {length} tokens does not cut into 2 x {n} chunks, a head and a tail for each of {n} ranks: "
            f"use {' or '.join(map(str, near))} tokens, or contiguous placement"
        )


def _select(x: Tensor, dim: int, order: list[int]) -> Tensor:
    parts = x.unflatten(dim, (len(order), -1))
    return parts.index_select(dim, torch.tensor(order, device=x.device)).flatten(dim, dim + 1)


def plan_zigzag(layout: Layout) -> int:
    """Ranks among which the sequence lies zigzag; ValueError where rules name axes that are not its first."""
    outer = layout.placement(("batch", "seq")).of("seq")
    wanted = tuple(axis for axis in layout.rules.zigzag if axis in outer)
    if wanted != outer[: len(wanted)]:
        raise ValueError(f"zigzag over {', '.join(wanted)}, but seq lies over {', '.join(outer)}: name its first mesh axes")
    return math.prod(layout.mesh[axis].size for axis in wanted)
