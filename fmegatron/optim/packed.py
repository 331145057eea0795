"""The fused step on leaves that do not lie in memory as they are computed with: load, compute, round, store, piece by piece.

A piece is some rows of a leaf seen as [rows, n]: never more than a piece's worth of fp32 moments and random bits exists.
"""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
from torch import Tensor

from fmegatron import random, tree
from fmegatron.optim.base import Tree
from fmegatron.optim.formats import Format, Split, join, split

Kernel = Callable[..., tuple[Tensor, ...]]
Draw = tuple[Tensor, Tensor, Tensor]  # index of rows [..., 1], of columns [n], keys [arrays' formats]
PIECE = {"cpu": 1 << 17, "cuda": 1 << 23}


def joined(params: Tree) -> Tree:
    """Parameters as they are computed with."""
    return tree.map(join, params.high, params.low) if isinstance(params, Split) else params


def halved(params: Tree) -> Split:
    """fp32 parameters in two halves: the inverse of `joined`."""
    values, spec = tree.flatten(params)
    high, low = zip(*map(split, values), strict=True)
    return Split(spec.unflatten(high), spec.unflatten(low))


def pack(kernel: Kernel, kinds: tuple[Format, ...]) -> Kernel:
    """The kernel between formats: (donate, g, vector, rows, columns, keys, *arrays) -> new arrays."""

    def run(
        donate: bool, g: Tensor, vector: Tensor, rows: Tensor, columns: Tensor, keys: Tensor, *arrays: Tensor
    ) -> tuple[Tensor, ...]:
        held, at = [], 0
        for kind in kinds:
            held.append(arrays[at : at + len(kind.suffixes)])
            at += len(kind.suffixes)
        made = kernel(False, g, vector, *(kind.load(*own) for kind, own in zip(kinds, held, strict=True)))
        index, ok, new = rows + columns, vector[1] > 0, list[Tensor]()
        for i, (kind, x) in enumerate(zip(kinds, made, strict=True)):
            new += kind.store(x, random.bits(keys[i], index).reshape(x.shape) if kind.draws else index)
        chosen = [torch.where(ok, a, b) for a, b in zip(new, arrays, strict=True)]
        if not donate:
            return tuple(chosen)
        for b, a in zip(arrays, chosen, strict=True):
            b.copy_(a)
        return ()

    # A code object of its own: torch.compile keeps its compilations, and its limit on them, by code object.
    return types.FunctionType(run.__code__.replace(), run.__globals__, "packed", None, run.__closure__)


def on_rows(
    kernel: Kernel, eager: Kernel, donate: bool, g: Tensor, vector: Tensor, draw: Draw, arrays: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """A packed kernel on one leaf's arrays; eagerly in one go what does not lie flat in memory."""
    rows, columns, keys = draw
    if not all(t.is_contiguous() for t in arrays):
        return eager(donate, g, vector, rows, columns, keys, *arrays) or arrays
    n = g.shape[-1] if g.dim() else 1
    flat = [x.reshape(g.numel() // n, -1) for x in (g, *arrays)]
    rows = rows.reshape(-1, 1)
    rows = rows if len(rows) == len(flat[0]) else rows.expand(len(flat[0]), 1)
    step = max(1, PIECE[g.device.type if g.device.type in PIECE else "cpu"] // n)
    parts = []
    for part, *own in zip(rows.split(step), *(x.split(step) for x in flat), strict=True):
        run = kernel if len(part) > 1 else eager
        mark = [own[0], part, *own[1:]] if run is not eager else []
        for x in mark:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        parts.append(run(donate, own[0], vector, part, columns, keys, *own[1:]))
    if donate:
        return arrays
    return tuple(torch.cat(x).view(old.shape) for x, old in zip(zip(*parts, strict=True), arrays, strict=True))
