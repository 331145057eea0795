"""The 2-norm of all elements of many tensors, in two launches: the squares of each piece, then their sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmegatron.kernels.launch import Form, Jit, wide
from fmegatron.kernels.multi import PIECE, leaf_of, table_of

if TYPE_CHECKING:
    import triton.language as tl


def norm(tensors: Sequence[Tensor], *, form: Form = "reference") -> Tensor:
    """The norm, 0-D, at least fp32, of contiguous tensors of one dtype (the reference takes any)."""
    if form == "reference":
        return reference(tensors)
    pieces = norms(tensors)
    return torch.linalg.vector_norm(pieces, dtype=torch.float64).to(pieces.dtype)  # few numbers, whose squares may be large


def reference(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of the tensors' norms."""
    return torch.linalg.vector_norm(torch.stack(
        [torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors]))


@Jit
def _norms(addresses, sizes, starts, count, out,
           DTYPE: tl.constexpr, WIDE: tl.constexpr, LEAVES: tl.constexpr, N: tl.constexpr):
    me = tl.program_id(0)
    leaf = leaf_of(starts, count, LEAVES)
    at = (me - tl.load(starts + leaf)) * N + tl.arange(0, N)
    x = tl.load(addresses + leaf).to(tl.pointer_type(DTYPE))
    v = tl.load(x + at, mask=at < tl.load(sizes + leaf), other=0.0).to(WIDE)
    peak = tl.max(tl.abs(v), 0)  # squares of what is far from one would not fit
    fits = (peak > 0.0) & (peak < float("inf"))
    v = v / tl.where(fits, peak, 1.0)
    tl.store(out + me, tl.where(fits, peak, 1.0) * tl.sqrt(tl.sum(v * v, 0)))


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of each piece."""
    table = table_of([tensors])
    out = tensors[0].new_empty(table.programs, dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    _norms[(table.programs,)](
        table.addresses, table.sizes, table.first, table.leaves, out,
        DTYPE=language(tensors[0].dtype), WIDE=wide(tensors[0]), LEAVES=table.wide, N=PIECE)
    return out


def language(dtype: torch.dtype) -> object:
    """Triton's dtype of the same name."""
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))
