"""Shuffles of an epoch that keep shards together, as pure functions of (seed, epoch); the orders are MosaicML's, to the bit.

All but naive: shards in an order drawn once from the seed are laid end to end and cut in equal parts, one a canonical node
(so a node always reads the same shards). The pieces of a part are reordered each epoch, and then their samples:

    py1s    each piece within itself            py2s    the same, and once before the cut, from the seed
    py1br   blocks of about `block_size` of a part, of random sizes and from a random start
    py1e    each piece's samples move by up to about half of `block_size` from where they are
    naive   all samples at once, whatever the shards
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Pieces(NamedTuple):
    """Runs of consecutive samples, in order: where each begins and its size; `parts`: pieces of each canonical node."""

    begins: Ints
    sizes: Ints
    parts: list[slice]


def shuffle(algo: str, shard_sizes: Ints, nodes: int, seed: int, epoch: int, block_size: int = 2**18) -> Ints:
    """Sample ids in the epoch's order, int64 [sum of shard_sizes]; `nodes` canonical nodes, block_size in samples.

    Raises ValueError for an unknown `algo`, fewer samples than nodes, or a block below 2.
    """
    if algo not in ALGORITHMS:
        raise ValueError(f"shuffle_algo {algo!r}: known are {', '.join(ALGORITHMS)}")
    sizes = np.asarray(shard_sizes, np.int64)
    if algo != "naive" and not 1 <= nodes <= sizes.sum():
        raise ValueError(f"{nodes} canonical nodes share {sizes.sum()} samples: choose 1 to {sizes.sum()} of them")
    if block_size < 2:
        raise ValueError(f"shuffle_block_size {block_size}: at least 2 samples")
    return ALGORITHMS[algo](sizes, nodes, seed, epoch, block_size)


def _naive(sizes: Ints, nodes: int, seed: int, epoch: int, block_size: int) -> Ints:
    return np.random.default_rng(seed + epoch).permutation(int(sizes.sum()))


def _py1s(sizes: Ints, nodes: int, seed: int, epoch: int, block_size: int) -> Ints:
    pieces, rng = _epoch_pieces(sizes, nodes, seed, epoch)
    return np.concatenate(_shuffled(pieces, rng))


def _py2s(sizes: Ints, nodes: int, seed: int, epoch: int, block_size: int) -> Ints:
    rng = np.random.default_rng(seed)
    order = _drawn(rng, len(sizes))
    whole = Pieces((np.cumsum(sizes) - sizes)[order], sizes[order], [])
    ids = np.concatenate(_shuffled(whole, rng))
    # From here on a piece is a run of this order, not of the ids.
    pieces = _cut(np.cumsum(whole.sizes) - whole.sizes, whole.sizes, nodes)
    rng = np.random.default_rng(seed + epoch)
    out = []
    for part in pieces.parts:
        order = part.start + _drawn(rng, part.stop - part.start)
        for begin, size in zip(pieces.begins[order], pieces.sizes[order], strict=True):
            run = ids[begin : begin + size]
            rng.shuffle(run)
            out.append(run)
    return np.concatenate(out)


def _py1br(sizes: Ints, nodes: int, seed: int, epoch: int, block_size: int) -> Ints:
    pieces, rng = _epoch_pieces(sizes, nodes, seed, epoch)
    ids = np.concatenate(_runs(pieces))
    least, most = int(0.75 * block_size), int(1.25 * block_size)
    late = rng.integers(0, least, (nodes,)).tolist()
    begin = 0
    for part, stagger in zip(pieces.parts, late, strict=True):
        end = begin + int(pieces.sizes[part].sum())
        at, blocks = begin, []
        while at < end:
            size = int(rng.integers(least, most))
            blocks.append((max(at - stagger, begin), min(at - stagger + size, end)))
            at += blocks[-1][1] - blocks[-1][0]
        for start, stop in blocks:
            rng.shuffle(ids[start:stop])
        begin = end
    return ids


def _py1e(sizes: Ints, nodes: int, seed: int, epoch: int, block_size: int) -> Ints:
    pieces, rng = _epoch_pieces(sizes, nodes, seed, epoch)
    least, most = int(0.75 * block_size), int(1.25 * block_size)
    out = []
    for part in pieces.parts:
        here = Pieces(pieces.begins[part], pieces.sizes[part], [])
        ids = np.concatenate(_shuffled(here, rng))
        places = np.arange(len(ids), dtype=np.float64)
        at = 0
        for size in here.sizes.tolist():
            reach = max((int(rng.integers(least, most)) - size) / 2, 0)
            low, high = max(-reach, -at), min(reach, len(ids) - at - size)
            places[at : at + size] += rng.uniform(low, high, size)
            at += size
        out.append(ids[np.argsort(places)])
    return np.concatenate(out)


def _epoch_pieces(sizes: Ints, nodes: int, seed: int, epoch: int) -> tuple[Pieces, np.random.Generator]:
    """The pieces in this epoch's order, and the epoch's generator as it stands then."""
    order = _drawn(np.random.default_rng(seed), len(sizes))
    pieces = _cut((np.cumsum(sizes) - sizes)[order], sizes[order], nodes)
    rng = np.random.default_rng(seed + epoch)
    order = np.concatenate([part.start + _drawn(rng, part.stop - part.start) for part in pieces.parts])
    return Pieces(pieces.begins[order], pieces.sizes[order], pieces.parts), rng


def _cut(begins: Ints, sizes: Ints, nodes: int) -> Pieces:
    """Runs cut where a canonical node ends: node k ends at sample `total * (k + 1) // nodes` of them laid end to end."""
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    stops = np.array([total * (node + 1) // nodes for node in range(nodes)], np.int64)
    edges = np.unique(np.concatenate([[0], ends, stops]))
    lows = edges[:-1]
    run = np.searchsorted(ends, lows, side="right")
    counts = np.bincount(np.searchsorted(stops, lows, side="right"), minlength=nodes)
    bounds = [0, *np.cumsum(counts).tolist()]
    parts = [slice(low, high) for low, high in zip(bounds, bounds[1:], strict=False)]
    return Pieces(begins[run] + lows - (ends - sizes)[run], np.diff(edges), parts)


def _runs(pieces: Pieces) -> list[Ints]:
    return [np.arange(begin, begin + size) for begin, size in zip(pieces.begins, pieces.sizes, strict=True)]


def _shuffled(pieces: Pieces, rng: np.random.Generator) -> list[Ints]:
    """The pieces' sample ids, each shuffled within itself."""
    runs = _runs(pieces)
    for run in runs:
        rng.shuffle(run)
    return runs


def _drawn(rng: np.random.Generator, size: int) -> Ints:
    order = np.arange(size)
    rng.shuffle(order)
    return order


ALGORITHMS: dict[str, Callable[[Ints, int, int, int, int], Ints]] = {
    "naive": _naive, "py1br": _py1br, "py1e": _py1e, "py1s": _py1s, "py2s": _py2s,
}  # fmt: skip


def default_block_size(nodes: int) -> int:
    """Samples in a block where none are named: 4 million over all canonical nodes, 2**18 at least."""
    return max(4_000_000 // nodes, 2**18)


def default_nodes(algo: str, physical: int = 1) -> int:
    """Canonical nodes where none are named: 64 a machine for the shuffles inside shards, otherwise 1 a machine."""
    return math.prod((64 if algo in ("py1s", "py2s") else 1, physical))
