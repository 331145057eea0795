"""Rows in groups, each group times its own matrix: what experts compute, forward and backward.

    y[i] = rows[i] w[e]          rows of group e: counts[e] of them, one group after the other
    dw[e] = rows_e' dy_e         drows is the same product with w transposed

One launch; a program finds its group by adding up counts, so nothing is read back to the host, and rows behind the last group
are zeros. Products accumulate in fp32. fp64 goes to the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmegatron.kernels.launch import Form, Jit, Kernel, Tensors, op, pull_of

if TYPE_CHECKING:
    import triton.language as tl


def grouped_matmul(rows: Tensor, w: Tensor, counts: Tensor, *, form: Form = "reference") -> Tensor:
    """rows [n, a], w [groups, a, b], counts int64 [groups] -> [n, b]."""
    if form == "reference" or rows.dtype == torch.float64:
        return reference(rows, w, counts)
    return KERNEL(rows, w, counts)[0]


def reference(rows: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """All rows times all matrices, each row's own kept: no value is looked at, so every transform takes it."""
    group = torch.searchsorted(counts.cumsum(0), torch.arange(rows.shape[0], device=rows.device), right=True)
    own = group[:, None] == torch.arange(w.shape[0], device=rows.device)
    every = torch.einsum("na,gab->gnb", rows, w)
    return torch.where(own.T[..., None], every, torch.zeros_like(every)).sum(0)


def kernel() -> Kernel:
    """The kernel of (rows, w, counts)."""

    def forward(rows: Tensor, w: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        return (PRODUCT(rows, w, counts),)

    def backward(kept: Tensors, cotangents: Tensors) -> list[Tensor]:
        rows, w, counts = kept
        assert w is not None
        return [PRODUCT(cotangents[0], w.transpose(1, 2), counts), GRADIENT(rows, w, counts, cotangents[0])]

    return Kernel(reference, forward, backward, 1, (0, 1), lambda xs, out: xs, pull_of(reference, (0, 1), 3))


KERNEL = kernel()


# -- triton ---------------------------------------------------------------------------------------------------------
@Jit
def _product(rows, w, counts, y, n, a, b, groups, of_row, of_col, of_w, of_a, of_b,
             WIDEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    me = tl.program_id(0)
    group = -1
    before = 0
    first = 0
    tiles = 0
    for e in range(groups):  # tiles of groups before mine; the last ones are of rows behind all groups
        count = tl.load(counts + e).to(tl.int32)
        more = (count + M - 1) // M
        mine = (me >= tiles) & (me < tiles + more)
        group = tl.where(mine, e, group)
        first = tl.where(mine, before + (me - tiles) * M, first)
        before += count
        tiles += more
    end = before
    if group >= 0:
        end = 0
        for e in range(group + 1):
            end += tl.load(counts + e).to(tl.int32)
    else:
        first = before + (me - tiles) * M
        end = n
    row = (first + tl.arange(0, M)).to(tl.int64)
    col = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros([M, N], tl.float32)
    if group >= 0:
        own = w + tl.cast(group, tl.int64) * of_w
        for start in range(0, a, K):
            k = start + tl.arange(0, K)
            x = tl.load(rows + row[:, None] * of_row + k[None, :] * of_col,
                        mask=(row[:, None] < end) & (k[None, :] < a), other=0.0)
            m = tl.load(own + k[:, None] * of_a + col[None, :] * of_b,
                        mask=(k[:, None] < a) & (col[None, :] < b), other=0.0)
            if WIDEN:
                x = x.to(tl.float32)
                m = m.to(tl.float32)
            total = tl.dot(x, m, total, input_precision="ieee")
    inside = (row[:, None] < end) & (col[None, :] < b)
    tl.store(y + row[:, None] * b + col[None, :], total.to(y.dtype.element_ty), mask=inside)


@Jit
def _gradient(rows, dy, counts, dw, a, b, of_row, of_col, of_y, of_b,
              WIDEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    group = tl.program_id(2)
    first = 0
    for e in range(group):
        first += tl.load(counts + e).to(tl.int32)
    end = first + tl.load(counts + group).to(tl.int32)
    i = tl.program_id(0) * M + tl.arange(0, M)
    j = tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros([M, N], tl.float32)
    for start in range(first, end, K):
        row = (start + tl.arange(0, K)).to(tl.int64)
        x = tl.load(rows + row[None, :] * of_row + i[:, None] * of_col, mask=(row[None, :] < end) & (i[:, None] < a), other=0.0)
        g = tl.load(dy + row[:, None] * of_y + j[None, :] * of_b, mask=(row[:, None] < end) & (j[None, :] < b), other=0.0)
        if WIDEN:
            x = x.to(tl.float32)
            g = g.to(tl.float32)
        total = tl.dot(x, g, total, input_precision="ieee")
    at = tl.cast(group, tl.int64) * a * b + i[:, None] * b + j[None, :]
    tl.store(dw + at, total.to(dw.dtype.element_ty), mask=(i[:, None] < a) & (j[None, :] < b))


def tile(cuda: bool, itemsize: int) -> dict[str, int]:
    """Rows, columns and depth of a program's tile. In the interpreter: small, and fp32, since it has no product of bf16."""
    if not cuda:
        return {"WIDEN": True, "M": 16, "N": 16, "K": 16}
    return {"WIDEN": False, "M": 128, "N": 128, "K": 64 if itemsize == 2 else 32, "num_warps": 8, "num_stages": 3}


def empty_product(rows: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """y."""
    return rows.new_empty(rows.shape[0], w.shape[2])


def fill_product(y: Tensor, rows: Tensor, w: Tensor, counts: Tensor) -> None:
    """Launch: enough programs for a tile that is not full in each group and behind them."""
    (n, a), (groups, _, b), shape = rows.shape, w.shape, tile(rows.is_cuda, rows.element_size())
    _product[(-(-n // shape["M"]) + groups + 1) * (n > 0), -(-b // shape["N"])](
        rows, w, counts, y, n, a, b, groups, *rows.stride(), *w.stride(), **shape)


def empty_gradient(rows: Tensor, w: Tensor, counts: Tensor, dy: Tensor) -> Tensor:
    """dw."""
    return w.new_empty(w.shape)


def fill_gradient(dw: Tensor, rows: Tensor, w: Tensor, counts: Tensor, dy: Tensor) -> None:
    """Launch."""
    groups, a, b = w.shape
    shape = tile(rows.is_cuda, rows.element_size())
    _gradient[-(-a // shape["M"]), -(-b // shape["N"]), groups](
        rows, dy, counts, dw, a, b, *rows.stride(), *dy.stride(), **shape)


PRODUCT = op("grouped_matmul", "(Tensor rows, Tensor w, Tensor counts) -> Tensor", empty_product, fill_product)
GRADIENT = op("grouped_matmul_dw", "(Tensor rows, Tensor w, Tensor counts, Tensor dy) -> Tensor", empty_gradient, fill_gradient)
