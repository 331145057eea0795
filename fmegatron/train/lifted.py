"""Checkpoints of replicas that go apart: each one's tensors, on a leading dim of replicas; and loading for another number.

    params.layers.7.attn.q    [replicas, 512, 512]    each replica's own
    outer.…, key, consumed                            equal on all replicas, hence kept once

Another number of replicas takes the mean of those that were saved: its first step is then one before which all have met,
whatever their periods. One replica, or a program that knows of none (`generate`, `convert`), reads the mean too. Counts are
the first replica's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.sharding import Sharding
from fmegatron.sharding.apart import inside, replicas
from fmegatron.sharding.chunks import Chunks
from fmegatron.train import checkpoint
from fmegatron.tree import Tree

ONCE = ("outer.", "key", "consumed")  # keys of what is equal on all replicas


def by_replica(sh: Sharding, state: Tree) -> Iterator[tuple[int, Sharding, Tree]]:
    """(replica, its sharding, its part of a state's tensors, as views) of each replica that this process holds."""
    one = inside(sh)
    if not sh.mesh.stacked:
        assert sh.mesh.rank is not None and sh.rules.apart is not None
        yield sh.mesh.coordinates(sh.mesh.rank)[sh.rules.apart], one, state
        return
    size = sh.mesh.size // replicas(sh)
    for r in range(replicas(sh)):
        yield r, one, tree.map(lambda x, r=r: x[r * size : (r + 1) * size], state)


def lift(own: Mapping[int, Mapping[str, Chunks]], count: int, copies: bool) -> dict[str, Chunks]:
    """{replica: its items} as items of all `count` replicas. copies: what is kept once is given by every replica."""
    out: dict[str, Chunks] = {}
    for r, items in own.items():
        for key, chunks in items.items():
            before = out[key].pieces if key in out else ()
            if key.startswith(ONCE):
                out[key] = Chunks(chunks.shape, before + (chunks.pieces if copies or r == 0 else ()))
            else:
                pieces = tuple(((r, *offsets), x[None]) for offsets, x in chunks.pieces)
                out[key] = Chunks((count, *chunks.shape), before + pieces)
    return out


def load(path: Any, wanted: Mapping[str, Chunks], count: int, say: Callable[[str], None]) -> dict[str, Any]:
    """`checkpoint.load` of one step's folder, for any number of replicas; count: replicas of `wanted`, 1 where not lifted."""
    held, plain, other = checkpoint.tensors(path), dict[str, Chunks](), dict[str, tuple[Chunks, int]]()
    for key, chunks in wanted.items():
        lifted = count > 1 and not key.startswith(ONCE)
        inner = _inner(chunks) if lifted else chunks
        shape = held[key][0] if key in held else tuple(chunks.shape)
        saved = shape[0] if len(shape) == len(inner.shape) + 1 else 1
        if saved == count or (saved == 1 and not lifted):
            plain[key] = chunks
        elif saved == 1:
            plain[key] = inner
        else:
            other[key] = inner, saved
    meta = checkpoint.load(path, plain, verify=False)
    if other:
        most = max(saved for _, saved in other.values())
        say(f"{path} is of {most} replicas, here are {count}: each goes on from their mean")
        _load_means(path, other, most)
    return meta


def _load_means(path: Any, wanted: Mapping[str, tuple[Chunks, int]], most: int) -> None:
    """Fill pieces with the mean over saved replicas, one replica after another."""
    for r in range(most):
        into: dict[str, Chunks] = {}
        for key, (chunks, saved) in wanted.items():
            if r < saved and (r == 0 or _adds(chunks.pieces)):
                fresh = tuple(((r, *at), (x if r == 0 else torch.empty_like(x))[None]) for at, x in chunks.pieces)
                into[key] = Chunks((saved, *chunks.shape), fresh)
        checkpoint.load(path, into, verify=False)
        for key, read in into.items() if r else ():
            for (_, x), (_, y) in zip(wanted[key][0].pieces, read.pieces, strict=True):
                x.add_(y[0])
    for chunks, saved in wanted.values():
        for _, x in chunks.pieces if _adds(chunks.pieces) else ():
            x.div_(saved)


def _adds(pieces: Sequence[tuple[Any, Tensor]]) -> bool:
    return all(x.is_floating_point() for _, x in pieces)


def _inner(chunks: Chunks) -> Chunks:
    """One replica's form of lifted chunks; pieces are views."""
    return Chunks(tuple(chunks.shape[1:]), tuple((at[1:], x[0]) for at, x in chunks.pieces))
