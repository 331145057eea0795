"""AdamW on many tensors in one launch, in place: each array is read once and written once, and nothing lies in between.

    g = factor g       m = m + (1 - b1) (g - m)       v = v + (1 - b2) (g^2 - v)
    p = p + step (m c1 / (sqrt(v c2) + eps) + decay each p)                      c1 = 1 / (1 - b1^t), c2 = 1 / (1 - b2^t)

vector = [factor, ok, c1, c2, decay, step, each], without decay [factor, ok, c1, c2, step]; of ok = 0 nothing is written.
Parameters are fp32 (or fp64), or bf16 with the 16 bits that they lack to the fp32 that is updated. Moments lie as they are,
or in fewer bits, rounded stochastically (the formats of optim/formats.py, by whose definition both ends are tested):

    bf16         the upper half of an fp32
    fp16, fp8    32 neighbours with one power of two; "root": the root of it

Random words are those of `fmegatron.random.bits` by (key of the moment, rows + columns), the same on every mesh. Source:
Loshchilov and Hutter 2019 (arXiv 1711.05101).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fmegatron.kernels.grad_norm import language
from fmegatron.kernels.launch import Form, Jit, wide
from fmegatron.kernels.multi import PIECE, integers, leaf_of, table_of

if TYPE_CHECKING:
    import triton.language as tl

Kind = Literal["same", "bf16", "fp16", "fp8", "fp8 root"]


@dataclass(frozen=True)
class Leaf:
    """What an update of one tensor reads, and, but for gradient and vector, writes.

    low: int16, of a bf16 parameter. shifts: int8 exponents of fp16 and fp8 moments, one for 32 elements. rows [numel / n],
    columns [n]: int64, whose sums are the elements' global indices; keys: 0-D int64 of the moments that draw.
    """

    grad: Tensor
    param: Tensor
    first: Tensor
    second: Tensor
    vector: Tensor
    low: Tensor | None = None
    first_shift: Tensor | None = None
    second_shift: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    first_key: Tensor | None = None
    second_key: Tensor | None = None


OPTIONAL = ("low", "first_shift", "second_shift", "rows", "columns", "first_key", "second_key")


@dataclass(frozen=True)
class Adam:
    """The numbers that are the same for all leaves, and how their moments lie."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decays: bool = True
    kinds: tuple[Kind, Kind] = ("same", "same")


def adamw(adam: Adam, leaves: Sequence[Leaf], *, form: Form = "reference") -> None:
    """One update in place of leaves that are alike in dtypes, contiguous. The reference takes moments of kind "same" only."""
    if form == "reference":
        for leaf in leaves:
            reference(adam, leaf)
        return
    held = [name for name in OPTIONAL if getattr(leaves[0], name) is not None]
    names = ["param", "grad", "first", "second", "vector", *held]
    table = table_of([[getattr(leaf, name) for leaf in leaves] for name in names])
    # where an optional array's addresses lie; -1: there is none
    at = {f"{name.upper()}": names.index(name) if name in held else -1 for name in OPTIONAL}
    columns = [leaf.columns.numel() for leaf in leaves if leaf.columns is not None]
    widths = integers(columns, leaves[0].param.device) if columns else None
    like = leaves[0]
    (b1, b2), (first, second) = adam.betas, adam.kinds
    _adamw[(table.programs,)](
        table.addresses, table.sizes, table.first, widths, table.leaves, b1, b2, adam.eps,
        DECAYS=adam.decays, FIRST=first, SECOND=second, P=language(like.param.dtype), G=language(like.grad.dtype),
        M=language(like.first.dtype), V=language(like.second.dtype), WIDE=wide(like.param), **at,
        LEAVES=table.wide, N=PIECE, num_warps=8)


def reference(adam: Adam, leaf: Leaf) -> None:
    """The update in torch."""
    assert adam.kinds == ("same", "same") and leaf.low is None, "formats have their reference in optim/packed.py"
    factor, ok, c1, c2, *decay, step = leaf.vector[: 5 + adam.decays]
    p, g = leaf.param, leaf.grad.to(leaf.param.dtype) * factor
    m, v = leaf.first.lerp(g, 1 - adam.betas[0]), leaf.second.lerp(g * g, 1 - adam.betas[1])
    u = m * c1 / ((v * c2).sqrt() + adam.eps)
    u = u + p * leaf.vector[-1] * decay[0] if adam.decays else u
    for old, new in ((p, p + u * step), (leaf.first, m), (leaf.second, v)):
        old.copy_(torch.where(ok > 0, new, old))


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
def _cut(x, bits, DROP: tl.constexpr):
    """fp32 to one of the two neighbours without the last DROP bits."""
    word = x.to(tl.int32, bitcast=True) + (bits & ((1 << DROP) - 1)).to(tl.int32)
    return (word & -(1 << DROP)).to(tl.float32, bitcast=True)


@Jit
def _rounded(x, bits, DROP: tl.constexpr, LEAST: tl.constexpr, STEPS: tl.constexpr):
    """The same, in even steps of 1 / STEPS below LEAST."""
    scaled = tl.abs(x) * STEPS
    low = tl.floor(scaled)
    up = (scaled - low) > (bits & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08
    small = (low + up.to(tl.float32)) * (1.0 / STEPS)
    return tl.where(tl.abs(x) < LEAST, tl.where(x < 0, -small, small), _cut(x, bits, DROP))


@Jit
def _power(shift, N: tl.constexpr):
    """2^shift of each block, for its 32 elements."""
    factor = ((shift.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.reshape(tl.broadcast_to(tl.reshape(factor, (N // 32, 1)), (N // 32, 32)), (N,))


@Jit
def _load(values, shifts, at, inside, KIND: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr):
    """A moment as it is computed with; shifts: where the exponents of the first block lie."""
    x = tl.load(values + at, mask=inside, other=0)
    if KIND == "same" or KIND == "bf16":
        return x.to(WIDE)
    else:
        block = tl.min(at, 0) // 32 + tl.arange(0, N // 32)
        has = tl.max(tl.reshape(inside.to(tl.int32), (N // 32, 32)), 1) > 0
        shift = tl.load(shifts + block, mask=has, other=0)
        if KIND == "fp16":
            y = x.to(tl.float32)
        else:
            code = x.to(tl.int32)
            size = code & 0x7F
            normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
            y = tl.where(size >= 8, normal, size.to(tl.float32) * 0.001953125)
            y = tl.where(size == 0x7F, float("nan"), tl.where(code >= 128, -y, y))
        y = y * _power(-shift.to(tl.int32), N)
        if KIND == "fp8 root":
            y = y * y
        return y


@Jit
def _store(x, bits, values, shifts, at, inside, KIND: tl.constexpr, DTYPE: tl.constexpr, N: tl.constexpr):
    if KIND == "same":
        tl.store(values + at, x.to(DTYPE), mask=inside)
    elif KIND == "bf16":
        tl.store(values + at, _cut(x.to(tl.float32), bits, 16).to(DTYPE), mask=inside)
    else:
        if KIND == "fp8 root":
            x = tl.sqrt(x)
        TOP: tl.constexpr = 14 if KIND == "fp16" else 7
        largest = tl.max(tl.reshape(tl.abs(x), (N // 32, 32)), 1)
        shift = TOP + 127 - (largest.to(tl.int32, bitcast=True) >> 23)
        shift = tl.minimum(tl.maximum(shift, -113), 120)
        block = tl.min(at, 0) // 32 + tl.arange(0, N // 32)
        has = tl.max(tl.reshape(inside.to(tl.int32), (N // 32, 32)), 1) > 0
        tl.store(shifts + block, shift.to(tl.int8), mask=has)
        x = x * _power(shift, N)
        if KIND == "fp16":
            tl.store(values + at, _rounded(x, bits, 13, 2.0**-14, 2.0**24).to(DTYPE), mask=inside)
        else:
            y = _rounded(x, bits, 20, 2.0**-6, 2.0**9)
            size = tl.abs(y)
            code = (size.to(tl.int32, bitcast=True) >> 20) - (120 << 3)
            code = tl.where(size < 0.015625, (size * 512.0).to(tl.int32), code)
            code = tl.where(size <= 448.0, code, 0x7F) + tl.where(y < 0, 128, 0)
            tl.store(values + at, code.to(DTYPE), mask=inside)


@Jit
def _adamw(addresses, sizes, starts, widths, count, b1: tl.constexpr, b2: tl.constexpr, eps: tl.constexpr,
           DECAYS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, P: tl.constexpr, G: tl.constexpr,
           M: tl.constexpr, V: tl.constexpr, WIDE: tl.constexpr, LOW: tl.constexpr, FIRST_SHIFT: tl.constexpr,
           SECOND_SHIFT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FIRST_KEY: tl.constexpr,
           SECOND_KEY: tl.constexpr, LEAVES: tl.constexpr, N: tl.constexpr):
    leaf = leaf_of(starts, count, LEAVES)
    start = (tl.program_id(0) - tl.load(starts + leaf)) * N
    at = start + tl.arange(0, N)
    vector = tl.load(addresses + 4 * count + leaf).to(tl.pointer_type(WIDE))
    inside = at < tl.load(sizes + leaf) * (tl.load(vector + 1) > 0).to(tl.int64)
    params = tl.load(addresses + leaf).to(tl.pointer_type(P))
    grads = tl.load(addresses + count + leaf).to(tl.pointer_type(G))
    first = tl.load(addresses + 2 * count + leaf).to(tl.pointer_type(M))
    second = tl.load(addresses + 3 * count + leaf).to(tl.pointer_type(V))
    first_shift, second_shift = first, second
    if FIRST_SHIFT >= 0:
        first_shift = tl.load(addresses + FIRST_SHIFT * count + leaf).to(tl.pointer_type(tl.int8))
    if SECOND_SHIFT >= 0:
        second_shift = tl.load(addresses + SECOND_SHIFT * count + leaf).to(tl.pointer_type(tl.int8))
    p = tl.load(params + at, mask=inside, other=0.0)
    if LOW >= 0:
        low = tl.load(addresses + LOW * count + leaf).to(tl.pointer_type(tl.int16))
        word = (p.to(tl.int16, bitcast=True).to(tl.int32) << 16) + tl.load(low + at, mask=inside, other=0).to(tl.int32)
        p = word.to(tl.float32, bitcast=True)
    g = tl.load(grads + at, mask=inside, other=0.0).to(WIDE) * tl.load(vector)
    m = _load(first, first_shift, at, inside, FIRST, WIDE, N)
    v = _load(second, second_shift, at, inside, SECOND, WIDE, N)
    m = m + (g - m) * (1 - b1)
    v = v + (g * g - v) * (1 - b2)
    u = m * tl.load(vector + 2) / (tl.sqrt(v * tl.load(vector + 3)) + eps)
    if DECAYS:
        u = u + p * tl.load(vector + 6) * tl.load(vector + 4)
    p = p + u * tl.load(vector + 4 + DECAYS)
    if LOW >= 0:
        word = p.to(tl.int32, bitcast=True)
        rest = word.to(tl.int16)
        high = ((word - rest.to(tl.int32)) >> 16).to(tl.int16)
        tl.store(params + at, high.to(P, bitcast=True), mask=inside)
        tl.store(low + at, rest, mask=inside)
    else:
        tl.store(params + at, p, mask=inside)
    index = at
    if ROWS >= 0:
        n = tl.load(widths + leaf)
        rows = tl.load(addresses + ROWS * count + leaf).to(tl.pointer_type(tl.int64))
        columns = tl.load(addresses + COLUMNS * count + leaf).to(tl.pointer_type(tl.int64))
        index = tl.load(rows + at // n, mask=inside, other=0) + tl.load(columns + at % n, mask=inside, other=0)
    first_bits, second_bits = index, index
    if FIRST_KEY >= 0:
        first_bits = _bits(tl.load(tl.load(addresses + FIRST_KEY * count + leaf).to(tl.pointer_type(tl.int64))), index)
    if SECOND_KEY >= 0:
        second_bits = _bits(tl.load(tl.load(addresses + SECOND_KEY * count + leaf).to(tl.pointer_type(tl.int64))), index)
    _store(m, first_bits, first, first_shift, at, inside, FIRST, M, N)
    _store(v, second_bits, second, second_shift, at, inside, SECOND, V, N)
