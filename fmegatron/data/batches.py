"""Batches: rows of samples as tensors. Which rows a step sees is a function of how many samples came before it.

    batch_at(samples, consumed, global_batch)     samples consumed … consumed + global_batch - 1
    rows_at(samples, numbers)                     any of them: a data-parallel rank reads its own rows only

A batch: tokens, labels, positions, documents int64 [batch, seq]; weights float32 [batch, seq]; sample int64 [batch].
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fmegatron.data.prefetch import prefetch
from fmegatron.data.samples import HeldOut, Row

Batch = dict[str, Tensor]
Batches = Generator[Batch, None, None]  # close() ends its thread, as does dropping it
Place = Callable[[str, Tensor, str], Tensor]  # (key, global rows, names) -> what this rank holds of them

NAMES = dict.fromkeys(("tokens", "labels", "weights", "positions", "documents"), "batch seq") | {"sample": "batch"}


class Rows(Protocol):
    """Samples or HeldOut: anything that makes a row from its number."""

    def row(self, number: int) -> Row: ...


def rows_at(samples: Rows, numbers: Iterable[int]) -> Batch:
    """The rows of these sample numbers, in this order."""
    rows = [samples.row(number) for number in numbers]
    return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in NAMES}


def batch_at(samples: Rows, consumed: int, global_batch: int) -> Batch:
    """The global batch that follows `consumed` samples."""
    return rows_at(samples, range(consumed, consumed + global_batch))


def batches(
    samples: Rows,
    global_batch: int,
    consumed: int = 0,
    *,
    place: Place | None = None,
    rows: Sequence[int] | None = None,
    ahead: int = 2,
) -> Batches:
    """Training batches without end, starting after `consumed` samples and made ahead by a background thread.

    `rows` are those of the global batch to read (all, unless given); `place(key, tensor, names)` puts each tensor where
    it belongs, in the caller's thread.
    """
    if global_batch < 1 or consumed < 0:
        raise ValueError(f"global_batch {global_batch} must be at least 1, consumed {consumed} at least 0")
    chosen = range(global_batch) if rows is None else rows
    starts = _count(consumed, global_batch)
    return _placed((rows_at(samples, (start + row for row in chosen)) for start in starts), place, ahead)


def held_out_batches(
    held_out: HeldOut, *, place: Place | None = None, rows: Sequence[int] | None = None, ahead: int = 2
) -> Batches:
    """The held-out split once, as batches of one size; `place` and `rows` as in `batches`."""
    chosen = range(held_out.batch) if rows is None else rows
    return _placed((rows_at(held_out, (n[row] for row in chosen)) for n in held_out.numbers()), place, ahead)


def _placed(made: Iterator[Batch], place: Place | None, ahead: int) -> Batches:
    for batch in prefetch(made, ahead):
        yield {key: place(key, value, NAMES[key]) for key, value in batch.items()} if place else batch


def _count(start: int, step: int) -> Iterator[int]:
    while True:
        yield start
        start += step
