"""Many tensors in one launch: a table of their addresses, and which piece of which tensor each program takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmegatron.kernels.launch import Jit, power

if TYPE_CHECKING:
    import triton.language as tl

PIECE = 4096  # elements of a program


@dataclass(frozen=True)
class Table:
    """addresses [roles, leaves], sizes [leaves], first [leaves] (the first program of each): int64. programs: of all."""

    addresses: Tensor
    sizes: Tensor
    first: Tensor
    programs: int

    @property
    def leaves(self) -> int:
        """How many tensors a role has."""
        return len(self.sizes)

    @property
    def wide(self) -> int:
        """The power of two in which the leaves are searched."""
        return power(self.leaves)


def table_of(roles: Sequence[Sequence[Tensor]], piece: int = PIECE) -> Table:
    """The table of lists of tensors, one list a role, one tensor a leaf; programs cover the first role's elements.

    The tensors must stay alive until the kernel has run. Raises ValueError where one is not contiguous, or of another dtype.
    """
    for role in roles:
        for x in role:
            if x.dtype != role[0].dtype or not x.is_contiguous():
                raise ValueError(f"a tensor of {x.dtype} beside {role[0].dtype}, strides {x.stride()}: "
                                 "one launch takes contiguous tensors, of one dtype a role")
    sizes = [x.numel() for x in roles[0]]
    ends = list(accumulate(-(-n // piece) for n in sizes))
    n, device = len(sizes), roles[0][0].device
    words = integers([*(x.data_ptr() for role in roles for x in role), *sizes, 0, *ends[:-1]], device)
    return Table(words[: -2 * n].view(len(roles), n), words[-2 * n : -n], words[-n:], ends[-1])


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 on a device, written by launches that carry them: a copy from the host would wait, and a CUDA graph refuses it."""
    out = torch.zeros(len(values), dtype=torch.int64, device=device)
    torch._foreach_add_(list(out.unbind()), list(values))
    return out


@Jit
def leaf_of(first: tl.tensor, count: tl.tensor, LEAVES: tl.constexpr) -> tl.tensor:
    """The leaf whose piece this program takes: the last that begins at or before it."""
    i = tl.arange(0, LEAVES)
    begun = (i < count) & (tl.load(first + i, mask=i < count, other=0) <= tl.program_id(0))
    return tl.sum(begun.to(tl.int32), 0) - 1
