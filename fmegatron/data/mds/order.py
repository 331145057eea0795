"""The order of an epoch: which sample stands at which position, as a pure function of (order, streams, epoch).

Positions are one line for all readers, whatever their number; a step takes the next global batch of them. These are the
samples that mosaicml-streaming's global batches have with the same options, seed and epoch, on any number of machines
that divides the canonical nodes (the last, incomplete batches of an epoch aside).

    random       every batch draws from all streams           stratified   every batch has each stream's share
    per_stream   every batch is of one stream
    device_per_stream   every `device_batch` rows of a batch are of one stream: mosaicml-streaming's on a single rank, where
                        theirs depends on the ranks there are; device batches follow each other in batches of any size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fmegatron.data.mds.partition import traversal
from fmegatron.data.mds.sampling import Drawn, Weight, choose, resample
from fmegatron.data.mds.shuffle import Ints, default_block_size, default_nodes, shuffle

BATCHING = ("random", "stratified", "per_stream", "device_per_stream")


@dataclass(frozen=True)
class Order:
    """How streams are mixed and shuffled; the fields are mosaicml-streaming's options of the same names."""

    shuffle_seed: int = 9176
    shuffle: bool = True
    shuffle_algo: str = "py1e"
    shuffle_block_size: int | None = None
    num_canonical_nodes: int | None = None
    epoch_size: int | None = None
    sampling_method: str = "balanced"
    sampling_granularity: int = 1
    batching_method: str = "random"
    device_batch: int | None = None  # not an option of theirs, see the module

    def __post_init__(self) -> None:
        if self.sampling_method not in ("balanced", "fixed"):
            raise ValueError(f"sampling_method {self.sampling_method!r}: known are balanced, fixed")
        if self.batching_method not in BATCHING:
            raise ValueError(f"batching_method {self.batching_method!r}: known are {', '.join(BATCHING)}")
        if (self.batching_method == "device_per_stream") != (self.device_batch is not None):
            said = f"batching_method {self.batching_method!r} and device_batch {self.device_batch}"
            raise ValueError(f"{said}: device_per_stream and the rows of a device batch go together")
        if self.shuffle_seed < 0:
            raise ValueError(f"shuffle_seed {self.shuffle_seed}: must not be negative")

    @property
    def nodes(self) -> int:
        """Canonical nodes."""
        return self.num_canonical_nodes or default_nodes(self.shuffle_algo)


class Part(NamedTuple):
    """A stream as an order sees it: the id of its first sample, the samples of its shards, and its weight."""

    first: int
    sizes: Ints
    weight: Weight


def epoch_order(order: Order, parts: Sequence[Part], epoch: int, batch: int) -> Ints:
    """Sample ids by position, int64 [positions]; every epoch has as many. `batch` matters to stratified and per_stream."""
    totals = [int(part.sizes.sum()) for part in parts]
    counts = choose([part.weight for part in parts], totals, order.epoch_size, order.shuffle_seed)
    fixed, apart = order.sampling_method == "fixed", order.batching_method != "random"
    drawn = resample(
        [part.sizes for part in parts],
        counts,
        order.shuffle_seed,
        epoch,
        granularity=order.sampling_granularity,
        fixed=fixed,
        shuffled=order.shuffle,
        apart=apart,
    )
    drawn = [Drawn(each.units, each.ids + part.first) for each, part in zip(drawn, parts, strict=True)]
    block = order.shuffle_block_size or default_block_size(order.nodes)
    if not apart:
        units, ids = (np.concatenate(columns) for columns in zip(*drawn, strict=True))
        return _line(order, Drawn(units, ids), epoch, block)
    shares = counts / counts.sum()
    lines = []
    for number, (each, share) in enumerate(zip(drawn, shares.tolist(), strict=True)):
        if not len(each.ids):
            raise ValueError(f"stream {number} gives an epoch no sample: drop it, or raise its weight")
        lines.append(_line(order, each, epoch, int(block * share)))
    if order.batching_method == "stratified":
        return _stratified(lines, shares, batch)
    seed = order.shuffle_seed + (epoch if order.shuffle and not fixed else 0)
    if order.device_batch is not None and batch % order.device_batch:
        raise ValueError(f"device_batch {order.device_batch} does not divide a batch of {batch} rows: use one that does")
    return _per_stream(lines, order.device_batch or batch, np.random.default_rng(seed))


def _line(order: Order, drawn: Drawn, epoch: int, block: int) -> Ints:
    places = traversal(len(drawn.ids), order.nodes)
    if order.shuffle:
        places = shuffle(order.shuffle_algo, drawn.units, order.nodes, order.shuffle_seed, epoch, block)[places]
    return drawn.ids[places]


def _stratified(lines: Sequence[Ints], shares: npt.NDArray[np.float64], batch: int) -> Ints:
    portions = (shares * batch).astype(np.int64)
    missing = batch - int(portions.sum())
    portions[np.flip(np.argsort(batch * shares - portions))[:missing]] += 1
    if not portions.all():
        raise ValueError(f"stream {int(portions.argmin())} has no sample in a batch of {batch}: raise the batch or its share")
    steps = min(len(line) // int(portion) for line, portion in zip(lines, portions, strict=True))
    if not steps:
        raise ValueError(f"the streams have fewer samples than a batch of {batch} takes of them: {portions.tolist()}")
    cut = [line[: steps * portion].reshape(steps, portion) for line, portion in zip(lines, portions.tolist(), strict=True)]
    return np.concatenate(cut, axis=1).reshape(-1)


def _per_stream(lines: Sequence[Ints], batch: int, rng: np.random.Generator) -> Ints:
    steps = [len(line) // batch for line in lines]
    if not all(steps):
        short = steps.index(0)
        raise ValueError(f"stream {short} has {len(lines[short])} samples in an epoch, less than a batch of {batch}")
    origin = np.repeat(np.arange(len(lines)), steps)
    rng.shuffle(origin)
    whole = np.concatenate([line[: count * batch].reshape(count, batch) for line, count in zip(lines, steps, strict=True)])
    place = np.empty(len(origin), np.int64)
    place[np.argsort(origin, kind="stable")] = np.arange(len(origin))
    return whole[place].reshape(-1)


def batch_rows(order: Order, start: int, batch: int) -> Ints:
    """Positions of the batch from position `start` on, by row: rows of one canonical node stand together.

    So ranks that read neighbouring rows read whole canonical nodes, whose shards are their own.
    """
    places = np.arange(start, start + batch)
    if order.batching_method != "random":
        return places
    return places[np.argsort(places % order.nodes, kind="stable")]
