"""Training rows out of streams of token samples: `row(number)`, a pure function of (seed, number, global batch).

A sample of L tokens is a row: tokens [0, L - 1) and their labels [1, L), padded to `seq`; or several share one. A number is
a step and a row of its global batch; rows belong to slots, slots to groups of streams, and each group deals its own samples in
its own order.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmegatron.data.mds.order import Order, Part, batch_rows, epoch_order
from fmegatron.data.mds.shuffle import Ints
from fmegatron.data.mds.streams import Streams
from fmegatron.data.pack import PackIndex, cached, first_fit
from fmegatron.data.samples import Row


class Deal:
    """One group's samples in order, epoch after epoch: `ids(first, count)` by position, any position."""

    def __init__(self, order: Order, parts: Sequence[Part], batch: int) -> None:
        self.order, self.parts, self.batch = order, tuple(parts), batch
        self._lock = threading.Lock()
        self._epochs: dict[int, Ints] = {}
        self.per_epoch = len(self._epoch(0))

    def ids(self, step: int) -> Ints:
        """Sample ids of a step's rows, int64 [batch]; a step may reach into the next epoch."""
        places = batch_rows(self.order, step * self.batch, self.batch)
        epochs, places = np.divmod(places, self.per_epoch)
        out = np.empty(self.batch, np.int64)
        for epoch in np.unique(epochs).tolist():
            out[epochs == epoch] = self._epoch(epoch)[places[epochs == epoch]]
        return out

    def _epoch(self, number: int) -> Ints:
        """An epoch's order; the last two made are kept."""
        with self._lock:
            if number not in self._epochs:
                last = dict(list(self._epochs.items())[-1:])
                self._epochs = last | {number: epoch_order(self.order, self.parts, number, self.batch)}
            return self._epochs[number]


class TokenRows:
    """The samples of streams as rows, in their own order: `row(number)` for number below `len`.

    column: of integers, or of bytes that are numbers of `dtype`. eod: the token that ends a document, where known;
    `documents` and, with `reset_positions`, `positions` follow it. Row as in `data.Samples`. Raises ValueError, naming file
    and sample, for tokens that do not fit.
    """

    def __init__(
        self,
        streams: Streams,
        seq: int,
        *,
        column: str = "tokens",
        dtype: str | None = None,
        vocab_size: int | None = None,
        eod: int | None = None,
        reset_positions: bool = False,
    ) -> None:
        self.streams, self.seq, self.column, self.dtype = streams, seq, column, dtype
        self.vocab_size, self.eod, self.reset_positions = vocab_size, eod, reset_positions

    def __len__(self) -> int:
        return len(self.streams)

    def row(self, number: int) -> Row:
        """Sample `number` of the streams; the one behind the last is padding."""
        return self._read(number) | {"sample": np.array(number)}

    def _read(self, number: int) -> Row:
        return self.laid([self.tokens(number)] if number < len(self) else [])

    def laid(self, texts: Sequence[Any]) -> Row:
        """Samples side by side in a row: each is a document at least, and so is the padding."""
        seq, at = self.seq, 0
        tokens, labels, documents = (np.zeros(seq, np.int64) for _ in range(3))
        for text in texts:
            stop = at + len(text) - 1
            tokens[at:stop], labels[at:stop] = text[:-1], text[1:]
            documents[at:stop] = documents[at - 1] + 1 if at else 0
            if self.eod is not None:
                documents[at + 1 : stop] += np.cumsum(text[:-2] == self.eod)
            at = stop
        documents[at:] = documents[max(at - 1, 0)] + 1
        positions = np.arange(seq)
        if self.reset_positions:
            begins = np.zeros(seq, np.int64)
            begins[1:] = positions[1:] * (documents[1:] > documents[:-1])
            positions -= np.maximum.accumulate(begins)
        weights = (np.arange(seq) < at).astype(np.float32)
        return dict(tokens=tokens, labels=labels, weights=weights, positions=positions, documents=documents)

    def tokens(self, number: int) -> Any:
        """The tokens of a sample, checked."""
        try:
            value = self.streams.sample(number, self.column)
        except KeyError:
            columns = ", ".join(self.streams.sample(number))
            raise ValueError(f"{self.streams.where(number)}: no column {self.column!r}, choose of {columns}") from None
        if isinstance(value, bytes) and self.dtype is not None and len(value) % np.dtype(self.dtype).itemsize == 0:
            value = np.frombuffer(value, self.dtype)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or value.ndim != 1:
            found = f"{value.dtype.name} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
            more = ": name their dtype (int64, ...)" if isinstance(value, bytes) else ""
            raise ValueError(f"{self.streams.where(number)}: column {self.column!r} holds {found}, not tokens{more}")
        if not 2 <= len(value) <= self.seq + 1:
            fits = f"use a seq of {len(value) - 1}" if len(value) > 1 else "a row takes 2 at least"
            raise ValueError(f"{self.streams.where(number)}: {len(value)} tokens for a row of seq {self.seq}: {fits}")
        if value.min() < 0 or (self.vocab_size is not None and value.max() >= self.vocab_size):
            end = "" if self.vocab_size is None else f", the vocabulary ends at {self.vocab_size - 1}"
            raise ValueError(f"{self.streams.where(number)}: ids {value.min()}..{value.max()}{end}: another tokenizer's?")
        return value


class PackedStreams:
    """The samples of streams in rows that they share, first-fit: `row(number)`, and what an order asks of streams.

    A row's samples are of one shard. So rows stand where samples stood: drawn, shuffled, dealt to nodes and fetched shard by
    shard. Every sample's length is read once; the index is kept below `folder`.
    """

    def __init__(self, rows: TokenRows, folder: str | Path) -> None:
        self.rows, self.streams = rows, rows.streams
        shards = [sizes.tolist() for sizes in self.streams.sizes]

        def index() -> dict[str, Any]:
            first, counts, sizes, items = 0, list[Ints](), list[int](), list[Ints]()
            for size in (size for of_stream in shards for size in of_stream):
                lengths = np.array([len(rows.tokens(first + i)) - 1 for i in range(size)], np.int64)
                found = first_fit(lengths, rows.seq, first)
                counts.append(np.diff(found.starts))
                items.append(found.items + first)
                sizes.append(len(counts[-1]))
                first += size
            starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
            return {"starts": starts, "items": np.concatenate(items), "sizes": np.array(sizes, np.int64)}

        kept = cached(folder, f"mds seq={rows.seq} column={rows.column} {rows.dtype} {self.streams.facts()}", index)
        self.index = PackIndex(kept["starts"], kept["items"])
        self.sizes = np.split(kept["sizes"], np.cumsum([len(of_stream) for of_stream in shards])[:-1])

    def __len__(self) -> int:
        return len(self.index.starts) - 1

    def row(self, number: int) -> Row:
        """Row `number`; those behind the last are padding."""
        return self.rows.laid([self.rows.tokens(int(i)) for i in self._samples(number)]) | {"sample": np.array(number)}

    def ahead(self, numbers: Sequence[int]) -> None:
        """Fetch the shards of these rows in the background."""
        self.streams.ahead([int(self._samples(number)[0]) for number in numbers])

    def parts(self, group: str) -> list[Part]:
        """As `Streams.parts`, of rows."""
        return self.streams.parts(group, self.sizes)

    def _samples(self, number: int) -> Ints:
        first, stop = self.index.starts[number : number + 2] if number < len(self) else (0, 0)
        return self.index.items[first:stop]


class StreamRows:
    """Rows for training, without end, from any thread: samples as `TokenRows` cuts them, in the order of each group.

    slots: group names; slot k of n is the k-th n-th of the rows of a global batch (none: each group once). predownload:
    samples of this process to have shards ready for (none: 8 batches). pack: the folder of the index by which samples share
    rows (see `PackedStreams`); what else is said of samples is then said of these rows. None: one sample a row.
    """

    def __init__(
        self,
        streams: Streams,
        order: Order,
        seq: int,
        global_batch: int,
        *,
        slots: Sequence[str] = (),
        predownload: int | None = None,
        pack: str | Path | None = None,
        **options: Any,
    ) -> None:
        self.streams, self.global_batch, self.predownload = streams, global_batch, predownload
        single = TokenRows(streams, seq, **options)
        packed = None if pack is None else PackedStreams(single, pack)
        self._rows: TokenRows | PackedStreams = packed or single
        self._source: Streams | PackedStreams = packed or streams
        groups = streams.groups()
        self.slots = tuple(slots) or groups
        if set(self.slots) != set(groups):
            named, known = ", ".join(self.slots), ", ".join(groups)
            raise ValueError(f"replica groups {named}, but the streams' are {known}: name all of them")
        if global_batch % len(self.slots):
            near = global_batch // len(self.slots) * len(self.slots) or len(self.slots)
            raise ValueError(f"a global batch of {global_batch} does not divide over {len(self.slots)} groups: use {near}")
        share = global_batch // len(self.slots)
        self._deals = {name: Deal(order, self._source.parts(name), share * self.slots.count(name)) for name in groups}
        self._share = share
        self._step, self._looked, self._asked = -1, -(2**62), set[int]()
        self._last = -1, np.empty(0, np.int64)

    def row(self, number: int) -> Row:
        """Sample `number`, counted over all epochs."""
        if number < 0:
            raise ValueError(f"sample number {number}: must not be negative")
        step, row = divmod(number, self.global_batch)
        self._look_ahead(step, row)
        at, ids = self._last
        if at != step:
            ids = self.ids(step)
            self._last = step, ids
        return self._rows.row(int(ids[row])) | {"sample": np.array(number)}

    def ids(self, step: int) -> Ints:
        """Sample ids of all rows of a global batch, int64 [global_batch]."""
        dealt = {name: deal.ids(step).reshape(-1, self._share) for name, deal in self._deals.items()}
        turn = [self.slots[:slot].count(name) for slot, name in enumerate(self.slots)]
        return np.concatenate([dealt[name][at] for name, at in zip(self.slots, turn, strict=True)])

    def _look_ahead(self, step: int, row: int) -> None:
        """Fetch what the rows that this process reads, those it asked for a step before, will need: a stretch at a time."""
        if step == self._step:
            self._asked.add(row)
            return
        mine = sorted(self._asked)
        self._step, self._asked = step, {row}
        steps = -(-self.predownload // max(len(mine), 1)) if self.predownload is not None else 8
        if mine and not 0 <= step - self._looked < max(steps // 2, 1):
            self._looked = step
            coming = [self.ids(step + later)[mine] for later in range(steps + 1)]
            self._source.ahead(np.concatenate(coming).tolist())
