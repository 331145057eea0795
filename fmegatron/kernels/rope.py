"""Rotary positions of queries and keys in one launch: each pair of features is turned by its token's angle.

    (a, b) -> (a cos - b sin, b cos + a sin)      a pair is (x_i, x_{i + pairs}), or (x_{2i}, x_{2i+1}) if interleaved

The first 2 * pairs features turn, the others pass through. A rotation's backward is the rotation back, so nothing but the
angles is kept. Source: Su et al. 2021 (arXiv 2104.09864).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmegatron.kernels.launch import Form, Jit, Kernel, Tensors, op, power, wide

if TYPE_CHECKING:
    import triton.language as tl


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, form: Form = "reference"
) -> tuple[Tensor, Tensor]:
    """Queries and keys [batch, seq, heads, hd] turned by cos and sin [batch or 1, seq, 1, pairs]; no gradient of these."""
    if form == "reference":
        return reference(q, cos, sin, interleaved), reference(k, cos, sin, interleaved)
    y, z = kernel(interleaved)(q, k, cos, sin)
    return y, z


def reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """One tensor turned, in torch: in the angles' dtype, back in x's."""
    dims = 2 * cos.shape[-1]
    turned, rest = (x, None) if dims == x.shape[-1] else (x[..., :dims], x[..., dims:])
    pair = -1 if interleaved else -2
    a, b = turned.unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(pair)
    y = torch.stack((a * cos - b * sin, b * cos + a * sin), pair).flatten(-2).to(x.dtype)
    return y if rest is None else torch.cat((y, rest), -1)


def kernel(interleaved: bool) -> Kernel:
    """The kernel of (q, k, cos, sin)."""

    def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return reference(q, cos, sin, interleaved), reference(k, cos, sin, interleaved)

    def given(kept: Tensors, cotangents: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shapes, (cos, sin) = kept[:2], kept[2:]
        dq, dk = (x.new_zeros(x.shape[1:]) if ct is None else ct for x, ct in zip(shapes, cotangents, strict=True))  # type: ignore[union-attr]
        return dq, dk, cos, -sin  # type: ignore[operator, return-value]

    def keep(inputs: Tensors, out: Tensors) -> Tensors:
        return (*(x.new_empty((0, *x.shape)) for x in inputs[:2]), *inputs[2:])  # type: ignore[union-attr]

    def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(ROTATE(q, k, cos, sin, interleaved))

    def backward(kept: Tensors, cotangents: Tensors) -> tuple[Tensor, ...]:
        return forward(*given(kept, cotangents))

    return Kernel(both, forward, backward, 2, (0, 1), keep, lambda kept, cts: both(*given(kept, cts)))


# -- triton ---------------------------------------------------------------------------------------------------------
@Jit
def _turn(x, y, token, batch, seq, c, s, heads, of_batch, of_seq, of_head, hd, pairs,
          INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, H: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    """All heads of one token."""
    pair = tl.arange(0, P)
    for first in range(0, heads, H):
        head = first + tl.arange(0, H)
        source = x + batch * of_batch + seq * of_seq + head[:, None] * of_head
        target = y + (token * heads + head[:, None]) * hd
        at_a = 2 * pair if INTERLEAVED else pair
        at_b = at_a + 1 if INTERLEAVED else pair + pairs
        inside = (head[:, None] < heads) & (pair[None, :] < pairs)
        a = tl.load(source + at_a[None, :], mask=inside, other=0.0).to(WIDE)
        b = tl.load(source + at_b[None, :], mask=inside, other=0.0).to(WIDE)
        tl.store(target + at_a[None, :], (a * c - b * s).to(y.dtype.element_ty), mask=inside)
        tl.store(target + at_b[None, :], (b * c + a * s).to(y.dtype.element_ty), mask=inside)
        if D > 0:
            rest = 2 * pairs + tl.arange(0, D)
            inside = (head[:, None] < heads) & (rest[None, :] < hd)
            tl.store(target + rest[None, :], tl.load(source + rest[None, :], mask=inside, other=0.0), mask=inside)


@Jit
def _rotate(q, k, cos, sin, y, z, length, q_heads, k_heads, q_batch, q_seq, q_head, k_batch, k_seq, k_head,
            t_batch, t_seq, hd, pairs,
            INTERLEAVED: tl.constexpr, WIDE: tl.constexpr, H: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    batch = token // length
    seq = token % length
    pair = tl.arange(0, P)
    at = batch * t_batch + seq * t_seq + pair
    c = tl.load(cos + at, mask=pair < pairs, other=0.0).to(WIDE)[None, :]
    s = tl.load(sin + at, mask=pair < pairs, other=0.0).to(WIDE)[None, :]
    _turn(q, y, token, batch, seq, c, s, q_heads, q_batch, q_seq, q_head, hd, pairs, INTERLEAVED, WIDE, H, P, D)
    _turn(k, z, token, batch, seq, c, s, k_heads, k_batch, k_seq, k_head, hd, pairs, INTERLEAVED, WIDE, H, P, D)


def empty(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Both, turned."""
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))  # type: ignore[return-value]


def fill(out: tuple[Tensor, Tensor], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Run the kernel, one program a token."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, length, q_heads, hd = q.shape
    cos, sin = (t.contiguous().expand(batch, length, 1, t.shape[-1]) for t in (cos, sin))
    pairs = cos.shape[-1]
    P = power(pairs)
    _rotate[(batch * length,)](
        q, k, cos, sin, *out, length, q_heads, k.shape[2], *q.stride()[:3], *k.stride()[:3], *cos.stride()[:2], hd, pairs,
        INTERLEAVED=interleaved, WIDE=wide(q), H=min(power(q_heads), max(1, 2048 // P)),
        P=P, D=power(hd - 2 * pairs) if hd > 2 * pairs else 0)


ROTATE = op("rope", "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)", empty, fill)
