"""Fill in the middle (arXiv:2207.14255): a document's middle is moved to its end, and so learned from both sides.

    PSM    [prefix] beginning [suffix] end [middle] middle
    SPM    [prefix] [suffix] end [middle] beginning middle

A row's text is taken document by document, as Megatron's GPTFIMDataset does: whole documents and the parts at the row's
ends are each transformed with probability `rate`, and the row is cut or padded back to its length. A document is cut in
three between characters where a tokenizer is given (its pieces are tokenized anew), else between tokens.
Which documents, where, and in which order are functions of (seed, sample number, place in the row) alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fmegatron.data import tokenizers
from fmegatron.data.batches import Rows
from fmegatron.data.samples import Ints, Row

STREAM = 0xF1  # sets these draws apart from those of the orders, which share the seed


@dataclass(frozen=True)
class Fim:
    """Rows of text with some documents transformed; `rows` as `Samples` gives them, documents ending with `eod`.

    `spm`: the share of transformed documents in SPM. Row: tokens, labels, positions, documents, weights as before; what is
    behind a text that became shorter, as it may where a tokenizer is given, is padding.
    """

    rows: Rows
    seed: int
    prefix: int
    middle: int
    suffix: int
    eod: int
    rate: float = 0.5
    spm: float = 0.5
    codec: tokenizers.Tokenizer | None = None
    reset_positions: bool = True

    def __post_init__(self) -> None:
        if not (0 <= self.rate <= 1 and 0 <= self.spm <= 1):
            raise ValueError(f"fill in the middle at rate {self.rate}, of it SPM {self.spm}: both 0 to 1")

    def row(self, number: int) -> Row:
        """Sample `number`, transformed."""
        row = self.rows.row(number)
        seq, true = len(row["tokens"]), int(row["weights"].sum())
        if not true:
            return row
        text = np.append(row["tokens"][:true], row["labels"][true - 1])
        new = self.transform(text, int(row["sample"]))[: seq + 1]
        count = len(new) - 1
        tokens, labels = np.zeros(seq, np.int64), np.zeros(seq, np.int64)
        tokens[:count], labels[:count] = new[:-1], new[1:]
        ends = np.append(0, tokens[:-1] == self.eod)
        ends[count:] = np.arange(seq - count) == 0  # padding is a document of its own
        documents, positions = np.cumsum(ends), np.arange(seq)
        if self.reset_positions:
            positions -= np.maximum.accumulate(positions * ends)
        weights = (np.arange(seq) < count).astype(np.float32)
        return row | dict(tokens=tokens, labels=labels, positions=positions, documents=documents, weights=weights)

    def transform(self, text: Ints, sample: int) -> Ints:
        """A row's text with its documents transformed, each by draws of its own; ends of documents stay where they belong."""
        bounds = [0, *(np.flatnonzero(text == self.eod) + 1).tolist(), len(text)]
        parts = []
        for place, (first, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            body = text[first:stop]
            ended = len(body) > 0 and body[-1] == self.eod
            body = body[:-1] if ended else body
            chosen, order, *cuts = _uniform(self.seed, sample, place)
            if chosen < self.rate and len(body):
                body = np.array(self.rearrange(body.tolist(), cuts, order < self.spm), np.int64)
            parts += [body, text[stop - 1 : stop]] if ended else [body]
        return np.concatenate(parts)

    def rearrange(self, body: Sequence[int], cuts: Sequence[float], spm: bool) -> list[int]:
        """One document, cut at two places given as shares of its length; `restore` is the inverse."""
        beginning, middle, end = self._thirds(body, sorted(cuts))
        if spm:
            return [self.prefix, self.suffix, *end, self.middle, *beginning, *middle]
        return [self.prefix, *beginning, self.suffix, *end, self.middle, *middle]

    def restore(self, body: Sequence[int]) -> list[int]:
        """The tokens of a document before it was rearranged; its pieces' tokens, where it was cut at characters."""
        body = list(body)
        if not body or body[0] != self.prefix:
            return body
        suffix, middle = body.index(self.suffix), body.index(self.middle)
        beginning, end, rest = body[1:suffix], body[suffix + 1 : middle], body[middle + 1 :]
        return beginning + rest + end

    def _thirds(self, body: Sequence[int], cuts: Sequence[float]) -> list[list[int]]:
        if self.codec is not None:
            text = self.codec.decode(body)
            if self.codec.encode(text) == list(body):  # else the row begins or ends within a character
                low, high = (int(cut * (len(text) + 1)) for cut in cuts)
                return self.codec.encode_batch([text[:low], text[low:high], text[high:]])
        low, high = (int(cut * (len(body) + 1)) for cut in cuts)
        return [list(body[:low]), list(body[low:high]), list(body[high:])]


def _uniform(seed: int, sample: int, place: int) -> list[float]:
    """Four numbers in [0, 1) of a document of a sample: raw Philox words, which numpy keeps stable."""
    key, counter = np.array([seed % 2**64, sample], np.uint64), np.array([0, place, STREAM, 0], np.uint64)
    return ((np.random.Philox(key=key, counter=counter).random_raw(4) >> np.uint64(11)) * 2.0**-53).tolist()
