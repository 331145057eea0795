"""Samples: rows of `seq` tokens and their labels, each a pure function of (seed, number).

    epoch e    documents in an order of their own, laid end to end:   | doc 7 | doc 2 | doc 9 | …
               cut every seq tokens; a row's labels reach one token into the next row
               rows dealt in an order of their own
    number n   row n % per_epoch, as dealt, of epoch n // per_epoch

Nothing is remembered between calls, so a resumed run, or one with another number of ranks, asks for the same numbers
and reads the same rows. `HeldOut` is the stream in the file's order, each token predicted exactly once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fmegatron.data.indexed import IndexedDataset

Row = dict[str, npt.NDArray[Any]]
Ints = npt.NDArray[np.int64]

PART = 2**20  # tokens counted at once


class Stream:
    """The sequences of a file in a given order, as one long text whose ids must be below `vocab_size`."""

    def __init__(self, data: IndexedDataset, order: Ints, vocab_size: int | None) -> None:
        self.data, self.vocab_size = data, vocab_size
        self.starts = np.zeros(len(order) + 1, np.int64)  # in this stream
        np.cumsum(data.lengths[order], out=self.starts[1:])
        self.shift = data.offsets[order] - self.starts[:-1]  # from here to the place in the file

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, first: int, stop: int) -> tuple[npt.NDArray[Any], Ints]:
        """Tokens [first, stop), and for each the running number, from 0, of its document."""
        low, high = np.searchsorted(self.starts, (first, stop - 1), side="right") - 1
        bounds = self.starts[low : high + 2].copy()
        bounds[0], bounds[-1] = first, stop
        counts = bounds[1:] - bounds[:-1]
        places = np.arange(first, stop) + np.repeat(self.shift[low : high + 1], counts)
        ids = self.data.stream[places]
        if self.vocab_size is not None and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(
                f"{self.data.prefix}: ids {ids.min()}..{ids.max()} near token {places[0]}, but the vocabulary ends at"
                f" {self.vocab_size - 1}: were these files made with another tokenizer?"
            )
        return ids, np.repeat(np.cumsum(counts > 0) - 1, counts)

    def row(self, first: int, seq: int, reset_positions: bool) -> Row:
        """The row whose first token is token `first`; beyond the end it is padding: zeros of weight 0."""
        stop = min(first + seq + 1, len(self))
        count = max(stop - first - 1, 0)
        tokens, labels, documents = (np.zeros(seq, np.int64) for _ in range(3))
        if count:
            text, numbers = self.read(first, stop)
            tokens[:count], labels[:count], documents[:count] = text[:-1], text[1:], numbers[:-1]
            documents[count:] = numbers[-2] + 1  # padding is a document of its own
        positions = np.arange(seq)
        if reset_positions:
            begins = np.zeros(seq, np.int64)
            begins[1:] = positions[1:] * (documents[1:] > documents[:-1])
            positions -= np.maximum.accumulate(begins)
        weights = (np.arange(seq) < count).astype(np.float32)
        return dict(tokens=tokens, labels=labels, weights=weights, positions=positions, documents=documents)


class Epoch(NamedTuple):
    """One pass over the data: its text in this epoch's order, and the order in which rows are dealt."""

    stream: Stream
    deal: Ints


class Samples:
    """Shuffled training rows, without end: `row(number)` for any number >= 0, from any thread.

    Row: tokens, labels, positions, documents int64 [seq], weights float32 [seq], sample int64 []. `documents` is a
    running number within the row; `positions` count from the row's start or, with `reset_positions`, from each
    document's. `documents`: the sequences to draw from, all unless given.
    The tokens left over at an epoch's end, fewer than seq and others each time, are dropped.
    """

    def __init__(
        self,
        data: IndexedDataset,
        seq: int,
        seed: int,
        *,
        reset_positions: bool = False,
        vocab_size: int | None = None,
        documents: Ints | None = None,
    ) -> None:
        self.documents = np.arange(len(data)) if documents is None else documents
        tokens = int(data.lengths[self.documents].sum(dtype=np.int64))
        if seq < 1 or tokens < seq + 1:
            raise ValueError(f"{data.prefix}: {tokens} tokens give no row of seq {seq}; choose seq in 1..{tokens - 1}")
        self.data, self.seq, self.seed, self.vocab_size = data, seq, seed, vocab_size
        self.reset_positions = reset_positions
        self.per_epoch = (tokens - 1) // seq
        self._epochs: dict[int, Epoch] = {}
        self._lock = threading.Lock()

    def row(self, number: int) -> Row:
        """Sample `number`, counted over all epochs."""
        if number < 0:
            raise ValueError(f"sample number {number}: must not be negative")
        epoch, index = divmod(number, self.per_epoch)
        stream, deal = self._epoch(epoch)
        row = stream.row(int(deal[index]) * self.seq, self.seq, self.reset_positions)
        return row | {"sample": np.array(number)}

    def _epoch(self, number: int) -> Epoch:
        """An epoch's orders, which depend on (seed, number) only; the last two made are kept."""
        with self._lock:
            if number not in self._epochs:
                order = self.documents[permutation(len(self.documents), self.seed, 2 * number)]
                deal = permutation(self.per_epoch, self.seed, 2 * number + 1)
                last = dict(list(self._epochs.items())[-1:])
                self._epochs = last | {number: Epoch(Stream(self.data, order, self.vocab_size), deal)}
            return self._epochs[number]


class HeldOut:
    """Held-out rows in the file's order; `batch` rows at a time cover the text exactly once, the rest is padding.

    Rows are as in `Samples`; those numbered `rows` and above are padding. Each token but the first, which has nothing
    before it, is predicted once: `predicted` of them. `bytes` of text stand behind these, the sum of `token_bytes`: an
    end of document is predicted like any token but stands for no bytes. `documents` as in `Samples`.
    Bits per byte = nats / ln 2 / bytes.
    """

    def __init__(
        self,
        data: IndexedDataset,
        seq: int,
        batch: int,
        *,
        token_bytes: Ints | None = None,
        limit: int | None = None,
        reset_positions: bool = False,
        vocab_size: int | None = None,
        documents: Ints | None = None,
    ) -> None:
        self.stream = Stream(data, np.arange(len(data)) if documents is None else documents, vocab_size)
        if len(self.stream) < 2 or min(seq, batch) < 1 or (limit is not None and limit < 1):
            numbers = f"{len(self.stream)} tokens, seq {seq}, batch {batch}, limit {limit}"
            raise ValueError(f"{data.prefix}: {numbers}: nothing to predict; at least 2 tokens and 1 of the others")
        self.seq, self.batch, self.reset_positions, self.token_bytes = seq, batch, reset_positions, token_bytes
        rows = -(-(len(self.stream) - 1) // seq)
        self.rows = rows if limit is None else min(rows, limit)
        self.predicted = min(self.rows * seq, len(self.stream) - 1)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.rows // self.batch)

    def row(self, number: int) -> Row:
        first = number * self.seq if number < self.rows else len(self.stream)
        row = self.stream.row(first, self.seq, self.reset_positions)
        return row | {"sample": np.array(number)}

    def numbers(self) -> Iterator[range]:
        """The row numbers of each batch, the last one's padding included."""
        return (range(i * self.batch, (i + 1) * self.batch) for i in range(len(self)))

    @cached_property
    def bytes(self) -> int | None:
        """Bytes of text that the predicted tokens stand for; None where single tokens cannot tell."""
        if self.token_bytes is None:
            return None
        parts = ((first, min(first + PART, self.predicted + 1)) for first in range(1, self.predicted + 1, PART))
        return sum(int(self.token_bytes[self.stream.read(*part)[0]].sum()) for part in parts)


def permutation(size: int, seed: int, number: int) -> Ints:
    """The `number`-th permutation of a seed, int64 [size]: the ranks of raw Philox words, which numpy keeps stable."""
    key = np.array([seed % 2**64, number], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")
