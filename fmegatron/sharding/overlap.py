"""Products whose operand or result travels along an axis, cut in chunks: one travels while another is multiplied.

    entry   x, a piece of seq on each rank     => gather chunk j+1 while chunk j is multiplied
            backward                           <= each chunk's cotangent is sent, and the weights' gradient computed meanwhile
    exit    a partial product                  => reduce_scatter chunk j while chunk j+1 is multiplied
            backward                           <= gather the cotangent's chunk j+1 while chunk j is multiplied

A chunk takes the same share of every rank's piece. Both are first-order functions for eager and compiled blocks; under a
torch.func transform `Sharding.einsum` is left whole. (Megatron-LM and Transformer Engine: "TP communication overlap".)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmegatron.sharding.bucket import issue
from fmegatron.sharding.collectives import AllGather, ReduceScatter
from fmegatron.sharding.einsum import Product, Weight, multiply


def in_chunks(
    products: Sequence[Product], x: Tensor, weights: Sequence[Tensor | Weight], rank: Tensor | None, chunks: int
) -> list[Tensor] | None:
    """The results of an einsum whose communication overlaps with its products; None where no collective stands beside them.

    Raises ValueError where the dim that travels does not divide into the chunks.
    """
    first = products[0]
    if any(p.right or p.left != first.left or not isinstance(w, Tensor) for p, w in zip(products, weights, strict=True)):
        return None
    if len(first.left) == 1 and isinstance(gather := first.left[0], AllGather) and not any(p.home for p in products):
        _check(x.shape[gather.dim], chunks, first.x[gather.dim])
        return list(_Entry.apply(tuple(products), gather, chunks, rank, x, *weights))
    if len(products) == 1 and not first.left and len(first.home) == 1 and isinstance(scatter := first.home[0], ReduceScatter):
        name = first.out[scatter.dim]
        if name not in first.x:
            return None
        _check(x.shape[first.x.index(name)] // scatter.axis.size, chunks, name)
        return [_Exit.apply(first, scatter, chunks, rank, x, weights[0])]
    return None


def _check(size: int, chunks: int, name: str) -> None:
    if size % chunks:
        legal = [n for n in range(1, size + 1) if size % n == 0]
        what = f"a rank's {size} of dim {name!r} do not divide into so many chunks"
        raise ValueError(f"async_tp = {chunks}: {what}, use one of {legal}")


def _pieces(x: Tensor, dim: int, ranks: int, chunks: int) -> list[Tensor]:
    """A whole dim's chunks, each with the same share of every rank's piece."""
    split = x.unflatten(dim, (ranks, chunks, -1))
    return [split.select(dim + 1, j).flatten(dim, dim + 1) for j in range(chunks)]


def _join(pieces: Sequence[Tensor], dim: int, ranks: int) -> Tensor:
    """The inverse of `_pieces`."""
    return torch.stack([x.unflatten(dim, (ranks, -1)) for x in pieces], dim + 1).flatten(dim, dim + 2)


def _transposed(p: Product) -> tuple[Product, Product]:
    """The products of a cotangent of the result: with w, the cotangent of x; and x with it, the cotangent of w."""
    return Product((), (), p.out, p.w, p.x, ()), Product((), (), p.x, p.out, p.w, ())


def _ahead(pieces: Sequence[Tensor], op: AllGather, rank: Tensor) -> Callable[[], Tensor]:
    """A function that gives the gathered pieces one by one, with the next always under way."""
    waiting = [issue(pieces[0], op, rank)]
    rest = list(pieces[1:])

    def take() -> Tensor:
        if rest:
            waiting.append(issue(rest.pop(0), op, rank))
        return waiting.pop(0)()

    return take


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, products: tuple[Product, ...], op: AllGather, chunks: int, rank: Tensor, x: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        n, take = op.axis.size, _ahead(x.chunk(chunks, op.dim), op, rank)
        gathered, parts = [], []
        for _ in range(chunks):
            gathered.append(take())
            parts.append([multiply(p, gathered[-1], w) for p, w in zip(products, weights, strict=True)])
        ctx.save_for_backward(rank, _join(gathered, op.dim, n), *weights)
        ctx.how = products, op, chunks
        name = products[0].x[op.dim]
        return tuple(_join(ys, p.out.index(name), n) for p, ys in zip(products, zip(*parts, strict=True), strict=True))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        products, op, chunks = ctx.how
        rank, whole, *weights = ctx.saved_tensors
        name, n = products[0].x[op.dim], op.axis.size
        pieces = [_pieces(ct, p.out.index(name), n, chunks) for p, ct in zip(products, cotangents, strict=True)]
        sent = []
        for cts in zip(*pieces, strict=True) if ctx.needs_input_grad[4] else ():
            back = [multiply(_transposed(p)[0], ct, w) for p, ct, w in zip(products, cts, weights, strict=True)]
            sent.append(issue(sum(back[1:], start=back[0]), op.transpose, rank))
        d_weights = [multiply(_transposed(p)[1], whole, ct) for p, ct in zip(products, cotangents, strict=True)]
        d_x = torch.cat([wait() for wait in sent], op.dim) if sent else None
        return None, None, None, None, d_x, *d_weights


class _Exit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Product, op: ReduceScatter, chunks: int, rank: Tensor, x: Tensor, w: Tensor) -> Tensor:
        at = product.x.index(product.out[op.dim])
        sent = [issue(multiply(product, part, w), op, rank) for part in _pieces(x, at, op.axis.size, chunks)]
        ctx.save_for_backward(rank, x, w)
        ctx.how = product, op, chunks, at
        return torch.cat([wait() for wait in sent], op.dim)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        product, op, chunks, at = ctx.how
        rank, x, w = ctx.saved_tensors
        n, take = op.axis.size, _ahead(cotangent.chunk(chunks, op.dim), AllGather(op.axis, op.dim), rank)
        to_x, to_w = _transposed(product)
        whole, parts = [], []
        for _ in range(chunks):
            whole.append(take())
            parts.append(multiply(to_x, whole[-1], w))
        return None, None, None, None, _join(parts, at, n), multiply(to_w, x, _join(whole, op.dim, n))
