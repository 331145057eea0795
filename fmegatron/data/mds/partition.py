"""Which samples of an epoch each node, rank and worker reads, in MosaicML's arrangement: elastic across machines.

An epoch of `samples` is cut in rows, one a canonical node, and dealt column by column: position k * nodes + n is sample k of
node n. So the samples of any span of positions are the same on one machine and on many, and a machine reads whole rows
where canonical nodes divide over machines.

    partition(...)     int64 [machines, ranks, workers, batches, batch_size], -1 is padding
    traversal(...)     the same for one reader: all positions in order, int64 [nodes * ceil(samples / nodes)]
"""

from __future__ import annotations

import numpy as np

from fmegatron.data.mds.shuffle import Ints


def traversal(samples: int, nodes: int) -> Ints:
    """Sample indices by position; where `samples` does not divide over `nodes`, the shorter rows repeat their last."""
    return _rows(samples, nodes, nodes).T.reshape(-1)


def partition(
    algo: str,
    samples: int,
    nodes: int,
    machines: int,
    ranks: int,
    workers: int,
    batch_size: int,
    drop_first: int = 0,
    initial_machines: int | None = None,
) -> Ints:
    """The samples of each reader; drop_first of the epoch are left out.

    orig: canonical nodes divide over machines, or machines over canonical nodes. relaxed: any number of machines with the
    same global batch, once `initial_machines` is known. Raises ValueError otherwise.
    """
    if algo not in ("orig", "relaxed"):
        raise ValueError(f"partition_algo {algo!r}: known are orig, relaxed")
    if min(samples, nodes, machines, ranks, workers, batch_size) < 1 or drop_first < 0:
        raise ValueError(f"samples {samples}, nodes {nodes}, machines {machines}, ranks {ranks}, workers {workers}, "
                         f"batch_size {batch_size}: at least 1 each, drop_first {drop_first}: at least 0")  # fmt: skip
    devices = ranks * machines
    if samples + devices - samples % devices < drop_first:
        raise ValueError(f"cannot go on behind sample {drop_first} of an epoch of {samples}")
    fits = not max(nodes, machines) % min(nodes, machines)
    if algo == "relaxed" and not fits and initial_machines is not None:
        batch, first = devices * batch_size, initial_machines * ranks
        if batch % first:
            raise ValueError(f"a global batch of {batch} does not divide over the {first} ranks that the run began with")
        old = partition("orig", samples, nodes, initial_machines, ranks, workers, batch // first, drop_first)
        in_order = old.transpose(3, 2, 0, 1, 4).reshape(-1, workers, machines, ranks, batch_size)
        return in_order.transpose(2, 3, 1, 0, 4)
    if not fits:
        raise ValueError(f"{nodes} canonical nodes and {machines} machines: one must divide by the other")
    dealt = _rows(samples, nodes, machines).T.reshape(-1)
    ids = dealt[drop_first - drop_first % machines :].reshape(-1, machines).T
    split = _even(ids, ranks).reshape(machines, -1, ranks)
    short = -split.shape[1] % (workers * batch_size)
    padded = np.pad(split, ((0, 0), (0, short), (0, 0)), constant_values=-1).transpose(0, 2, 1)
    return padded.reshape(machines, ranks, -1, workers, batch_size).transpose(0, 1, 3, 2, 4)


def _rows(samples: int, nodes: int, machines: int) -> Ints:
    """Each canonical node's samples, int64 [nodes, width]: short rows repeat, so that the width divides over machines."""
    width = -(-samples // nodes)
    ratio = machines // nodes if nodes < machines else 1
    padded = -(-width // ratio) * ratio
    if samples < nodes or (samples == nodes and nodes < machines):
        return np.resize(np.arange(samples, dtype=np.int64), (nodes, padded))  # too few: over and over again
    begins = np.arange(nodes, dtype=np.int64) * samples // nodes
    ends = np.arange(1, nodes + 1, dtype=np.int64) * samples // nodes
    ids = begins[:, None] + np.arange(padded)
    ids[:, width - 1] -= ends - begins < width
    if extra := padded - width:
        ids[:, width:] = ids[:, width - extra - ratio + 1 : width - ratio + 1]
    return ids


def _even(ids: Ints, ranks: int) -> Ints:
    """Columns [machines, n] extended by earlier ones until they divide over the ranks of a machine."""
    count = ids.shape[1]
    missing = -count % ranks
    if not missing:
        return ids
    if ranks + missing - 1 <= count:
        again = ids[:, count - ranks - missing + 1 : count - ranks + 1]
    else:
        again = np.tile(ids, -(-missing // count))[:, :missing]
    return np.concatenate([ids, again], 1)
