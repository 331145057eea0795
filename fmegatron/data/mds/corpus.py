"""A corpus of MDS streams: what a training run reads, with the tokenizer that made the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fmegatron.data import tokenizers
from fmegatron.data.cycle import InOrder
from fmegatron.data.mds.order import Order
from fmegatron.data.mds.rows import StreamRows, TokenRows
from fmegatron.data.mds.sampling import Weight
from fmegatron.data.mds.streams import Stream, Streams

STREAM_KEYS = ("local", "remote", "split", "proportion", "repeat", "choose", "group")


@dataclass(frozen=True)
class StreamCorpus(tokenizers.Tokenized):
    """Streams to train on in `order`, others to validate on; `slots` give parts of the batch to groups (see `StreamRows`).

    options: of `Streams` (limit, retries, hash, ...); tokens: of `TokenRows` (column, dtype); pack: as in `StreamRows`.
    """

    train: Sequence[Stream]
    tokenizer: str
    order: Order
    global_batch: int
    valid: Sequence[Stream] | None = None
    slots: Sequence[str] = ()
    predownload: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, Any] = field(default_factory=dict)
    pack: str | Path | None = None

    def samples(self, seq: int, seed: int, *, reset_positions: bool = True) -> StreamRows:
        """Training rows without end; the order's own seed counts, not `seed`."""
        return StreamRows(
            Streams(self.train, **self.options),
            self.order,
            seq,
            self.global_batch,
            slots=self.slots,
            predownload=self.predownload,
            pack=self.pack,
            **self._cut(reset_positions),
        )

    def held_out(self, seq: int, batch: int, *, limit: int | None = None, reset_positions: bool = True) -> InOrder:
        """Validation rows, `limit` of them at most."""
        if self.valid is None:
            raise ValueError("these streams have no held-out part")
        return InOrder(TokenRows(self._held_out, seq, **self._cut(reset_positions)), batch, limit)

    @cached_property
    def _held_out(self) -> Streams:
        return Streams(self.valid or (), **self.options)

    def _cut(self, reset_positions: bool) -> dict[str, Any]:
        try:
            eod: int | None = self.codec.eod
        except ValueError:
            eod = None  # a tokenizer without one: a row is one document
        return {**self.tokens, "vocab_size": self.vocab_size, "eod": eod, "reset_positions": reset_positions}


def stream_of(table: Mapping[str, Any], number: int = 0) -> Stream:
    """A stream as a configuration writes it: {local, remote, split, group, and one of proportion, repeat, choose}."""
    where = f"stream {number}"
    if unknown := sorted(table.keys() - set(STREAM_KEYS)):
        raise ValueError(f"{where} has no {unknown[0]}, its keys are {', '.join(STREAM_KEYS)}")
    texts = {key: table[key] for key in ("local", "remote", "split", "group") if key in table}
    weights = {key: table[key] for key in ("proportion", "repeat", "choose") if key in table}
    if wrong := [key for key, value in texts.items() if not isinstance(value, str)]:
        raise ValueError(f"{where}: {wrong[0]} = {texts[wrong[0]]}: expected text")
    if wrong := [key for key, value in weights.items() if type(value) not in ((int,) if key == "choose" else (int, float))]:
        raise ValueError(f"{where}: {wrong[0]} = {weights[wrong[0]]}: expected a number")
    if "local" not in texts:
        raise ValueError(f"{where} has no local: the folder that holds its shards, or a copy of the remote's")
    try:
        return Stream(**texts, weight=Weight(**weights))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
