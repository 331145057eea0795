"""BERT's samples: two pieces of text in order or swapped, some tokens masked; row n is a function of (seed, n) alone.

    [CLS] A … [SEP] B … [SEP]        80 % of the chosen tokens become [MASK], 10 % any token, 10 % stay

Equal to megatron-core's BERTMaskedWordPieceDataset, sample by sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fmegatron.data.indexed import IndexedDataset
from fmegatron.data.masking import Masking, State
from fmegatron.data.samples import Ints, Row
from fmegatron.data.sentence_index import sentence_index


@dataclass(frozen=True)
class Bert:
    """Rows without end over a file of sentences (`data.documents` says which belong together).

    Row: tokens, labels, types (1 in the second piece), positions, documents (1: padding) int64 [seq]; weights float32 [seq]:
    1 at what is to be guessed; swapped int64 []: whether B came first; sample int64 []. `vocab`: ids to draw from, an int
    or an array. `pairs` false: one piece, never swapped. `samples`: as in `sentence_index`; beyond them the same sentences come
    again, masked anew.
    """

    data: IndexedDataset
    seq: int
    seed: int
    cls: int
    sep: int
    mask: int
    vocab: int | Ints
    masking: Masking = Masking()
    pairs: bool = True
    samples: int | None = None
    short: float = 0.1

    @cached_property
    def index(self) -> Ints:
        """Sentences and aim of each sample."""
        least, data = 2 if self.pairs else 1, self.data
        return sentence_index(
            data.documents, data.lengths, self.seq - 3, self.seed, samples=self.samples, short=self.short, least=least
        )

    def __len__(self) -> int:
        return len(self.index)

    def row(self, number: int) -> Row:
        """Sample `number`."""
        first, stop, target = (int(n) for n in self.index[number % len(self)])
        sentences = [self.data[i].tolist() for i in range(first, stop)]
        state = State((self.seed + number) % 2**32)
        a, b, swapped = self._pieces(sentences, target, state)
        tokens = [self.cls, *a, self.sep, *(b + [self.sep] if b else [])]
        shown, spans = self.masking.choose(tokens, {self.cls, self.sep}, target, state, self._replace)
        row: Row = {key: np.zeros(self.seq, np.int64) for key in ("tokens", "labels", "types")}
        row |= {"weights": np.zeros(self.seq, np.float32), "positions": np.arange(self.seq)}
        row |= {"documents": (np.arange(self.seq) >= len(tokens)).astype(np.int64)}
        guessed = sum(spans, [])
        row["tokens"][: len(tokens)] = shown
        row["types"][len(a) + 2 : len(tokens)] = 1
        row["labels"][guessed], row["weights"][guessed] = np.array(tokens, np.int64)[guessed], 1
        return row | {"swapped": np.array(int(swapped)), "sample": np.array(number)}

    def _pieces(self, sentences: list[list[int]], target: int, state: State) -> tuple[list[int], list[int], bool]:
        """Two pieces, no longer than `target` together: tokens go from the longer one, from either end."""
        pivot, swapped = len(sentences), False
        if self.pairs:
            pivot = int(state.randint(1, len(sentences))) if len(sentences) >= 3 else 1
            swapped = bool(state.random_sample() < 0.5)
        a, b = sum(sentences[:pivot], []), sum(sentences[pivot:], [])
        if swapped:
            a, b = b, a
        while len(a) + len(b) > target:
            longer = a if len(a) > len(b) else b
            del longer[0 if state.random_sample() < 0.5 else -1]
        return a, b, swapped

    def _replace(self, state: State) -> int | None:
        if state.random_sample() < 0.8:
            return self.mask
        if state.random_sample() < 0.5:
            return None
        lookup = range(self.vocab) if isinstance(self.vocab, int) else self.vocab
        return int(lookup[state.randint(0, len(lookup))])
