"""Rows without end from rows that end, and rows left out: values with `row(number)`, nothing remembered between calls.

    Cycle(rows, seed)       number n is row n % len of epoch n // len, each epoch dealt in an order of its own
    Skip(rows, ranges)      the numbers in `ranges` are left out, those behind move up; SkipSteps: of steps of unequal size
    InOrder(rows, batch)    once, in order, as batches of one size: what validation reads
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np

from fmegatron.data.batches import Rows
from fmegatron.data.pack import Steps
from fmegatron.data.samples import Ints, Row, permutation


class FiniteRows(Rows, Protocol):
    """So many of them."""

    def __len__(self) -> int: ...


class Cycle:
    """Rows again and again: `row(number)` for any number >= 0, or for `epochs` times their count.

    Each epoch has each row once, in an order drawn from (seed, epoch), or always the given order with `shuffle` false.
    """

    def __init__(self, rows: FiniteRows, seed: int, *, shuffle: bool = True, epochs: int | None = None) -> None:
        if not len(rows):
            raise ValueError("no rows: nothing to repeat")
        self.rows, self.seed, self.shuffle, self.epochs = rows, seed, shuffle, epochs
        self._deals: dict[int, Ints] = {}
        self._lock = threading.Lock()

    def row_number(self, number: int) -> int:
        """Which of the rows sample `number` is, counted over all epochs. Raises ValueError beyond the last epoch."""
        epoch, index = divmod(number, len(self.rows))
        if number < 0 or (self.epochs is not None and epoch >= self.epochs):
            last = "without end" if self.epochs is None else self.epochs * len(self.rows) - 1
            raise ValueError(f"sample number {number}: they go from 0 to {last}; raise the number of epochs")
        return int(self._deal(epoch)[index]) if self.shuffle else index

    def row(self, number: int) -> Row:
        """Sample `number`."""
        return self.rows.row(self.row_number(number)) | {"sample": np.array(number)}

    def _deal(self, epoch: int) -> Ints:
        with self._lock:  # the last two epochs are kept: batches may straddle them
            if epoch not in self._deals:
                last = dict(list(self._deals.items())[-1:])
                self._deals = last | {epoch: permutation(len(self.rows), self.seed, epoch)}
            return self._deals[epoch]


class Skip:
    """Rows without those numbered in `ranges`, half-open pairs: sample n is the n-th that is left.

    The rows keep their own number under "sample". To jump over a bad stretch, name samples that the run has not
    consumed: what came before them stays as it was.
    """

    def __init__(self, rows: Rows, ranges: Sequence[tuple[int, int]]) -> None:
        merged: list[list[int]] = []
        for first, stop in sorted(ranges):
            if not 0 <= first < stop:
                raise ValueError(f"skip {first}:{stop}: first at least 0, and below stop")
            if merged and first <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], stop)
            else:
                merged.append([first, stop])
        self.rows = rows
        self._gone = list(accumulate((stop - first for first, stop in merged), initial=0))
        self._kept = [first - gone for (first, _), gone in zip(merged, self._gone, strict=False)]  # before each range

    def number(self, kept: int) -> int:
        """The sample number of the `kept`-th that is left."""
        return kept + self._gone[bisect_right(self._kept, kept)]

    def row(self, number: int) -> Row:
        """The `number`-th row that is left."""
        return self.rows.row(self.number(number))


class SkipSteps(Skip):
    """Rows of steps of unequal size without the steps that have a sample in `ranges`."""

    rows: Steps

    def __init__(self, rows: Steps, ranges: Sequence[tuple[int, int]]) -> None:
        super().__init__(rows, [(rows.around(first).start, rows.around(stop - 1).stop) for first, stop in ranges])

    def step(self, consumed: int) -> range:
        """The numbers of the next step's rows, as in `Steps`."""
        return range(consumed, consumed + len(self.rows.step(self.number(consumed))))


class InOrder:
    """Rows once, in order, `batch` at a time, `limit` at most; those beyond the last are padding that `rows` supplies."""

    bytes: int | None = None  # of text behind what is predicted: not known here

    def __init__(self, rows: FiniteRows, batch: int, limit: int | None = None) -> None:
        if not len(rows) or batch < 1 or (limit is not None and limit < 1):
            raise ValueError(f"{len(rows)} rows in batches of {batch}, limit {limit}: at least 1 of each")
        self.batch, self._rows = batch, rows
        self.rows = len(rows) if limit is None else min(len(rows), limit)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.rows // self.batch)

    def row(self, number: int) -> Row:
        """Row `number`; padding from `rows` on."""
        return self._rows.row(number if number < self.rows else len(self._rows)) | {"sample": np.array(number)}

    def numbers(self) -> Iterator[range]:
        """The row numbers of each batch, the last one's padding included."""
        return (range(i * self.batch, (i + 1) * self.batch) for i in range(len(self)))
