"""State that lies in host memory: a piece of it comes to the device, is updated there, and goes back while the next is updated.

    back    1 | 2 | 3 | ...                       at most three pieces are on the device: one on its way there, one in
    run         1 | 2 | 3 | ...                   work, one on its way back
    out             1 | 2 | 3 | ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor

from fmegatron.offload import Copies
from fmegatron.optim.packed import ROW


@dataclass(frozen=True)
class Piece:
    """`run(arrays)` updates in place what it is given: copies on the device of `held`, which lie in host memory."""

    run: Callable[[tuple[Tensor, ...]], object]
    held: tuple[Tensor, ...]


def in_turn(copies: Copies, device: torch.device, pieces: Sequence[Piece]) -> None:
    """Update pieces one after the other; `held` is then new. The host waits for it, so that anybody may read it."""
    coming = copies.back(pieces[0].held, device)
    leaving: tuple[list[Tensor], Callable[[], None]] | None = None
    for i, piece in enumerate(pieces):
        here, wait = coming
        if i + 1 < len(pieces):
            coming = copies.back(pieces[i + 1].held, device)
        wait()
        piece.run(tuple(here))
        if leaving is not None:
            leaving[1]()
        leaving = here, copies.out(here, piece.held)[1]
    if leaving is not None:
        leaving[1]()
    copies.finish()


def cuts(shape: torch.Size, most: int) -> Sequence[slice | EllipsisType]:
    """Parts along dim 0 of at most about `most` elements, of leaves whose rows a compiled kernel sees alike in any of them."""
    if len(shape) < 2 or shape[-1] % ROW or not math.prod(shape):
        return [...]
    inner = math.prod(shape[1:])
    step = max(1, most // inner)
    starts = list(range(0, shape[0], step))
    if len(starts) > 1 and (shape[0] - starts[-1]) * inner < 2 * ROW:  # a kernel of one row would be eager, and round otherwise
        del starts[-1]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], shape[0]], strict=True)]
