"""AdamW on many tensors in one launch, in place: five reads and up to four writes an element, and nothing in between.

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      u = (m / c1) / (sqrt(v / c2) + eps)
    p = p - rate (u + decay p)                              g is the gradient times `scale`; c1 = 1 - b1^t, c2 = 1 - b2^t

Parameters in bf16 may have a master in fp32, of which they are the rounding. Moments in bf16 are rounded stochastically, to
one of the two neighbours with a mean that is the value itself; the draws are those of `fmegatron.random.bits` by (key of the
leaf, index), hence the same bits as torch's form draws. Source: Loshchilov and Hutter 2019 (arXiv 1711.05101).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmegatron.kernels.grad_norm import language
from fmegatron.kernels.launch import Form, Jit, wide
from fmegatron.kernels.multi import PIECE, table_of

if TYPE_CHECKING:
    import triton.language as tl


@dataclass(frozen=True)
class Leaves:
    """Lists of tensors, one entry a leaf: parameters, gradients, both moments; masters of fp32 or none."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    first: Sequence[Tensor]
    second: Sequence[Tensor]
    masters: Sequence[Tensor] | None = None


def adamw(
    leaves: Leaves, numbers: Tensor, decay: Tensor, *, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
    keys: Tensor | None = None, bits: Sequence[Tensor] | None = None, form: Form = "reference",
) -> None:
    """One update in place. numbers: fp32 (or fp64) [rate, c1, c2, scale]; decay: the same, [leaves].

    keys: int64 [leaves], of the draws of bf16 moments; the reference takes what they draw, `bits`, one tensor a leaf. Without
    them bf16 is rounded to the nearest.
    """
    if form == "reference":
        return reference(leaves, numbers, decay, betas, eps, bits)
    roles = [leaves.params, leaves.grads, leaves.first, leaves.second, *([leaves.masters] if leaves.masters else [])]
    table = table_of(roles)
    kept = roles[4] if leaves.masters else leaves.params
    _adamw[(table.programs,)](
        table.addresses, table.sizes, table.leaf, table.start, numbers, decay, keys, len(leaves.params),
        betas[0], betas[1], eps, MASTER=leaves.masters is not None, P=language(leaves.params[0].dtype),
        G=language(leaves.grads[0].dtype), M=language(leaves.first[0].dtype), KEPT=language(kept[0].dtype),
        WIDE=wide(kept[0]), DRAW=keys is not None and leaves.first[0].dtype == torch.bfloat16, N=PIECE, num_warps=8)


def reference(leaves: Leaves, numbers: Tensor, decay: Tensor, betas: tuple[float, float], eps: float,
              bits: Sequence[Tensor] | None) -> None:
    """The update in torch, leaf by leaf."""
    rate, c1, c2, scale = numbers.unbind()
    kept = leaves.masters or leaves.params
    for i, (p, g, m, v) in enumerate(zip(kept, leaves.grads, leaves.first, leaves.second, strict=True)):
        dtype = torch.promote_types(p.dtype, torch.float32)
        g, old = g.to(dtype) * scale, p.to(dtype)
        new_m = betas[0] * m.to(dtype) + (1 - betas[0]) * g
        new_v = betas[1] * v.to(dtype) + (1 - betas[1]) * g * g
        u = (new_m / c1) / ((new_v / c2).sqrt() + eps)
        p.copy_(old - rate * (u + decay[i] * old))
        if leaves.masters:
            leaves.params[i].copy_(p)
        draw = bits is not None and m.dtype == torch.bfloat16
        m.copy_(rounded(new_m, bits[i]) if draw and bits is not None else new_m)
        v.copy_(rounded(new_v, bits[i] >> 16) if draw and bits is not None else new_v)


def rounded(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 to a bf16 below or above it, by 16 random bits; exact ones stay, and so does what is not finite."""
    word = ((x.float().view(torch.int32) + (bits & 0xFFFF).to(torch.int32)) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), word, x)


# -- triton ---------------------------------------------------------------------------------------------------------
@Jit
def _fold(word, odd):
    product = word * odd
    return (product ^ (product >> 31)) & 0xFFFFFFFF


@Jit
def _bits(key, index):
    """32 random bits of (key, index): fmegatron.random.bits."""
    a = key & 0xFFFFFFFF
    b = key >> 32
    word = _fold((index & 0xFFFFFFFF) ^ a, 0x5BD1E995)
    word = _fold(word ^ (b ^ ((index >> 32) & 0xFFFFFFFF)), 0x7FEB352D)
    return _fold(word ^ a, 0x6C8E9CF5)


@Jit
def _rounded(x, bits):
    x = x.to(tl.float32)
    word = (x.to(tl.int32, bitcast=True) + (bits & 0xFFFF).to(tl.int32)) & -65536
    return tl.where(tl.abs(x) < float("inf"), word.to(tl.float32, bitcast=True), x)


@Jit
def _adamw(addresses, sizes, leaves, starts, numbers, decays, keys, count,
           b1: tl.constexpr, b2: tl.constexpr, eps: tl.constexpr, MASTER: tl.constexpr, P: tl.constexpr, G: tl.constexpr,
           M: tl.constexpr, KEPT: tl.constexpr, WIDE: tl.constexpr, DRAW: tl.constexpr, N: tl.constexpr):
    me = tl.program_id(0)
    leaf = tl.load(leaves + me)
    at = tl.load(starts + me) + tl.arange(0, N)
    inside = at < tl.load(sizes + leaf)
    params = tl.load(addresses + leaf).to(tl.pointer_type(P))
    grads = tl.load(addresses + count + leaf).to(tl.pointer_type(G))
    first = tl.load(addresses + 2 * count + leaf).to(tl.pointer_type(M))
    second = tl.load(addresses + 3 * count + leaf).to(tl.pointer_type(M))
    rate = tl.load(numbers).to(WIDE)
    c1 = tl.load(numbers + 1).to(WIDE)
    c2 = tl.load(numbers + 2).to(WIDE)
    g = tl.load(grads + at, mask=inside, other=0.0).to(WIDE) * tl.load(numbers + 3).to(WIDE)
    m = b1 * tl.load(first + at, mask=inside, other=0.0).to(WIDE) + (1 - b1) * g
    v = b2 * tl.load(second + at, mask=inside, other=0.0).to(WIDE) + (1 - b2) * g * g
    u = (m / c1) / (tl.sqrt(v / c2) + eps)
    if MASTER:
        masters = tl.load(addresses + 4 * count + leaf).to(tl.pointer_type(KEPT))
        old = tl.load(masters + at, mask=inside, other=0.0).to(WIDE)
    else:
        old = tl.load(params + at, mask=inside, other=0.0).to(WIDE)
    new = old - rate * (u + tl.load(decays + leaf).to(WIDE) * old)
    tl.store(params + at, new.to(P), mask=inside)
    if MASTER:
        tl.store(masters + at, new.to(KEPT), mask=inside)
    if DRAW:
        bits = _bits(tl.load(keys + leaf), at)
        m = _rounded(m, bits)
        v = _rounded(v, bits >> 16)
    tl.store(first + at, m.to(M), mask=inside)
    tl.store(second + at, v.to(M), mask=inside)
