"""How many samples an epoch draws from each stream and shard, and which: MosaicML's draws, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fmegatron.data.mds.shuffle import Ints


@dataclass(frozen=True)
class Weight:
    """What a stream adds to an epoch: a `proportion` of it, its samples `repeat` times, or `choose` samples. One of them.

    All streams have a proportion, or none has. None of the three: every sample once.
    """

    proportion: float | None = None
    repeat: float | None = None
    choose: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both set: a stream takes one of proportion, repeat, choose")
        if any(value < 0 for value in given.values()):
            raise ValueError(f"{next(iter(given))} = {next(iter(given.values()))}: must not be negative")


class Drawn(NamedTuple):
    """Samples of an epoch before they are shuffled: their ids, and the sizes of the runs that a shuffle treats as shards."""

    units: Ints
    ids: Ints


def choose(weights: Sequence[Weight], samples: Sequence[int], epoch_size: int | None, seed: int) -> Ints:
    """Samples of each stream in an epoch, int64 [streams]. `epoch_size` needs proportions, or no weights at all."""
    sizes = np.asarray(samples, np.int64)
    parts = [weight.proportion for weight in weights]
    if len({part is None for part in parts}) > 1:
        at = [part is None for part in parts].index(True)
        raise ValueError(f"stream {at} has no proportion, others have: give it to all streams or to none")
    if parts[0] is None and not (epoch_size and all(weight == Weight() for weight in weights)):
        if epoch_size:
            raise ValueError(f"epoch_size = {epoch_size} needs proportions; drop it, or repeat and choose")
        pairs = zip(weights, sizes.tolist(), strict=True)
        chosen = [int(w.repeat * n) if w.repeat is not None else n if w.choose is None else w.choose for w, n in pairs]
        return _some(np.array(chosen, np.int64))
    total = epoch_size or int(sizes.sum())
    shares = sizes.astype(np.float64) if parts[0] is None else np.array(parts, np.float64)
    if not shares.sum() > 0:
        raise ValueError("all proportions are zero: at least one stream needs more")
    counts = (total * (shares / shares.sum())).astype(np.int64)
    left = total - int(counts.sum())
    counts[np.random.default_rng(seed).choice(len(shares), left, False)] += 1
    return _some(counts)


def _some(counts: Ints) -> Ints:
    if not counts.sum():
        raise ValueError("the streams give an epoch no sample: raise proportion, repeat, choose or epoch_size")
    return counts


def of_shards(sizes: Ints, count: int, granularity: int, seed: int) -> Ints:
    """`count` samples dealt over the shards of a stream: whole rounds, then `granularity` at a time from drawn shards."""
    total = int(sizes.sum())
    rounds, left = divmod(count, total)
    out = sizes * rounds
    if not left:
        return out
    picks = -(-sizes // granularity)
    shard = np.repeat(np.arange(len(sizes)), picks)
    size = np.full(len(shard), granularity, np.int64)
    size[np.cumsum(picks) - 1] = sizes - (picks - 1) * granularity
    order = np.random.default_rng(seed).permutation(len(shard))
    upto = np.minimum(np.cumsum(size[order]), left)
    np.add.at(out, shard[order], np.diff(upto, prepend=0))
    return out


def resample(
    sizes: Sequence[Ints],
    counts: Ints,
    seed: int,
    epoch: int,
    *,
    granularity: int = 1,
    fixed: bool = False,
    shuffled: bool = True,
    apart: bool = False,
) -> list[Drawn]:
    """The epoch's samples of each stream: every shard whole as often as it fits, then some of it.

    sizes: samples of each shard, stream by stream; ids count from the stream's first sample. `fixed` draws the same every
    epoch. All streams draw from one generator, one after another, or `apart` each from its own.
    """
    if granularity < 1:
        raise ValueError(f"sampling_granularity {granularity}: at least 1")
    rng = np.random.default_rng(seed if fixed else seed + epoch)
    out = []
    for shards, count in zip(sizes, counts.tolist(), strict=True):
        rng = np.random.default_rng(seed if fixed else seed + epoch) if apart else rng
        chosen = of_shards(shards, count, granularity, seed + epoch if shuffled and not fixed else seed)
        units, ids, offset = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
        for size, wanted in zip(shards.tolist(), chosen.tolist(), strict=True):
            whole = np.arange(offset, offset + size)
            rounds, left = divmod(wanted, size)
            ids += [whole] * rounds
            units.append(np.array([size] * rounds + [left] * bool(left), np.int64))
            if left:
                ids.append(np.sort(offset + rng.choice(size, left, False)))
            offset += size
        out.append(Drawn(np.concatenate(units), np.concatenate(ids)))
    return out
