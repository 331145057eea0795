"""Which tokens a masked language model must guess: Megatron's choice, the same for the same random state.

Words, or runs of up to `longest` words, are taken in a drawn order until the share `rate` of the tokens is masked. The
length n of a run has probability in proportion to 1 / n, or is geometric (SpanBERT, arXiv:1907.10529, section 3.1).
Definition: megatron-core's MaskedWordPieceDataset. Its permutation of words, which draws from numpy's global state, is
left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fmegatron.data import tokenizers

State = np.random.RandomState  # its draws are frozen by numpy's promise, and are Megatron's
Bools = npt.NDArray[np.bool_]
SPACES = "ĠĊĉč"  # how byte-level BPE spells space, line feed, tab and carriage return: letters, to Python
Replace = Callable[[State], int | None]  # what stands in a masked token's place; None: itself


@dataclass(frozen=True)
class Masking:
    """How tokens are masked. `continues` bool [vocab]: the token goes on with the word before it; None: each is a word."""

    rate: float = 0.15
    longest: int = 1
    longer: bool = False  # longer runs are likelier
    geometric: bool = False
    continues: Bools | None = None

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1 or self.longest < 1:
            raise ValueError(f"masking rate {self.rate} in (0, 1), runs of {self.longest} words, at least 1")

    def choose(
        self, tokens: list[int], fixed: set[int], target: int, state: State, replace: Replace
    ) -> tuple[list[int], list[list[int]]]:
        """The tokens with some replaced, and the places that are to be guessed, in spans from left to right.

        fixed: ids that are never masked, nor part of a word; target: the length that the sample was to have.
        """
        words = self._words(tokens, fixed)
        most = min(self.rate * target, max(1, round(len(tokens) * self.rate)))
        counts = np.arange(self.longest, dtype=np.int64) + 1
        odds = 1 / counts
        odds = (odds / odds.sum())[:: -1 if self.longer else 1]
        order = list(range(len(words)))
        state.shuffle(order)
        out, masked, spans = list(tokens), set[int](), []
        for first in order:
            if len(masked) >= most:
                break
            if self.geometric:
                count = min(state.geometric(0.2), self.longest)
            else:
                count = int(state.choice(counts, p=odds / odds.sum()))
            while count and len(masked) + len(span := sum(words[first : first + count], [])) > most:
                count -= 1
            if not count or not masked.isdisjoint(span):
                continue
            for at in span:
                masked.add(at)
                new = replace(state)
                out[at] = tokens[at] if new is None else new
            spans.append(span)
        return out, sorted(spans)

    def _words(self, tokens: list[int], fixed: set[int]) -> list[list[int]]:
        words: list[list[int]] = []
        for at, token in enumerate(tokens):
            if token in fixed:
                continue
            if self.continues is not None and self.continues[token] and words:
                words[-1].append(at)
            else:
                words.append([at])
        return words


def continuations(codec: tokenizers.Tokenizer) -> Bools:
    """Which tokens of a WordPiece or byte-level tokenizer continue a word: bool [vocab].

    WordPiece writes "##" before them; byte-level BPE writes a space, spelled "Ġ", before the others.
    """
    if not isinstance(codec, tokenizers.Bpe):
        raise ValueError(f"{type(codec).__name__} does not tell words apart: mask single tokens")
    names = codec.inner.get_vocab(with_added_tokens=True)
    pieces = any(name.startswith("##") for name in names)
    out = np.zeros(codec.vocab_size, np.bool_)
    for name, index in names.items():
        out[index] = name.startswith("##") if pieces else name[:1].isalnum() and name[0] not in SPACES
    return out
