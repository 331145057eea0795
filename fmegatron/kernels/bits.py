"""The bits of a tensor as another dtype of the same width, under vmap too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def same_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.view(dtype) without a gradient; torch 2.11 has no batching rule for it."""
    if torch._C._functorch.maybe_current_level() is None:
        return x.detach().view(dtype)
    out: Tensor = _Bits.apply(x.detach(), dtype)
    return out


class _Bits(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.view(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Any]:
        return same_bits(x, dtype), in_dims[0]
