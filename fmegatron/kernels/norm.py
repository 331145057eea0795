"""RMSNorm and LayerNorm of rows, with the addition to the residual stream before them, in one pass over memory.

    h = x + residual                                            (h = x where there is no residual)
    rms      y =  h / sqrt(mean(h^2) + eps) * w
    layer    y = (h - mean(h)) / sqrt(var(h) + eps) * w + b     w = weight, or 1 + weight where it is zero-centred

Statistics are at least fp32. Sources: Zhang and Sennrich 2019 (arXiv 1910.07467); Ba et al. 2016 (arXiv 1607.06450).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fmegatron.kernels.launch import Form, Jit, Kernel, Tensors, op, power, programs, pull_of, wide

if TYPE_CHECKING:
    import triton.language as tl

WIDEST = 32768  # features of a row that one program holds; wider rows go to the reference


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    kind: Literal["rms", "layer"] = "rms",
    eps: float = 1e-5,
    centred: bool = False,
    form: Form = "reference",
) -> Tensor:
    """The norm of [..., n] over its last dim, weight and bias [n]; the result has x's dtype."""
    if form == "reference" or x.shape[-1] > WIDEST:
        return reference(x, weight, bias, kind=kind, eps=eps, centred=centred)
    return kernel(weight, bias, added=False, kind=kind, eps=eps, centred=centred)(x, weight, bias)[0]


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    kind: Literal["rms", "layer"] = "rms",
    eps: float = 1e-5,
    centred: bool = False,
    form: Form = "reference",
) -> tuple[Tensor, Tensor]:
    """(norm(h), h) of h = x + residual, both [..., n] of one dtype, to which h is rounded."""
    if form == "reference" or x.shape[-1] > WIDEST:
        return add_reference(x, residual, weight, bias, kind=kind, eps=eps, centred=centred)
    y, h = kernel(weight, bias, added=True, kind=kind, eps=eps, centred=centred)(x, weight, bias, residual)
    return y, h


# -- reference ------------------------------------------------------------------------------------------------------
def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, kind: str, eps: float, centred: bool) -> Tensor:
    """The norm in torch."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    weight = weight.to(h.dtype) if weight is not None else None
    weight = weight + 1.0 if weight is not None and centred else weight
    if kind == "layer":
        shift = bias.to(h.dtype) if bias is not None else None
        return torch.nn.functional.layer_norm(h, x.shape[-1:], weight, shift, eps).to(x.dtype)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def add_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Addition and norm in torch."""
    h = x + residual
    return reference(h, weight, bias, **options), h


def kernel(weight: Tensor | None, bias: Tensor | None, *, added: bool, kind: str, eps: float, centred: bool) -> Kernel:
    """The kernel of (x, weight, bias) -> (y,), or of (x, weight, bias, residual) -> (y, h)."""
    layer = kind == "layer"
    options: dict[str, Any] = {"kind": kind, "eps": eps, "centred": centred}
    moving = tuple(i for i, there in enumerate((True, weight is not None, bias is not None, added)) if there)
    alone = pull_of(partial(reference, **options), moving[: len(moving) - added], 3)

    def forward(x: Tensor, w: Tensor | None, b: Tensor | None, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        y, h, mean, rstd = FORWARD(x, residual, w, b, layer, eps, centred)
        return (y, h, mean, rstd) if added else (y, mean, rstd)

    def keep(inputs: Tensors, out: Tensors) -> Tensors:
        return out[1] if added else inputs[0], *inputs[1:3], *out[-2:]

    def backward(kept: Tensors, cotangents: Tensors) -> list[Any]:
        h, w, b, mean, rstd = kept
        dy = torch.zeros_like(h) if cotangents[0] is None else cotangents[0]  # type: ignore[arg-type]
        dx, dw, db = BACKWARD(h, w, mean, rstd, dy, cotangents[1] if added else None, layer, centred)
        sums = [d.sum(0).to(t.dtype) for t, d in ((w, dw), (b, db)) if t is not None]
        return [dx, *sums, *[dx] * added]

    def pull(kept: Tensors, cotangents: Tensors) -> list[Any]:
        dx, *sums = alone(kept, cotangents[:1])
        dx = dx if not added or cotangents[1] is None else dx + cotangents[1]
        return [dx, *sums, *[dx] * added]

    whole = (lambda x, w, b, residual: add_reference(x, residual, w, b, **options)) if added else partial(reference, **options)
    return Kernel(whole, forward, backward, 1 + added, moving, keep, pull)


# -- triton ---------------------------------------------------------------------------------------------------------
@Jit
def _forward(x, residual, w, b, y, h, mean, rstd, rows, n, eps,
                 LAYER: tl.constexpr, CENTRED: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    col = tl.arange(0, N)
    inside = (row[:, None] < rows) & (col[None, :] < n)
    at = row[:, None] * n + col[None, :]
    v = tl.load(x + at, mask=inside, other=0.0)
    if residual is not None:
        v = (v.to(WIDE) + tl.load(residual + at, mask=inside, other=0.0).to(WIDE)).to(v.dtype)
        tl.store(h + at, v, mask=inside)
    v = v.to(WIDE)
    if LAYER:
        middle = tl.sum(v, 1) / n
        tl.store(mean + row, middle, mask=row < rows)
        v = tl.where(inside, v - middle[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(v * v, 1) / n + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    v = v * scale[:, None]
    if w is not None:
        weight = tl.load(w + col, mask=col < n, other=0.0).to(WIDE)
        v = v * (weight + 1.0 if CENTRED else weight)[None, :]
    if b is not None:
        v = v + tl.load(b + col, mask=col < n, other=0.0).to(WIDE)[None, :]
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


@Jit
def _backward(h, w, mean, rstd, dy, dh, dx, dw, db, rows, n,
                  LAYER: tl.constexpr, CENTRED: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    me = tl.program_id(0)
    col = tl.arange(0, N)
    if w is not None:
        weight = tl.load(w + col, mask=col < n, other=0.0).to(WIDE)
        weight = weight + 1.0 if CENTRED else weight
    sum_w = tl.zeros([N], WIDE)
    sum_b = tl.zeros([N], WIDE)
    for start in range(me * R, rows, tl.num_programs(0) * R):
        row = (start + tl.arange(0, R)).to(tl.int64)
        inside = (row[:, None] < rows) & (col[None, :] < n)
        at = row[:, None] * n + col[None, :]
        v = tl.load(h + at, mask=inside, other=0.0).to(WIDE)
        g = tl.load(dy + at, mask=inside, other=0.0).to(WIDE)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        if LAYER:
            v = tl.where(inside, v - tl.load(mean + row, mask=row < rows, other=0.0)[:, None], 0.0)
        v = v * scale
        if w is not None:
            sum_w += tl.sum(g * v, 0)
            sum_b += tl.sum(g, 0)
            g = g * weight[None, :]
        out = g - v * (tl.sum(g * v, 1) / n)[:, None]
        if LAYER:
            out = out - (tl.sum(g, 1) / n)[:, None]
        out = out * scale
        if dh is not None:
            out = out + tl.load(dh + at, mask=inside, other=0.0).to(WIDE)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
    if w is not None:
        tl.store(dw + me * n + col, sum_w, mask=col < n)
        tl.store(db + me * n + col, sum_b, mask=col < n)


def tile(n: int, held: int) -> dict[str, int]:
    """Rows and columns of a program's tile, of about `held` elements, and its warps."""
    N = power(n)
    return {"R": max(1, held // N), "N": N, "num_warps": min(32, max(4, N // 1024))}


def empty_forward(x: Tensor, residual: Tensor | None, w: Tensor | None, b: Tensor | None, layer: bool, eps: float,
                  centred: bool) -> tuple[Tensor, ...]:
    """y, h (nothing without a residual), mean (nothing for rms), 1 / sqrt(variance)."""
    stats = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = torch.empty_like(y) if residual is not None else y.new_empty(0)
    return y, h, stats if layer else stats.new_empty(0), torch.empty_like(stats)


def fill_forward(out: tuple[Tensor, ...], x: Tensor, residual: Tensor | None, w: Tensor | None, b: Tensor | None,
                 layer: bool, eps: float, centred: bool) -> None:
    """Run the forward kernel."""
    n = x.shape[-1]
    rows = x.numel() // max(n, 1)
    tensors = [t if t is None else t.contiguous() for t in (x, residual, w, b)]
    shape = tile(n, 4096)
    _forward[(-(-rows // shape["R"]),)](
        *tensors, *out, rows, n, eps, LAYER=layer, CENTRED=centred, WIDE=wide(x), **shape)


def empty_backward(h: Tensor, w: Tensor | None, mean: Tensor, rstd: Tensor, dy: Tensor, dh: Tensor | None, layer: bool,
                   centred: bool) -> tuple[Tensor, ...]:
    """dx, and of each program the sums for weight and bias."""
    sums = rstd.new_empty((programs(h), h.shape[-1]) if w is not None else 0)
    return torch.empty_like(h, memory_format=torch.contiguous_format), sums, torch.empty_like(sums)


def fill_backward(out: tuple[Tensor, ...], h: Tensor, w: Tensor | None, mean: Tensor, rstd: Tensor, dy: Tensor,
                  dh: Tensor | None, layer: bool, centred: bool) -> None:
    """Run the backward kernel."""
    n = h.shape[-1]
    rows = h.numel() // max(n, 1)
    tensors = [t if t is None else t.contiguous() for t in (h, w, mean, rstd, dy, dh)]
    _backward[(programs(h),)](
        *tensors, *out, rows, n, LAYER=layer, CENTRED=centred, WIDE=wide(h), **tile(n, 2048))


FORWARD = op("norm", "(Tensor x, Tensor? residual, Tensor? w, Tensor? b, bool layer, float eps, bool centred)"
             " -> (Tensor, Tensor, Tensor, Tensor)", empty_forward, fill_forward)
BACKWARD = op("norm_backward", "(Tensor h, Tensor? w, Tensor mean, Tensor rstd, Tensor dy, Tensor? dh, bool layer,"
              " bool centred) -> (Tensor, Tensor, Tensor)", empty_backward, fill_backward)
