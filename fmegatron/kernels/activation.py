"""Activations of the feed-forward block, gated or not, with what stands around them, in one pass over memory.

    gated      y = act(min(gate + bg, c)) * (clip(up + bu, -c, c) + offset) * weight of the token
    plain      y = act(x + b) * weight of the token

act is silu (SwiGLU), gelu or gelu_tanh (GeGLU), quick_gelu (x sigmoid(1.702 x)) or relu2 (squared ReLU); c is `clamp`.
The kernel computes in fp32 at least and rounds once. Source: Shazeer 2020 (arXiv 2002.05202); So et al. 2021 (2109.08668).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fmegatron.kernels.launch import Form, Jit, Kernel, Tensors, op, programs, pull_of, rows_of, wide

if TYPE_CHECKING:
    import triton.language as tl

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
})


def glu(
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    act: str = "silu",
    clamp: float | None = None,
    offset: float = 0.0,
    form: Form = "reference",
) -> Tensor:
    """The gated activation of gate and up [..., n], biases [n], weights [...]; the result has gate's dtype."""
    inputs = (gate, up, gate_bias, up_bias, weights)
    if form == "reference":
        return reference(*inputs, act=act, clamp=clamp, offset=offset)
    return kernel(inputs, act, clamp, offset)(*inputs)[0]


def activate(
    x: Tensor, bias: Tensor | None = None, weights: Tensor | None = None, *, act: str, form: Form = "reference"
) -> Tensor:
    """The activation of x [..., n], bias [n], weights [...]; the result has x's dtype."""
    inputs = (x, None, bias, None, weights)
    return reference(*inputs, act=act) if form == "reference" else kernel(inputs, act, None, 0.0)(*inputs)[0]


def reference(
    gate: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None, weights: Tensor | None,
    *, act: str, clamp: float | None = None, offset: float = 0.0,
) -> Tensor:
    """The same in torch, each operator rounding; `up` of None is the plain activation."""
    gate = gate if gate_bias is None else gate + gate_bias
    y = ACTIVATIONS[act](gate if clamp is None else gate.clamp(max=clamp))
    if up is not None:
        up = up if up_bias is None else up + up_bias
        up = up if clamp is None else up.clamp(-clamp, clamp)
        y = y * (up + offset if offset else up)
    return y if weights is None else (y * weights[..., None]).to(y.dtype)


def kernel(inputs: Tensors, act: str, clamp: float | None, offset: float) -> Kernel:
    """The kernel of (gate, up, gate_bias, up_bias, weights); all but the first may be None."""
    moving = tuple(i for i, x in enumerate(inputs) if x is not None)
    whole = partial(reference, act=act, clamp=clamp, offset=offset)

    def forward(*xs: Tensor | None) -> tuple[Tensor, ...]:
        return (FORWARD(*xs, act, clamp, offset),)

    def backward(kept: Tensors, cotangents: Tensors) -> list[Tensor]:
        grads = BACKWARD(*kept, cotangents[0], act, clamp, offset)
        sums = (None, None, 0, 0, 0)
        found = [d if dim is None else d.sum(dim) for d, dim in zip(grads, sums, strict=True)]
        return [found[i].to(kept[i].dtype) for i in moving]  # type: ignore[union-attr]

    return Kernel(whole, forward, backward, 1, moving, lambda xs, out: xs, pull_of(whole, moving, 5))


# -- triton ---------------------------------------------------------------------------------------------------------
@Jit
def _act(x, ACT: tl.constexpr):
    """The activation and its derivative."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        y = x * s
        d = s * (1.0 + x * (1.0 - s))
    elif ACT == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        y = x * s
        d = s * (1.0 + 1.702 * x * (1.0 - s))
    elif ACT == "gelu":
        s = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y = x * s
        d = s + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACT == "gelu_tanh":
        t = 2.0 * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)) - 1.0
        y = 0.5 * x * (1.0 + t)
        d = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    else:
        r = tl.where(x < 0.0, 0.0, x)
        y = r * r
        d = 2.0 * r
    return y, d


@Jit
def _forward(gate, up, gate_bias, up_bias, weights, y, rows, n, of_gate, of_up, clamp: tl.constexpr, offset: tl.constexpr,
             ACT: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    col = tl.program_id(1) * N + tl.arange(0, N)
    inside = (row[:, None] < rows) & (col[None, :] < n)
    g = tl.load(gate + row[:, None] * of_gate + col[None, :], mask=inside, other=0.0).to(WIDE)
    if gate_bias is not None:
        g += tl.load(gate_bias + col, mask=col < n, other=0.0).to(WIDE)[None, :]
    if clamp is not None:
        g = tl.where(g > clamp, clamp, g)
    out, _ = _act(g, ACT)
    if up is not None:
        u = tl.load(up + row[:, None] * of_up + col[None, :], mask=inside, other=0.0).to(WIDE)
        if up_bias is not None:
            u += tl.load(up_bias + col, mask=col < n, other=0.0).to(WIDE)[None, :]
        if clamp is not None:
            u = tl.where(u > clamp, clamp, tl.where(u < -clamp, -clamp, u))
        out = out * (u + offset)
    if weights is not None:
        out = out * tl.load(weights + row, mask=row < rows, other=0.0).to(WIDE)[:, None]
    tl.store(y + row[:, None] * n + col[None, :], out.to(y.dtype.element_ty), mask=inside)


@Jit
def _backward(gate, up, gate_bias, up_bias, weights, dy, dgate, dup, dgate_bias, dup_bias, dweights, rows, n, of_gate, of_up,
              clamp: tl.constexpr, offset: tl.constexpr,
              ACT: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    me = tl.program_id(0)
    col = tl.program_id(1) * N + tl.arange(0, N)
    sum_g = tl.zeros([N], WIDE)
    sum_u = tl.zeros([N], WIDE)
    for start in range(me * R, rows, tl.num_programs(0) * R):
        row = (start + tl.arange(0, R)).to(tl.int64)
        inside = (row[:, None] < rows) & (col[None, :] < n)
        at = row[:, None] * n + col[None, :]
        d = tl.load(dy + at, mask=inside, other=0.0).to(WIDE)
        g = tl.load(gate + row[:, None] * of_gate + col[None, :], mask=inside, other=0.0).to(WIDE)
        if gate_bias is not None:
            g += tl.load(gate_bias + col, mask=col < n, other=0.0).to(WIDE)[None, :]
        clamped = g
        if clamp is not None:
            clamped = tl.where(g > clamp, clamp, g)
        y, slope = _act(clamped, ACT)
        if up is not None:
            u = tl.load(up + row[:, None] * of_up + col[None, :], mask=inside, other=0.0).to(WIDE)
            if up_bias is not None:
                u += tl.load(up_bias + col, mask=col < n, other=0.0).to(WIDE)[None, :]
            bounded = u
            if clamp is not None:
                bounded = tl.where(u > clamp, clamp, tl.where(u < -clamp, -clamp, u))
        if weights is not None:
            own = d * y
            if up is not None:
                own = own * (bounded + offset)
            own = tl.sum(tl.where(inside, own, 0.0), 1)
            tl.store(dweights + tl.program_id(1) * rows + row, own, mask=row < rows)
            d = d * tl.load(weights + row, mask=row < rows, other=0.0).to(WIDE)[:, None]
        if up is not None:
            of_u = d * y
            if clamp is not None:
                of_u = tl.where((u > clamp) | (u < -clamp), 0.0, of_u)
            tl.store(dup + at, of_u.to(dup.dtype.element_ty), mask=inside)
            sum_u += tl.sum(tl.where(inside, of_u, 0.0), 0)
            d = d * (bounded + offset)
        d = d * slope
        if clamp is not None:
            d = tl.where(g > clamp, 0.0, d)
        tl.store(dgate + at, d.to(dgate.dtype.element_ty), mask=inside)
        sum_g += tl.sum(tl.where(inside, d, 0.0), 0)
    if gate_bias is not None:
        tl.store(dgate_bias + me * n + col, sum_g, mask=col < n)
    if up_bias is not None:
        tl.store(dup_bias + me * n + col, sum_u, mask=col < n)


TILE = MappingProxyType({"R": 4, "N": 512})  # rows and columns of a program's tile


def fill_forward(y: Tensor, gate: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None,
                 weights: Tensor | None, act: str, clamp: float | None, offset: float) -> None:
    """Run the forward kernel."""
    g, u, n = rows_of(gate), None if up is None else rows_of(up), gate.shape[-1]
    others = [t if t is None else t.contiguous() for t in (gate_bias, up_bias, weights)]
    _forward[-(-len(g) // TILE["R"]), -(-n // TILE["N"])](
        g, u, *others, y, len(g), n, g.stride(0), 0 if u is None else u.stride(0), clamp, offset,
        ACT=act, WIDE=wide(gate), **TILE)


def empty_backward(gate: Tensor, up: Tensor | None, gate_bias: Tensor | None, up_bias: Tensor | None, weights: Tensor | None,
                   dy: Tensor, act: str, clamp: float | None, offset: float) -> tuple[Tensor, ...]:
    """Gradients of gate and up; of the biases the sums of each program, of the weights those of each block of columns."""
    n, accumulate = gate.shape[-1], torch.promote_types(gate.dtype, torch.float32)
    dgate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    dup = torch.empty_like(dgate) if up is not None else dgate.new_empty(0)
    sums = [gate.new_empty((programs(gate), n) if b is not None else 0, dtype=accumulate) for b in (gate_bias, up_bias)]
    shape = (-(-n // TILE["N"]), *gate.shape[:-1])
    return dgate, dup, *sums, gate.new_empty(shape if weights is not None else 0, dtype=accumulate)


def fill_backward(out: tuple[Tensor, ...], gate: Tensor, up: Tensor | None, gate_bias: Tensor | None,
                  up_bias: Tensor | None, weights: Tensor | None, dy: Tensor, act: str, clamp: float | None,
                  offset: float) -> None:
    """Run the backward kernel; without sums over rows a program has one block of rows."""
    g, u, n = rows_of(gate), None if up is None else rows_of(up), gate.shape[-1]
    others = [t if t is None else t.contiguous() for t in (gate_bias, up_bias, weights, dy)]
    summed = gate_bias is not None or up_bias is not None
    _backward[programs(gate) if summed else -(-len(g) // TILE["R"]), -(-n // TILE["N"])](
        g, u, *others, *out, len(g), n, g.stride(0), 0 if u is None else u.stride(0), clamp, offset,
        ACT=act, WIDE=wide(gate), **TILE)


def empty_forward(gate: Tensor, *_: object) -> Tensor:
    """y."""
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


SHARED = "Tensor gate, Tensor? up, Tensor? gate_bias, Tensor? up_bias, Tensor? weights, "
OPTIONS = "str act, float? clamp, float offset"
FORWARD = op("activation", f"({SHARED}{OPTIONS}) -> Tensor", empty_forward, fill_forward)
BACKWARD = op("activation_backward", f"({SHARED}Tensor dy, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
              empty_backward, fill_backward)
