"""Batches: rows of samples as tensors. Which rows a step sees is a function of how many samples came before it.

    batch_at(samples, consumed, global_batch)     samples consumed … consumed + global_batch - 1
    rows_at(samples, numbers)                     any of them: a data-parallel rank reads its own rows only

A batch of text: tokens, labels, positions, documents int64 [batch, seq]; weights float32 [batch, seq]; sample int64
[batch]. Other rows may have other keys: of one dim they are "batch", of two "batch seq".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fmegatron.data.prefetch import prefetch
from fmegatron.data.samples import Row
from fmegatron.data.share import Share

Batch = dict[str, Tensor]
Batches = Generator[Batch, None, None]  # close() ends its threads, as does dropping it
Place = Callable[[str, Tensor, str], Tensor]  # (key, global rows, names) -> what this rank holds of them
Put = Callable[[Batch], Batch]
Own = Sequence[int] | Callable[[int], Sequence[int]]  # which rows of a global batch to read, or that by its size

NAMES = dict.fromkeys(("tokens", "labels", "weights", "positions", "documents"), "batch seq") | {"sample": "batch"}


class Rows(Protocol):
    """Anything that makes a row from its number."""

    def row(self, number: int) -> Row: ...


@runtime_checkable
class RowsOfSteps(Rows, Protocol):
    """Rows whose steps are of unequal size: the numbers of the step that `consumed` samples came before."""

    def step(self, consumed: int) -> range: ...


class FiniteBatches(Rows, Protocol):
    """Rows once, as batches of `batch` rows, padding included."""

    batch: int

    def numbers(self) -> Iterator[range]: ...


def rows_at(samples: Rows, numbers: Iterable[int], drop: Collection[str] = (), pin: bool = False) -> Batch:
    """The rows of these sample numbers, in this order, less the entries in `drop`.

    `pin`: in memory that a GPU copies from without waiting.
    """
    rows = [samples.row(number) for number in numbers]
    batch = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0] if key not in drop}
    return {key: value.pin_memory() for key, value in batch.items()} if pin else batch


def batch_at(samples: Rows, consumed: int, global_batch: int) -> Batch:
    """The global batch that follows `consumed` samples."""
    return rows_at(samples, range(consumed, consumed + global_batch))


def batches(
    samples: Rows,
    global_batch: int | Callable[[int], int] | None = None,
    consumed: int = 0,
    *,
    place: Place | None = None,
    rows: Own | None = None,
    drop: Collection[str] = (),
    ahead: int = 2,
    workers: int = 1,
    pin: bool = False,
    share: Share | None = None,
) -> Batches:
    """Training batches without end, starting after `consumed` samples and made ahead by background threads.

    `global_batch`: rows of a step, or that by the samples consumed before it; None: as many as `samples.step` says. `rows`
    are those of the global batch to read (all, unless given), `drop` the entries to leave out; `place(key, tensor, names)`
    puts each tensor where it belongs, in the caller's thread. A batch without "documents" lets attention cross from one
    document into the next. `share`: one process reads for several; on the others `samples` is not touched.
    """
    if (isinstance(global_batch, int) and global_batch < 1) or consumed < 0:
        raise ValueError(f"global_batch {global_batch} must be at least 1, consumed {consumed} at least 0")
    reads = share is None or share.reads
    if reads and global_batch is None and not isinstance(samples, RowsOfSteps):
        raise ValueError(f"{type(samples).__name__} has no steps of its own: give a global_batch")
    own = (_own(numbers, rows) for numbers in _steps(samples, global_batch, consumed))
    return _feed(samples, own, ahead, workers, drop, pin, partial(_put, place), share)


def held_out_batches(
    held_out: FiniteBatches | None,
    *,
    place: Place | None = None,
    rows: Own | None = None,
    drop: Collection[str] = (),
    ahead: int = 2,
    pin: bool = False,
    share: Share | None = None,
) -> Batches:
    """The held-out split once, as batches of one size; the rest as in `batches`. None: where another process reads it."""
    assert held_out is not None or (share is not None and not share.reads)
    own = (_own(numbers, rows) for numbers in held_out.numbers()) if held_out is not None else iter(())
    return _feed(held_out or _Elsewhere(), own, ahead, 1, drop, pin, partial(_put, place), share)


class _Elsewhere:
    def row(self, number: int) -> Row:
        raise AssertionError(f"row {number}: another process reads it")


def _feed(
    samples: Rows,
    own: Iterator[list[int]],
    ahead: int,
    workers: int,
    drop: Collection[str],
    pin: bool,
    put: Put,
    share: Share | None,
) -> Batches:
    make = partial(rows_at, samples, drop=drop, pin=pin)
    if share is None:
        return prefetch(make, own, ahead, workers, put)
    return (put(batch) for batch in share.spread(prefetch(make, own, ahead, workers), pin))


def _put(place: Place | None, batch: Batch) -> Batch:
    return {key: place(key, x, names(x)) for key, x in batch.items()} if place else batch


def names(x: Tensor) -> str:
    """The names of a batch's entry."""
    return "batch seq" if x.ndim == 2 else "batch"


def _own(numbers: range, rows: Own | None) -> list[int]:
    chosen = range(len(numbers)) if rows is None else rows(len(numbers)) if callable(rows) else rows
    return [numbers[row] for row in chosen]


def _steps(samples: Rows, global_batch: int | Callable[[int], int] | None, consumed: int) -> Iterator[range]:
    while True:
        if global_batch is None:
            assert isinstance(samples, RowsOfSteps)
            step = samples.step(consumed)
        else:
            size = global_batch(consumed) if callable(global_batch) else global_batch
            step = range(consumed, consumed + size)
        yield step
        consumed = step.stop
