"""A mixture of sources whose weights are a schedule of the consumed samples; sample n is found without any state.

    Mixture([code, prose, maths], {0: (1, 8, 1), 1_000_000: (4, 4, 2), **ramp(2_000_000, 3_000_000, (4, 4, 2), (0, 1, 1))})

Of the first n samples, source i has given the integral of its share, rounded: which source sample n comes from, and which
of its own rows it is, is arithmetic. Sources are taken one by one: the first against all others, then the second
against those behind it, each time on a clock that counts the samples left. On its clock the first's count is
floor(integral + 1/2), which rises by 0 or 1 with each sample because its share lies in [0, 1]; all in whole numbers, so
exactly. Of two sources none is ever more than one sample away from its integral, of k none more than k - 1.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fmegatron.data.batches import Rows
from fmegatron.data.samples import Row

Weights = Sequence[float]

STEPS = 64  # of a ramp


@dataclass(frozen=True)
class Split:
    """One source against those behind it: stages of constant share, on the clock of the samples that reach them."""

    starts: tuple[Fraction, ...]  # of the stages, on this clock
    counts: tuple[Fraction, ...]  # of the source at these starts
    shares: tuple[Fraction, ...]

    def count(self, clock: int) -> int:
        """Samples of the source among the first `clock` that reach it."""
        if not self.starts:  # nothing ever reaches it
            return 0
        stage = max(bisect_right(self.starts, clock) - 1, 0)
        return (self.counts[stage] + (clock - self.starts[stage]) * self.shares[stage] + Fraction(1, 2)).__floor__()


class Mixture:
    """Rows without end from several sources of rows without end; `schedule`: weights from each number of samples on.

    Row: that of the source, with `sample` the number in the mixture. Raises ValueError for a schedule that does not begin at
    0, and for weights that are negative, all zero, or not one a source.
    """

    def __init__(self, sources: Sequence[Rows], schedule: Mapping[int, Weights] | Weights) -> None:
        stages = dict(schedule) if isinstance(schedule, Mapping) else {0: schedule}
        if not sources or 0 not in stages or min(stages) < 0:
            raise ValueError(f"a mixture of {len(sources)} sources from sample {min(stages, default=None)}: at least 1, from 0")
        for at, weights in stages.items():
            if len(weights) != len(sources) or min(weights) < 0 or not sum(weights):
                raise ValueError(f"weights {tuple(weights)} from sample {at}: {len(sources)} of them, not negative, not all 0")
        self.sources = tuple(sources)
        self._splits = _splits(dict(sorted(stages.items())))

    def where(self, number: int) -> tuple[int, int]:
        """(source, row of that source) of sample `number`."""
        if number < 0:
            raise ValueError(f"sample number {number}: must not be negative")
        clock = number
        for source, split in enumerate(self._splits):
            count = split.count(clock)
            if split.count(clock + 1) > count:
                return source, count
            clock -= count
        return len(self._splits), clock

    def counts(self, consumed: int) -> list[int]:
        """Rows that each source has given to the first `consumed` samples."""
        out, clock = list[int](), consumed
        for split in self._splits:
            out.append(split.count(clock))
            clock -= out[-1]
        return [*out, clock]

    def row(self, number: int) -> Row:
        """Sample `number`."""
        source, row = self.where(number)
        return self.sources[source].row(row) | {"sample": np.array(number)}


def ramp(start: int, stop: int, first: Weights, last: Weights, steps: int = STEPS) -> dict[int, tuple[float, ...]]:
    """Stages that lead from the weights `first` to `last` between two numbers of samples, in equal steps."""
    if not 0 <= start < stop or len(first) != len(last) or steps < 1:
        raise ValueError(f"a ramp from {start} to {stop} in {steps} steps, {len(first)} and {len(last)} weights")
    first, last = ([w / sum(weights) for w in weights] for weights in (first, last))
    parts = [i / steps for i in range(steps + 1)]
    return {
        start + round((stop - start) * part): tuple((1 - part) * a + part * b for a, b in zip(first, last, strict=True))
        for part in parts
    }


def _splits(stages: Mapping[int, Weights]) -> list[Split]:
    """Each source but the last against those behind it. A stage in which none of these has a share has no clock."""
    shares = [[Fraction(w) for w in weights] for weights in stages.values()]
    shares = [[w / sum(weights) for w in weights] for weights in shares]
    spans = [after - at for at, after in zip(stages, list(stages)[1:], strict=False)]
    splits = []
    for source in range(len(shares[0]) - 1):
        clock = count = Fraction(0)
        starts, counts, rates = [], [], []
        for weights, span in zip(shares, [*spans, 0], strict=True):
            left = sum(weights[source:], Fraction(0))
            if left:
                starts.append(clock)
                counts.append(count)
                rates.append(weights[source] / left)
            clock, count = clock + left * span, count + weights[source] * span
        splits.append(Split(tuple(starts), tuple(counts), tuple(rates)))
    return splits
