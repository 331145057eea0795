"""A feed-forward block with weights for each of several experts, and the product that runs rows grouped by expert.

    rows [n, d], sorted by expert, with counts [experts]     grouped: nothing is computed that no token asked for
    rows [experts, slots, d]                                 static shapes: one batched product

`reference` is the definition: a loop over experts that anyone can read.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fmegatron.kernels.grouped_matmul import grouped_matmul
from fmegatron.kernels.launch import Form
from fmegatron.nn import mlp
from fmegatron.nn.mlp import Mlp
from fmegatron.nn.param import Init, Param, bias

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


def batched(kind: Mlp, p: Experts, rows: Tensor, *, form: Form = "reference") -> Tensor:
    """[experts, slots, d] -> the same, by one batched product a projection; without the last bias."""

    def project(name: str) -> Tensor:
        y = product(rows, p[name], None)
        return y + p[f"{name}_bias"][:, None] if kind.bias else y

    gate = project("gate") if kind.gated else None
    return product(mlp.hidden(kind, gate, project("up"), form), p["down"], None)


def grouped(
    kind: Mlp, p: Experts, rows: Tensor, counts: Tensor, expert: Tensor, scale: Tensor | None = None,
    *, form: Form = "reference",
) -> Tensor:
    """[n, d] -> [n, d], rows sorted by expert; counts int64 [experts], expert int64 [n]: whose each row is; without the last
    bias. scale: [n], of what goes into the last product, hence of the result."""

    def project(name: str) -> Tensor:
        y = product(rows, p[name], counts, form)
        return y + p[f"{name}_bias"][expert] if kind.bias else y

    gate = project("gate") if kind.gated else None
    if not isinstance(p["down"], Tensor):  # rounding a row must not depend on who asked for it
        y = product(mlp.hidden(kind, gate, project("up"), form), p["down"], counts)
        return y if scale is None else y * scale[:, None].to(y.dtype)
    if form == "triton":  # the scale is part of the kernel
        return product(mlp.hidden(kind, gate, project("up"), form, scale), p["down"], counts, form)
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
class Weight(Protocol):
    """Stacked weights with a product of their own, in place of a tensor."""

    def product(self, rows: Tensor, counts: Tensor | None) -> Tensor: ...


def product(rows: Tensor, w: Tensor | Weight, counts: Tensor | None, form: Form = "reference") -> Tensor:
    """rows [n, a] in groups of counts[e] times w [experts, a, b] -> [n, b]; by torch's kernel on a GPU, where it takes them.

    What that does not take is a kernel of ours (`form` triton, no fp64), else a matmul a group, which waits for the counts.
    Without counts rows are [experts, slots, a].
    """
    if not isinstance(w, Tensor):
        return w.product(rows, counts)
    if counts is None:
        return rows @ w
    if rows.is_cuda and traceable(rows):
        return F.grouped_mm(rows, w, offs=counts.cumsum(0).to(torch.int32))
    if form == "triton" and rows.dtype != torch.float64:
        return grouped_matmul(rows, w, counts, form=form)
    y: Tensor = _Product.apply(rows, w, counts)
    return y


def sizes_of(counts: Tensor, rows: int) -> list[int]:
    """Rows of each group; where there are no values, in a plan, even shares of `rows`."""
    e = len(counts)
    return [rows // e + (i < rows % e) for i in range(e)] if counts.is_meta else counts.tolist()


def traceable(x: Tensor) -> bool:
    """Whether the grouped product of such rows can be traced: torch's kernel takes bf16 with strides of 16 bytes."""
    return not x.is_cuda or (x.dtype == torch.bfloat16 and x.shape[-1] % 8 == 0)


@torch.library.custom_op("fmegatron::grouped_product", mutates_args=())
def grouped_product(rows: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """`product` by one matmul a group, written into its rows; opaque to a tracer, so that it may look at counts."""
    return _each_product(rows, w, counts)


def _each_product(rows: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    out, groups = rows.new_empty(rows.shape[0], w.shape[2]), sizes_of(counts, len(rows))
    for x, m, y in zip(rows.split(groups), w, out.split(groups), strict=True):
        torch.mm(x, m, out=y)
    return out


@torch.library.custom_op("fmegatron::grouped_outer", mutates_args=())
def grouped_outer(rows: Tensor, others: Tensor, counts: Tensor) -> Tensor:
    """rows [n, a] transposed times others [n, b], group by group -> [experts, a, b]: the gradient of the weights."""
    return _each_outer(rows, others, counts)


def _each_outer(rows: Tensor, others: Tensor, counts: Tensor) -> Tensor:
    out, groups = rows.new_empty(counts.shape[0], rows.shape[1], others.shape[1]), sizes_of(counts, len(rows))
    for x, y, d in zip(rows.split(groups), others.split(groups), out, strict=True):
        torch.mm(x.t(), y, out=d)
    return out


@grouped_product.register_fake
def _(rows: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], w.shape[2])


@grouped_outer.register_fake
def _(rows: Tensor, others: Tensor, counts: Tensor) -> Tensor:
    return rows.new_empty(counts.shape[0], rows.shape[1], others.shape[1])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, w: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(rows, w, counts)
        return (_each_product if rows.is_meta else grouped_product)(rows, w, counts)  # a plan counts what is inside

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        rows, w, counts = ctx.saved_tensors
        times, outer = (_each_product, _each_outer) if rows.is_meta else (grouped_product, grouped_outer)
        return times(cotangent, w.transpose(1, 2), counts), outer(rows, cotangent, counts), None
