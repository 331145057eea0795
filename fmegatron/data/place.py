"""Batches on a mesh: processes that hold the same rows get them from one reader, and each keeps its part of the sequence.

for batch in batches(corpus, sh, seq=1024, global_batch=32, seed=0):
    state, metrics = step(state, batch)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from fmegatron.data.batches import Batches, Place
from fmegatron.data.batches import batches as rows_of
from fmegatron.data.corpus import Corpus
from fmegatron.data.share import Share, share_of
from fmegatron.sharding import Sharding, shard
from fmegatron.sharding.shard_map import stored


def batches(
    corpus: Corpus,
    sh: Sharding,
    *,
    seq: int,
    global_batch: int,
    seed: int = 0,
    consumed: int = 0,
    reset_positions: bool = False,
    ahead: int = 2,
) -> Batches:
    """Training batches of a corpus without end, as `sh` places them, starting after `consumed` samples.

    tokens, labels, positions, documents int64 and weights float32 [batch, seq], sample int64 [batch]: this process's shards,
    or with a leading dim of ranks where it holds all. Which samples a step sees does not depend on the mesh. All processes
    call this together.
    """
    share = share_of(sh)
    samples: Any = corpus.samples(seq, seed, reset_positions=reset_positions) if share is None or share.reads else None
    return rows_of(samples, global_batch, consumed, ahead=ahead, **reading(sh, share))


def reading(sh: Sharding, share: Share | None = None) -> dict[str, Any]:
    """Arguments of `data.batches.batches`: this process's rows, by whom they are read (None: itself), and where they go."""
    pin = sh.mesh.device.startswith("cuda")
    return {"place": placer(sh), "rows": partial(own_rows, sh), "pin": pin, "share": share}


def shards_of(sh: Sharding) -> int:
    """The number of parts that a batch is cut in."""
    return math.prod(sh.mesh[axis].size for axis in sh.placement("batch seq").of("batch"))


def size_of(sh: Sharding, batch: Mapping[str, Tensor]) -> tuple[int, int]:
    """Samples and tokens, padding counts, of the global batch that a placed one is part of."""
    x = batch["tokens"] if "tokens" in batch else max(batch.values(), key=lambda x: x.dim())
    rows, *seq = x.shape[1:] if sh.mesh.stacked else x.shape
    rows *= shards_of(sh)
    cut = math.prod(sh.mesh[axis].size for axis in sh.placement("batch seq").of("seq"))
    return rows, rows * seq[0] * cut if seq else rows


def own_rows(sh: Sharding, global_batch: int) -> range:
    """Rows of a global batch that this process reads. Raises ValueError where the batch does not divide."""
    shards = shards_of(sh)
    if global_batch % shards:
        legal = [n for n in (global_batch // shards * shards, -(-global_batch // shards) * shards) if n]
        raise ValueError(
            f"a global batch of {global_batch} samples does not divide over {shards} data-parallel ranks: "
            f"use {' or '.join(map(str, legal))}"
        )
    if sh.mesh.rank is None:
        return range(global_batch)
    here, index, share = sh.mesh.coordinates(sh.mesh.rank), 0, global_batch // shards
    for axis in sh.placement("batch seq").of("batch"):
        index = index * sh.mesh[axis].size + here[axis]
    return range(index * share, (index + 1) * share)


def placer(sh: Sharding) -> Place:
    """What takes the rows of `own_rows` to where they belong."""

    def place(key: str, x: Tensor, names: str) -> Tensor:
        if sh.mesh.stacked:
            return shard(sh, x, names, leaf=key)
        if sh.mesh.rank is not None:
            here, where = sh.mesh.coordinates(sh.mesh.rank), sh.placement(names)
            x = stored(sh, x, where.names)
            for dim, (name, axes) in enumerate(zip(where.names, where.axes, strict=True)):
                for axis in axes if name != "batch" else ():
                    if x.shape[dim] % sh.mesh[axis].size:
                        raise ValueError(
                            f"{name} of {x.shape[dim]} does not divide over mesh axis {axis!r} of {sh.mesh[axis].size}"
                        )
                    x = x.unflatten(dim, (sh.mesh[axis].size, -1)).select(dim, here[axis])
        return x.contiguous().to(sh.mesh.device, non_blocking=True)

    return place
