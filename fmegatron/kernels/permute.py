"""Rows of tokens to their experts and back, by index: no one-hot matrices, and zeros where nothing goes.

    permute      rows[slot[t, j]] = x[t]                           slots of n or more are dropped choices
    unpermute    y[t] = sum_j weight[t, j] rows[slot[t, j]]        permute's transpose, at weight 1

Each is the other's backward, so second derivatives need no formula of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmegatron.kernels.launch import Form, Jit, Kernel, Tensors, op, power, wide

if TYPE_CHECKING:
    import triton.language as tl


def permute(x: Tensor, slot: Tensor, n: int, *, form: Form = "reference") -> Tensor:
    """x [t, d] to its slots [t, k] among n, no two alike below n: [n, d]."""
    return permute_reference(x, slot, n) if form == "reference" else permute_kernel(n)(x, slot)[0]


def unpermute(rows: Tensor, slot: Tensor, weight: Tensor, *, form: Form = "reference") -> Tensor:
    """Rows [n, d] back from slots [t, k], times weight [t, k] and added up: [t, d]."""
    return unpermute_reference(rows, slot, weight) if form == "reference" else UNPERMUTE(rows, slot, weight)[0]


def permute_reference(x: Tensor, slot: Tensor, n: int) -> Tensor:
    """`permute` in torch."""
    source = sources(slot, n)
    token = torch.where(source < 0, x.shape[0], source // slot.shape[1])
    return torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, token)


def unpermute_reference(rows: Tensor, slot: Tensor, weight: Tensor) -> Tensor:
    """`unpermute` in torch."""
    at = slot.clamp(max=rows.shape[0]).reshape(-1)
    found = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).index_select(0, at).unflatten(0, slot.shape)
    return (found * weight[..., None].to(rows.dtype)).sum(1)


def sources(slot: Tensor, n: int) -> Tensor:
    """For each of n rows the choice t * k + j that goes there, -1 where none does: int64 [n]."""
    choice = torch.arange(slot.numel(), device=slot.device)
    return slot.new_full((n + 1,), -1).scatter(0, slot.clamp(max=n).reshape(-1), choice)[:n]


def permute_kernel(n: int) -> Kernel:
    """The kernel of (x, slot)."""

    def forward(x: Tensor, slot: Tensor) -> tuple[Tensor, ...]:
        return (GATHER(x, slot, None, n),)

    def backward(kept: Tensors, cotangents: Tensors) -> list[Tensor]:
        return [COMBINE(cotangents[0], kept[0], None)]

    def pull(kept: Tensors, cotangents: Tensors) -> list[Tensor]:
        slot, dy = kept[0], cotangents[0]
        assert slot is not None and dy is not None
        return [unpermute_reference(dy, slot, dy.new_ones(slot.shape))]

    def whole(x: Tensor, slot: Tensor) -> Tensor:
        return permute_reference(x, slot, n)

    return Kernel(whole, forward, backward, 1, (0,), lambda xs, out: xs[1:], pull)


def unpermute_kernel() -> Kernel:
    """The kernel of (rows, slot, weight)."""

    def forward(rows: Tensor, slot: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (COMBINE(rows, slot, weight),)

    def backward(kept: Tensors, cotangents: Tensors) -> list[Tensor]:
        rows, slot, weight = kept
        assert rows is not None
        return [GATHER(cotangents[0], slot, weight, rows.shape[0]), DOTS(rows, slot, weight, cotangents[0])]

    def pull(kept: Tensors, cotangents: Tensors) -> list[Tensor]:
        rows, slot, weight = kept
        dy = cotangents[0]
        assert rows is not None and slot is not None and weight is not None and dy is not None
        n = rows.shape[0]
        source = sources(slot, n)
        scale = torch.where(source < 0, 0.0, weight.reshape(-1)[source.clamp(min=0)])
        found = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).index_select(0, slot.clamp(max=n).reshape(-1))
        drows = permute_reference(dy, slot, n) * scale[:, None].to(dy.dtype)
        return [drows, (found.unflatten(0, slot.shape) * dy[:, None]).sum(-1).to(weight.dtype)]

    return Kernel(unpermute_reference, forward, backward, 1, (0, 2), lambda xs, out: xs, pull)


UNPERMUTE = unpermute_kernel()


# -- triton ---------------------------------------------------------------------------------------------------------
@Jit
def _gather(x, source, weight, rows, k, d, stride, WIDE: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * N + tl.arange(0, N)
    choice = tl.load(source + row)
    v = tl.load(x + (choice // k) * stride + col, mask=(col < d) & (choice >= 0), other=0.0)
    if weight is not None:
        w = tl.load(weight + choice, mask=choice >= 0, other=0.0)
        v = tl.where(choice >= 0, v.to(WIDE) * w.to(WIDE), 0.0)
    tl.store(rows + row * d + col, v.to(rows.dtype.element_ty), mask=col < d)


@Jit
def _combine(rows, slot, weight, y, n, d, stride, WIDE: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros([N], WIDE)
    for j in range(K):
        at = tl.load(slot + token * K + j)
        v = tl.load(rows + at * stride + col, mask=(col < d) & (at < n), other=0.0).to(WIDE)
        if weight is not None:
            v = tl.where(at < n, v * tl.load(weight + token * K + j).to(WIDE), 0.0)
        total += v
    tl.store(y + token * d + col, total.to(y.dtype.element_ty), mask=col < d)


@Jit
def _dots(rows, slot, dy, dweight, n, d, stride, of_dy, WIDE: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    for j in range(K):
        at = tl.load(slot + token * K + j)
        total = tl.zeros([N], WIDE)
        for start in range(0, d, N):
            col = start + tl.arange(0, N)
            v = tl.load(rows + at * stride + col, mask=(col < d) & (at < n), other=0.0).to(WIDE)
            total += v * tl.load(dy + token * of_dy + col, mask=col < d, other=0.0).to(WIDE)
        tl.store(dweight + token * K + j, tl.where(at < n, tl.sum(total, 0), 0.0).to(dweight.dtype.element_ty))


def columns(d: int) -> int:
    """Columns of a program's tile."""
    return min(1024, power(d))


def empty_gather(x: Tensor, slot: Tensor, weight: Tensor | None, n: int) -> Tensor:
    """Rows."""
    return x.new_empty(n, x.shape[1])


def fill_gather(rows: Tensor, x: Tensor, slot: Tensor, weight: Tensor | None, n: int) -> None:
    """Launch, a program for each row and block of columns."""
    x, d = x if x.stride(1) == 1 else x.contiguous(), x.shape[1]
    weight = None if weight is None else weight.contiguous()
    _gather[n, -(-d // columns(d))](
        x, sources(slot, n), weight, rows, slot.shape[1], d, x.stride(0), WIDE=wide(x), N=columns(d))


def empty_combine(rows: Tensor, slot: Tensor, weight: Tensor | None) -> Tensor:
    """y."""
    return rows.new_empty(slot.shape[0], rows.shape[1])


def fill_combine(y: Tensor, rows: Tensor, slot: Tensor, weight: Tensor | None) -> None:
    """Launch, a program for each token and block of columns."""
    rows, d = rows if rows.stride(1) == 1 else rows.contiguous(), rows.shape[1]
    weight = None if weight is None else weight.contiguous()
    _combine[slot.shape[0], -(-d // columns(d))](
        rows, slot.contiguous(), weight, y, rows.shape[0], d, rows.stride(0), WIDE=wide(rows), K=slot.shape[1], N=columns(d))


def empty_dots(rows: Tensor, slot: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    """dweight."""
    return weight.new_empty(weight.shape)


def fill_dots(dweight: Tensor, rows: Tensor, slot: Tensor, weight: Tensor, dy: Tensor) -> None:
    """Launch, a program for each token."""
    rows, dy = (t if t.stride(1) == 1 else t.contiguous() for t in (rows, dy))
    d = rows.shape[1]
    _dots[(slot.shape[0],)](rows, slot.contiguous(), dy, dweight, rows.shape[0], d, rows.stride(0), dy.stride(0),
                            WIDE=wide(rows), K=slot.shape[1], N=columns(d))


GATHER = op("moe_gather", "(Tensor x, Tensor slot, Tensor? weight, int n) -> Tensor", empty_gather, fill_gather)
COMBINE = op("moe_combine", "(Tensor rows, Tensor slot, Tensor? weight) -> Tensor", empty_combine, fill_combine)
DOTS = op("moe_dots", "(Tensor rows, Tensor slot, Tensor weight, Tensor dy) -> Tensor", empty_dots, fill_dots)
