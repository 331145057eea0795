"""The fused step on leaves that do not lie in memory as they are computed with: load, compute, round, store, piece by piece.

A piece is some rows of a leaf seen as [rows, n]: never more than a piece's worth of fp32 moments and random bits exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmegatron import random, tree
from fmegatron.optim.base import Over, Tree
from fmegatron.optim.elementwise import Elementwise, draws_of
from fmegatron.optim.formats import Format, Split, join, split

Kernel = Callable[..., tuple[Tensor, ...]]
Where = tuple[Tensor, Tensor, tuple[Tensor, ...]]  # index of rows [..., 1], of columns [n], keys of the formats that draw
ROW = 64  # elements: a multiple of a block, and of every vector register's
PIECE = {"cpu": 1 << 17, "cuda": 1 << 23}


def joined(params: Tree) -> Tree:
    """Parameters as they are computed with."""
    return tree.map(join, params.high, params.low) if isinstance(params, Split) else params


def halved(params: Tree) -> Split:
    """fp32 parameters in two halves: the inverse of `joined`."""
    values, spec = tree.flatten(params)
    high, low = zip(*map(split, values), strict=True)
    return Split(spec.unflatten(high), spec.unflatten(low))


def where_of(forms: Sequence[Elementwise], states: Sequence[Tree], params: Tree, over: Over) -> list[Where]:
    """For each leaf: where its elements lie, and the keys of the roundings that draw."""
    keys: list[list[Tensor]] = []
    places: Any = ()
    for f, s in zip(forms, states, strict=True):
        if f.stored:
            draws = draws_of(s["count"], params, over)
            keys, places = keys + [draws.keys(slot) for slot in f.slots if f.format(slot).draws], draws.places
    n = len(tree.leaves(params))
    none = tree.leaves(params)[0].new_zeros((), dtype=torch.int64)
    places = places or [("", none[None, None], none[None])] * n
    return [(place[1], place[2], tuple(k[i] for k in keys)) for i, place in enumerate(places)]


def pack(kernel: Kernel, kinds: tuple[Format, ...]) -> Kernel:
    """The kernel between formats: (donate, g, vector, words, *arrays) -> new arrays. words: random ones of those that draw."""

    def run(donate: bool, g: Tensor, vector: Tensor, words: tuple[Tensor, ...], *arrays: Tensor) -> tuple[Tensor, ...]:
        held, at = [], 0
        for kind in kinds:
            held.append(arrays[at : at + len(kind.suffixes)])
            at += len(kind.suffixes)
        made = kernel(False, g, vector, *(kind.load(*own) for kind, own in zip(kinds, held, strict=True)))
        ok, rest = vector[1] > 0, iter(words)
        new: list[Tensor] = []
        for kind, x in zip(kinds, made, strict=True):
            new += kind.store(x, next(rest).reshape(x.shape) if kind.draws else x)
        chosen = [torch.where(ok, a, b) for a, b in zip(new, arrays, strict=True)]
        if not donate:
            return tuple(chosen)
        for b, a in zip(arrays, chosen, strict=True):
            b.copy_(a)
        return ()

    return run


def draw(index: Tensor, keys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A random word at each index for each key, int32. A kernel of its own: Inductor writes a hash out for each of its uses."""
    return tuple(random.bits(key, index).to(torch.int32) for key in keys)


def on_rows(
    kernels: tuple[Kernel, Kernel], eager: tuple[Kernel, Kernel], donate: bool, g: Tensor, vector: Tensor, where: Where,
    arrays: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """(draw, packed kernel) on one leaf's arrays; eagerly in one go what does not lie flat in memory.

    Compiled ones see rows of ROW elements, whatever the leaf's last dim, and any number of them: compiled once.
    """
    rows, columns, keys = where
    if not all(t.is_contiguous() for t in arrays):
        return eager[1](donate, g, vector, eager[0](rows + columns, keys), *arrays) or arrays
    n = g.shape[-1] if g.dim() else 1
    flat = [x.reshape(g.numel() // n, -1) for x in (g, *arrays)]
    rows = rows.reshape(-1, 1)
    rows = rows if len(rows) == len(flat[0]) else rows.expand(len(flat[0]), 1)
    whole = all(x.numel() == g.numel() for x in arrays)  # no blocks, which must not be cut
    step = max(1, PIECE[g.device.type if g.device.type in PIECE else "cpu"] // n)
    parts = []
    for part, *own in zip(rows.split(step), *(x.split(step) for x in flat), strict=True):
        index = part + columns
        even = (n if not whole else index.numel()) % ROW == 0 and index.numel() >= 2 * ROW  # one row is compiled for itself
        draws, run = kernels if even else eager
        if even:
            times = index.numel() // ROW
            index, *own = (x.reshape(times, -1) for x in (index, *own))
        words = draws(index, keys) if keys else ()
        parts.append(run(donate, own[0], vector, words, *own[1:]))
    if donate:
        return arrays
    return tuple(torch.cat([x.reshape(-1) for x in own]).view(old.shape)
                 for own, old in zip(zip(*parts, strict=True), arrays, strict=True))
