"""Many tensors in one launch: a table of their addresses, and which piece of which tensor each program takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 4096  # elements of a program


@dataclass(frozen=True)
class Table:
    """addresses [roles, leaves] int64; sizes [leaves] int64; leaf, start [programs] int64: the piece of each program."""

    addresses: Tensor
    sizes: Tensor
    leaf: Tensor
    start: Tensor

    @property
    def programs(self) -> int:
        """How many programs cover all elements."""
        return len(self.leaf)


def table_of(roles: Sequence[Sequence[Tensor]], piece: int = PIECE) -> Table:
    """The table of lists of tensors, one list a role; tensors of one leaf have one shape, those of a role one dtype.

    The tensors must stay alive until the kernel has run. Raises ValueError where one is not contiguous, or differs.
    """
    first = roles[0]
    for role in roles:
        for x, like in zip(role, first, strict=True):
            if x.shape != like.shape or x.dtype != role[0].dtype or not x.is_contiguous():
                raise ValueError(f"a tensor {tuple(x.shape)} of {x.dtype} beside {tuple(like.shape)} of {role[0].dtype}: "
                                 "one launch takes contiguous tensors, of one dtype a role and one shape a leaf")
    leaf: list[int] = []
    start: list[int] = []
    for i, x in enumerate(first):
        starts = range(0, x.numel(), piece)
        leaf += [i] * len(starts)
        start += starts
    rows = [[x.data_ptr() for x in role] for role in roles]
    device = first[0].device

    def put(numbers: object) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)

    return Table(put(rows), put([x.numel() for x in first]), put(leaf), put(start))
