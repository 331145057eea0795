"""Documents of token files as whole examples, each for a row of its own: what steps of unequal length are made of."""

from __future__ import annotations

import numpy as np

from fmegatron.data.indexed import IndexedDataset
from fmegatron.data.pack import Ints, Piece
from fmegatron.data.sft import Long, kept


class Whole:
    """The sequences of a file, or some of them: `lengths` int64, the places that each takes; `whole[i]` tokens and weights.

    Those of fewer than two tokens predict nothing and are left out. `long`: of more than `seq` places, as in `data.sft.Turns`.
    Raises ValueError where nothing is left, and for ids that are not below `vocab_size`.
    """

    def __init__(self, data: IndexedDataset, seq: int, long: Long, documents: Ints | None, vocab_size: int) -> None:
        self.data, self.vocab_size = data, vocab_size
        chosen = np.arange(len(data)) if documents is None else documents
        chosen = chosen[data.lengths[chosen] > 1]
        places = data.lengths[chosen].astype(np.int64) - 1
        left = kept(places, seq, long, f"{data.prefix}: documents")
        self.chosen, self.lengths = chosen[left], np.minimum(places[left], seq)

    def __getitem__(self, index: int) -> Piece:
        at = int(self.chosen[index])
        ids = self.data.get(at, 0, int(self.lengths[index]) + 1)
        if not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(
                f"{self.data.prefix}: ids {ids.min()}..{ids.max()} in sequence {at}, token {self.data.offsets[at]}, but the"
                f" vocabulary ends at {self.vocab_size - 1}: were these files made with another tokenizer?"
            )
        return ids, np.ones(len(ids), np.float32)
