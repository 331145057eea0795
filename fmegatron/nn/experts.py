"""A feed-forward block with weights for each of several experts, and the product that runs rows grouped by expert.

    rows [n, d], sorted by expert, with counts [experts]     grouped: nothing is computed that no token asked for
    rows [experts, slots, d]                                 static shapes: one batched product

`reference` is the definition: a loop over experts that anyone can read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmegatron.nn import mlp
from fmegatron.nn.mlp import Mlp
from fmegatron.nn.param import Init, Param, bias
from fmegatron.transforms import compiling

Experts = dict[str, Any]


def declare(kind: Mlp, inner: Init, outer: Init, width: str = "embed") -> dict[str, Param]:
    """Their weights, stacked on `expert`; width: the name of the features that go in and come out."""
    up, down = f"expert {width} expert_mlp", f"expert expert_mlp {width}"
    weights = {"gate": Param(up, inner)} if kind.gated else {}
    weights |= {"up": Param(up, inner), "down": Param(down, outer)}
    if kind.bias:
        weights |= {"gate_bias": bias("expert expert_mlp")} if kind.gated else {}
        weights |= {"up_bias": bias("expert expert_mlp"), "down_bias": bias(f"expert {width}")}
    return weights


def batched(kind: Mlp, p: Experts, rows: Tensor) -> Tensor:
    """[experts, slots, d] -> the same, by one batched product a projection; without the last bias."""

    def project(name: str) -> Tensor:
        y = rows @ p[name]
        return y + p[f"{name}_bias"][:, None] if kind.bias else y

    gate = project("gate") if kind.gated else None
    return mlp.hidden(kind, gate, project("up")) @ p["down"]


def grouped(kind: Mlp, p: Experts, rows: Tensor, counts: Tensor, expert: Tensor, scale: Tensor | None = None) -> Tensor:
    """[n, d] -> [n, d], rows sorted by expert; counts int64 [experts], expert int64 [n]: whose each row is; without the last
    bias. scale: [n], of what goes into the last product, hence of the result."""

    def project(name: str) -> Tensor:
        y = product(rows, p[name], counts)
        return y + p[f"{name}_bias"][expert] if kind.bias else y

    gate = project("gate") if kind.gated else None
    h = mlp.hidden(kind, gate, project("up"))
    return product(h if scale is None else h * scale[:, None].to(h.dtype), p["down"], counts)


def reference(kind: Mlp, p: Experts, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The definition: tokens x [t, d] through the experts index [t, k], each result times weight [t, k], added up."""
    y = torch.zeros_like(x)
    for e in range(p["up"].shape[0]):
        own = {name: w[e] for name, w in p.items()}
        gate = x @ own["gate"] if kind.gated else None
        up = x @ own["up"]
        if kind.bias:
            gate, up = (None if gate is None else gate + own["gate_bias"]), up + own["up_bias"]
        out = mlp.hidden(kind, gate, up) @ own["down"]
        out = out + own["down_bias"] if kind.bias else out
        y = y + out * (weight * (index == e)).sum(-1, keepdim=True).to(x.dtype)
    return y


# -- the grouped product ----------------------------------------------------------------------------------------------
def product(rows: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """rows [n, a] in groups of counts[e] times w [experts, a, b] -> [n, b]; eager, or traced where torch's kernel takes it."""
    if compiling() or rows.is_cuda:
        return F.grouped_mm(rows, w, offs=counts.cumsum(0).to(torch.int32))
    return _Product.apply(rows, w, counts)


def traceable(x: Tensor) -> bool:
    """Whether the grouped product of such rows can be traced into a graph: torch's kernel wants 16-byte strides."""
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.shape[-1] * x.element_size() % 16 == 0


class _Product(torch.autograd.Function):
    """One matmul a group, written into its rows: no copy of the weights, and no gradient of a whole stack for each expert."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, w: Tensor, counts: Tensor) -> Tensor:
        groups = counts.tolist()
        ctx.save_for_backward(rows, w)
        ctx.groups = groups
        return _each(rows, w, groups)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        rows, w = ctx.saved_tensors
        d_rows = d_w = None
        if ctx.needs_input_grad[0]:
            d_rows = _each(cotangent, w.transpose(1, 2), ctx.groups)
        if ctx.needs_input_grad[1]:
            d_w = torch.empty_like(w)
            for e, (x, y) in enumerate(zip(rows.split(ctx.groups), cotangent.split(ctx.groups), strict=True)):
                torch.mm(x.t(), y, out=d_w[e])
        return d_rows, d_w, None


def _each(rows: Tensor, w: Tensor, groups: Sequence[int]) -> Tensor:
    out = rows.new_empty(rows.shape[0], w.shape[2])
    for x, m, y in zip(rows.split(groups), w, out.split(groups), strict=True):
        if x.shape[0]:
            torch.mm(x, m, out=y)
    return out
