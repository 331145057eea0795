"""What a cross-entropy needs of logits, in one pass over them: three numbers a token, of the columns that are here.

    x'  = cap tanh(m x / cap), or m x          m: multiplier, cap: soft-cap
    lse = logsumexp(x')      picked = x'[label], 0 where the label is not among these columns      total = sum(x')

From these the loss follows, with label smoothing and z-loss (`nn/losses.py`); where the vocabulary lies on several ranks
each has the three of its own columns, and their logsumexp and sums are the whole's. The backward,

    dx = (g_lse softmax(x') + g_picked [column = label] + g_total) dx'/dx,

reads the logits again and keeps no fp32 copy of them. `linear` makes the logits too, some rows at a time: none are stored,
and the backward makes them again. Source: Milakov and Gimelshein 2018 (arXiv 1805.02867) for the one pass.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmegatron.kernels.launch import Form, Jit, Kernel, Tensors, op, pull_of, rows_of, wide

if TYPE_CHECKING:
    import triton.language as tl

Stats = tuple[Tensor, Tensor, Tensor]
BLOCK = 4096  # columns of a program's tile
ROWS = 4096  # rows of logits that exist at a time in `linear`


def stats(
    x: Tensor, labels: Tensor, valid: Tensor | None = None, *, multiplier: float = 1.0, softcap: float | None = None,
    form: Form = "reference",
) -> Stats:
    """(lse, picked, total), at least fp32 [...], of logits x [..., columns] and labels [...], counted from the first column.

    valid: 0-D, so many columns are real, the others pads that count as -inf (and 0 in `total`).
    """
    if form == "reference":
        return reference(x, labels, valid, multiplier=multiplier, softcap=softcap)
    lse, picked, total = kernel(multiplier, softcap)(x, labels, valid)
    return lse, picked, total


def linear(
    h: Tensor, table: Tensor, labels: Tensor, valid: Tensor | None = None, *, multiplier: float = 1.0,
    softcap: float | None = None, form: Form = "reference", rows: int = ROWS,
) -> Stats:
    """`stats` of the logits h @ table.T of h [..., embed] and table [columns, embed]; only `rows` rows exist at a time."""
    if form == "reference":
        return reference(h @ table.T, labels, valid, multiplier=multiplier, softcap=softcap)
    lse, picked, total = linear_kernel(multiplier, softcap, rows)(h, table, labels, valid)
    return lse, picked, total


# -- reference ------------------------------------------------------------------------------------------------------
def reference(x: Tensor, labels: Tensor, valid: Tensor | None, *, multiplier: float, softcap: float | None) -> Stats:
    """The three in torch."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)) * multiplier
    x = x if softcap is None else softcap * (x / softcap).tanh()
    column = torch.arange(x.shape[-1], device=x.device)
    real = torch.ones_like(column, dtype=torch.bool) if valid is None else column < valid
    picked = torch.where((labels[..., None] == column) & real, x, torch.zeros_like(x)).sum(-1)
    total = torch.where(real, x, torch.zeros_like(x)).sum(-1)
    return torch.where(real, x, torch.full_like(x, float("-inf"))).logsumexp(-1), picked, total


def kernel(multiplier: float, softcap: float | None) -> Kernel:
    """The kernel of (x, labels, valid)."""
    whole = partial(reference, multiplier=multiplier, softcap=softcap)

    def forward(x: Tensor, labels: Tensor, valid: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(FORWARD(x, labels, valid, multiplier, softcap))

    def backward(kept: Tensors, cotangents: Tensors) -> list[Tensor]:
        x, labels, valid, lse = kept
        return [BACKWARD(x, labels, valid, lse, *filled(lse, cotangents), multiplier, softcap)]

    return Kernel(whole, forward, backward, 3, (0,), lambda xs, out: (*xs, out[0]), pull_of(whole, (0,), 3))


def linear_kernel(multiplier: float, softcap: float | None, rows: int) -> Kernel:
    """The kernel of (h, table, labels, valid)."""

    def whole(h: Tensor, table: Tensor, labels: Tensor, valid: Tensor | None) -> Stats:
        return reference(h @ table.T, labels, valid, multiplier=multiplier, softcap=softcap)

    def forward(h: Tensor, table: Tensor, labels: Tensor, valid: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(LINEAR(h, table, labels, valid, multiplier, softcap, rows))

    def backward(kept: Tensors, cotangents: Tensors) -> list[Tensor]:
        h, table, labels, valid, lse = kept
        return list(LINEAR_BACKWARD(h, table, labels, valid, lse, *filled(lse, cotangents), multiplier, softcap, rows))

    return Kernel(whole, forward, backward, 3, (0, 1), lambda xs, out: (*xs, out[0]), pull_of(whole, (0, 1), 4))


def filled(lse: Tensor | None, cotangents: Tensors) -> list[Tensor]:
    """Cotangents of the three, zeros where there is none."""
    assert lse is not None
    return [torch.zeros_like(lse) if ct is None else ct for ct in cotangents]


# -- triton ---------------------------------------------------------------------------------------------------------
@Jit
def _shape(x, multiplier: tl.constexpr, softcap: tl.constexpr):
    """x' and dx'/dx."""
    y = x * multiplier
    slope = tl.zeros_like(y) + multiplier
    if softcap is not None:
        t = 2.0 * tl.sigmoid(2.0 * y / softcap) - 1.0
        y = softcap * t
        slope = multiplier * (1.0 - t * t)
    return y, slope


@Jit
def _forward(x, labels, valid, lse, picked, total, stride, n, multiplier: tl.constexpr, softcap: tl.constexpr,
             WIDE: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    end = n
    if valid is not None:
        end = tl.minimum(n, tl.load(valid).to(tl.int32))
    peak = tl.full([1], float("-inf"), WIDE)
    mass = tl.zeros([1], WIDE)
    mine = tl.zeros([1], WIDE)
    added = tl.zeros([1], WIDE)
    for start in range(0, n, N):
        col = start + tl.arange(0, N)
        real = col < end
        v = tl.load(x + row * stride + col, mask=real, other=0.0).to(WIDE)
        v, _ = _shape(v, multiplier, softcap)
        mine += tl.sum(tl.where(real & (col == label), v, 0.0), 0)
        added += tl.sum(tl.where(real, v, 0.0), 0)
        v = tl.where(real, v, float("-inf"))
        new = tl.maximum(peak, tl.max(v, 0))
        base = tl.where((new == float("inf")) | (new == float("-inf")), 0.0, new)
        before = tl.where(mass == 0.0, 0.0, mass * tl.exp(tl.where(peak == float("inf"), 0.0, peak - base)))
        mass = before + tl.sum(tl.exp(v - base), 0)
        peak = new
    base = tl.where((peak == float("inf")) | (peak == float("-inf")), 0.0, peak)
    one = tl.arange(0, 1)
    tl.store(lse + row + one, tl.log(mass) + base)
    tl.store(picked + row + one, mine)
    tl.store(total + row + one, added)


@Jit
def _backward(x, labels, valid, lse, g_lse, g_picked, g_total, dx, stride, out_stride, n, multiplier: tl.constexpr,
              softcap: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * N + tl.arange(0, N)
    end = n
    if valid is not None:
        end = tl.minimum(n, tl.load(valid).to(tl.int32))
    real = col < end
    v = tl.load(x + row * stride + col, mask=real, other=0.0).to(WIDE)
    v, slope = _shape(v, multiplier, softcap)
    d = tl.load(g_lse + row) * tl.exp(v - tl.load(lse + row))
    d += tl.where(col == tl.load(labels + row), tl.load(g_picked + row), 0.0) + tl.load(g_total + row)
    d = tl.where(real, d * slope, 0.0)
    tl.store(dx + row * out_stride + col, d.to(dx.dtype.element_ty), mask=col < n)


def run_forward(out: Stats, x: Tensor, labels: Tensor, valid: Tensor | None, multiplier: float, softcap: float | None) -> None:
    """Launch the forward kernel, one program a row."""
    rows = rows_of(x)
    N = min(BLOCK, 1 << (rows.shape[1] - 1).bit_length())
    _forward[(len(rows),)](
        rows, labels.contiguous(), valid, *out, rows.stride(0), rows.shape[1], multiplier, softcap,
        WIDE=wide(x), N=N, num_warps=8)


def run_backward(
    dx: Tensor, x: Tensor, labels: Tensor, valid: Tensor | None, lse: Tensor, g_lse: Tensor, g_picked: Tensor, g_total: Tensor,
    multiplier: float, softcap: float | None,
) -> None:
    """Launch the backward kernel; dx may be x."""
    rows, given = rows_of(x), [t.contiguous() for t in (lse, g_lse, g_picked, g_total)]
    N = min(BLOCK, 1 << (rows.shape[1] - 1).bit_length())
    _backward[len(rows), -(-rows.shape[1] // N)](
        rows, labels.contiguous(), valid, *given, dx, rows.stride(0), rows_of(dx).stride(0), rows.shape[1], multiplier, softcap,
        WIDE=wide(x), N=N, num_warps=8)


def empty_stats(x: Tensor, *_: object) -> Stats:
    """Three numbers a row."""
    one = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return one, torch.empty_like(one), torch.empty_like(one)


def empty_dx(x: Tensor, *_: object) -> Tensor:
    """dx."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def fill_linear(out: Stats, h: Tensor, table: Tensor, labels: Tensor, valid: Tensor | None, multiplier: float,
                softcap: float | None, rows: int) -> None:
    """Logits of some rows, their three numbers, and on."""
    flat = zip(h.reshape(-1, h.shape[-1]).split(rows), labels.reshape(-1).split(rows),
               *(t.view(-1).split(rows) for t in out), strict=True)
    for piece, label, *numbers in flat:
        lse, picked, total = numbers
        run_forward((lse, picked, total), piece @ table.T, label, valid, multiplier, softcap)


def empty_linear(h: Tensor, table: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """dh and dtable."""
    return h.new_empty(h.shape), table.new_empty(table.shape)


def fill_linear_backward(
    out: tuple[Tensor, Tensor], h: Tensor, table: Tensor, labels: Tensor, valid: Tensor | None, lse: Tensor, g_lse: Tensor,
    g_picked: Tensor, g_total: Tensor, multiplier: float, softcap: float | None, rows: int,
) -> None:
    """Logits of some rows again, turned in place to their gradients; dtable is summed in fp32 at least."""
    dh, dtable = out
    pieces = [t.reshape(-1, h.shape[-1]).split(rows) for t in (h, dh)]
    numbers = [t.reshape(-1).split(rows) for t in (labels, lse, g_lse, g_picked, g_total)]
    total = torch.zeros_like(table, dtype=lse.dtype)
    for piece, dpiece, label, one, a, b, c in zip(*pieces, *numbers, strict=True):
        logits = piece @ table.T
        run_backward(logits, logits, label, valid, one, a, b, c, multiplier, softcap)
        torch.mm(logits, table, out=dpiece)
        total += logits.T @ piece
    dtable.copy_(total)


OPTIONS = "float multiplier, float? softcap"
GIVEN = "Tensor lse, Tensor g_lse, Tensor g_picked, Tensor g_total, "
FORWARD = op("cross_entropy", f"(Tensor x, Tensor labels, Tensor? valid, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
             empty_stats, run_forward)
BACKWARD = op("cross_entropy_backward", f"(Tensor x, Tensor labels, Tensor? valid, {GIVEN}{OPTIONS}) -> Tensor",
              empty_dx, run_backward)
LINEAR = op("linear_cross_entropy", f"(Tensor h, Tensor table, Tensor labels, Tensor? valid, {OPTIONS}, int rows)"
            " -> (Tensor, Tensor, Tensor)", empty_stats, fill_linear)
LINEAR_BACKWARD = op("linear_cross_entropy_backward", "(Tensor h, Tensor table, Tensor labels, Tensor? valid, "
                     f"{GIVEN}{OPTIONS}, int rows) -> (Tensor, Tensor)", empty_linear, fill_linear_backward)
