"""Experts as a loop from tokens and back to them, on a CPU: an expert's rows exist while it runs.

What stays for the backward is what the activations read. The backward goes over the experts twice, so that the gradient of
`up` finds room where the rows that the activations read have been: memory is never that of all three weights' gradients and
of all rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fmegatron.nn import mlp
from fmegatron.nn.experts import Experts, sizes_of
from fmegatron.nn.mlp import Mlp

Pull = Callable[[Tensor, Sequence[Tensor]], None]
PIECE = 1 << 16  # numbers that an activation takes at once: what is computed from them stays in a core's own cache


def lean(kind: Mlp, p: Experts, x: Tensor, token: Tensor, counts: Tensor, scale: Tensor) -> Tensor:
    """`experts.grouped` from tokens and back to them, [t, d] -> [t, d]: row i is token[i], its result times scale[i] is added
    there. Eager, differentiable once; a token's experts are added up in at least fp32."""
    names = [name for name in p if name != "down_bias"]
    groups = sizes_of(counts, len(token))
    y: Tensor = _Lean.apply(kind, names, token, groups, x, scale.to(x.dtype), *(p[name] for name in names))
    return y


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kind: Mlp, names: Sequence[str], token: Tensor, groups: Sequence[int], x: Tensor, scale: Tensor, *w: Tensor
    ) -> Tensor:
        p, reads = dict(zip(names, w, strict=True)), [name for name in ("gate", "up") if name in names]
        y, kept = _sums(x), list[list[Tensor]]()
        for e, (at, by) in enumerate(zip(token.split(groups), scale.split(groups), strict=True)):
            rows = x.index_select(0, at)
            own = [rows @ p[name][e] for name in reads]
            if kind.bias:
                own = [z.add_(p[f"{name}_bias"][e]) for name, z in zip(reads, own, strict=True)]
            del rows
            h = mlp.hidden(kind, own[0] if kind.gated else None, own[-1])
            y.index_add_(0, at, (h @ p["down"][e]).mul_(by[:, None]).to(y.dtype))
            kept.append(own)
        ctx.save_for_backward(token, x, scale, *w)
        ctx.how, ctx.kept = (kind, names, groups, reads), kept
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        kind, names, groups, reads = ctx.how
        token, x, scale, *w = ctx.saved_tensors
        p, again = dict(zip(names, w, strict=True)), torch._C._autograd._get_current_graph_task_keep_graph()
        kept = ctx.kept.copy() if again else ctx.kept
        d: dict[str, Tensor] = {name: _like(p[name], groups) for name in names if name != "up"}
        d_x, d_scale, d_up = _sums(x), torch.empty_like(scale), list[Tensor]()
        at, by, d_by = (z.split(groups) for z in (token, scale, d_scale))
        for e in _busy(groups):
            ct = cotangent.index_select(0, at[e])
            d_h = ct @ p["down"][e].t()
            h, found = _through_activation(kind, kept[e], d_h, by[e], d_by[e], again)
            kept[e] = []
            torch.mm(h.t(), ct.mul_(by[e][:, None]), out=d["down"][e])
            del h, ct, d_h
            if kind.gated:
                torch.mm(x.index_select(0, at[e]).t(), found[0], out=d["gate"][e])
            if kind.bias:
                for name, own in zip(reads, found, strict=True):
                    torch.sum(own, 0, out=d[f"{name}_bias"][e])
            d_rows = found[-1] @ p["up"][e].t()
            if kind.gated:
                torch.addmm(d_rows, found[0], p["gate"][e].t(), out=d_rows)  # not addmm_, which torch's FLOP counter overlooks
            d_x.index_add_(0, at[e], d_rows.to(d_x.dtype))
            d_up.append(found.pop())
            del found, d_rows
        d["up"] = _like(p["up"], groups)
        for e, own in zip(_busy(groups), d_up, strict=True):
            torch.mm(x.index_select(0, at[e]).t(), own, out=d["up"][e])
        return None, None, None, None, d_x.to(x.dtype), d_scale, *(d[name] for name in names)


def _through_activation(
    kind: Mlp, reads: list[Tensor], d_h: Tensor, scale: Tensor, d_scale: Tensor, again: bool
) -> tuple[Tensor, list[Tensor]]:
    """What an expert's last projection reads, and the gradients of what its activation reads: in its place, unless that is
    needed again. d_h: unscaled, scaled in place; d_scale is written."""
    h, found = torch.empty_like(d_h), [torch.empty_like(z) for z in reads] if again else reads
    step = max(1, PIECE // max(h.shape[1], 1))
    room = [torch.empty_like(h[:step]) for _ in range(3)]
    for each in zip(h.split(step), d_h.split(step), scale.split(step), d_scale.split(step), *(z.split(step) for z in reads),
                    *(z.split(step) for z in found), strict=True):  # fmt: skip
        h_, d_h_, scale_, d_scale_ = each[:4]
        here = [z[: len(h_)] for z in room]
        pull = _activation(kind, each[4 : 4 + len(reads)], h_, here)
        torch.sum(torch.mul(h_, d_h_, out=here[-1]), 1, out=d_scale_)
        pull(d_h_.mul_(scale_[:, None]), each[4 + len(reads) :])
    return h, found


def _activation(kind: Mlp, reads: Sequence[Tensor], h: Tensor, room: Sequence[Tensor]) -> Pull:
    """Write what the last projection reads into h; returns the way from its gradient to those of `reads`, into given rows.
    room: three tensors like h; the last is free again when this returns."""
    if kind == Mlp("swiglu", kind.bias) and h.dtype in (torch.float32, torch.float64):  # one exponential, not one each way
        (gate, up), (slope, act, rest) = reads, room
        torch.mul(torch.mul(gate, torch.sigmoid(gate, out=slope), out=act), up, out=h)
        torch.addcmul(h, slope, torch.sub(up, h, out=rest), out=slope)  # silu'(gate) up = h + sigmoid(gate) (up - h)

        def pull(d_h: Tensor, out: Sequence[Tensor]) -> None:
            torch.mul(slope, d_h, out=out[0])
            torch.mul(act, d_h, out=out[1])

        return pull
    leaves = [z.detach().requires_grad_() for z in reads]
    with torch.enable_grad():
        y = mlp.hidden(kind, leaves[0] if kind.gated else None, leaves[-1])
    h.copy_(y.detach())

    def derived(d_h: Tensor, out: Sequence[Tensor]) -> None:
        for own, d in zip(out, torch.autograd.grad(y, leaves, d_h), strict=True):
            own.copy_(d)

    return derived


def _sums(x: Tensor) -> Tensor:
    """Where a token's experts are added up."""
    return x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _like(w: Tensor, groups: Sequence[int]) -> Tensor:
    """Room for the gradient of stacked weights: zeros where an expert has no rows."""
    return torch.zeros_like(w) if 0 in groups else torch.empty_like(w)


def _busy(groups: Sequence[int]) -> list[int]:
    """The experts that have rows."""
    return [e for e, n in enumerate(groups) if n]
