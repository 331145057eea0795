"""T5's samples: spans of a text taken out and asked for; row n is a function of (seed, n) alone.

    text       the quick brown fox jumps over the dog
    encoder    the <0> fox jumps <1> the dog
    decoder    [bos] <0> quick brown <1> over              labels    <0> quick brown <1> over [eos]

Spans are Megatron's runs of words, and rows then equal to megatron-core's T5MaskedWordPieceDataset; or, with `mean_span`,
those of the T5 paper (arXiv:1910.10683, section 3.3.4): a fixed number of spans of random lengths with that mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fmegatron.data.indexed import IndexedDataset
from fmegatron.data.masking import Masking, State
from fmegatron.data.samples import Ints, Row
from fmegatron.data.sentence_index import sentence_index


@dataclass(frozen=True)
class T5:
    """Rows without end over a file of sentences; `samples`, `short` as in `data.bert.Bert`.

    Row: tokens, positions, documents (1: padding) int64 [seq]; decoder_tokens, labels, decoder_documents int64 and weights
    float32 [decoder_seq]; sample int64 []. Raises ValueError where a sample has more spans than there are sentinels, or
    more tokens to guess than the decoder takes.
    """

    data: IndexedDataset
    seq: int
    decoder_seq: int
    seed: int
    sentinels: Sequence[int]
    bos: int
    eos: int
    fixed: frozenset[int] = frozenset()
    masking: Masking = Masking(longest=10, geometric=True)
    mean_span: float | None = None
    samples: int | None = None
    short: float = 0.1

    @cached_property
    def index(self) -> Ints:
        """Sentences and aim of each sample."""
        data = self.data
        return sentence_index(data.documents, data.lengths, self.seq - 2, self.seed, samples=self.samples, short=self.short)

    def __len__(self) -> int:
        return len(self.index)

    def row(self, number: int) -> Row:
        """Sample `number`."""
        first, stop, target = (int(n) for n in self.index[number % len(self)])
        tokens = np.concatenate([self.data[i] for i in range(first, stop)]).tolist()[:target]
        state = State((self.seed + number) % 2**32)
        if self.mean_span is None:
            _, spans = self.masking.choose(tokens, set(self.fixed), target, state, lambda state: None)
        else:
            spans = noise_spans(len(tokens), self.masking.rate, self.mean_span, state)
        encoder, decoder = corrupt(tokens, spans, self.sentinels)
        if len(encoder) > self.seq or len(decoder) + 1 > self.decoder_seq:
            raise ValueError(
                f"sample {number}: {len(encoder)} tokens for an encoder of {self.seq}, "
                f"{len(decoder) + 1} for a decoder of {self.decoder_seq}: raise the smaller one"
            )
        here, there = np.arange(self.seq), np.arange(self.decoder_seq)
        return {
            "tokens": _padded(encoder, self.seq),
            "positions": here,
            "documents": (here >= len(encoder)).astype(np.int64),
            "decoder_tokens": _padded([self.bos, *decoder], self.decoder_seq),
            "decoder_documents": (there > len(decoder)).astype(np.int64),
            "labels": _padded([*decoder, self.eos], self.decoder_seq),
            "weights": (there <= len(decoder)).astype(np.float32),
            "sample": np.array(number),
        }


def corrupt(tokens: list[int], spans: Sequence[Sequence[int]], sentinels: Sequence[int]) -> tuple[list[int], list[int]]:
    """The text with a sentinel for each span, and each sentinel followed by its span's tokens.

    Spans are lists of places, left to right; two that touch keep a sentinel each. `restore` is the inverse.
    """
    if len(spans) > len(sentinels):
        raise ValueError(f"{len(spans)} spans and {len(sentinels)} sentinels: add sentinels, or mask longer spans")
    encoder, decoder, done = list[int](), list[int](), 0
    for span, sentinel in zip(spans, sentinels, strict=False):
        encoder += [*tokens[done : span[0]], sentinel]
        decoder += [sentinel, *(tokens[at] for at in span)]
        done = span[-1] + 1
    return encoder + tokens[done:], decoder


def restore(encoder: Sequence[int], decoder: Sequence[int], sentinels: Sequence[int]) -> list[int]:
    """The text that `corrupt` was given."""
    marks, spans = set(sentinels), dict[int, list[int]]()
    for token in decoder:
        if token in marks:
            spans[token] = current = []
        else:
            current.append(token)
    return [token for one in encoder for token in (spans[one] if one in marks else [one])]


def noise_spans(length: int, rate: float, mean: float, state: State) -> list[list[int]]:
    """`rate` of the places of a text, in spans of `mean` places on the average, with text before each.

    All such layouts are alike, those that do not end in a span too: the paper's code always ends in one.
    """
    noise = min(max(round(length * rate), 1), length - 1)
    count = min(max(round(noise / mean), 1), noise, length - noise)
    if length < 2:
        return []

    def parts(total: int, count: int) -> list[int]:  # `count` positive numbers of this sum
        cuts = np.sort(state.permutation(total - 1)[: count - 1]) + 1
        return np.diff([0, *cuts.tolist(), total]).tolist()

    spans, at = [], 0
    kept_parts = parts(length - noise + 1, count + 1)  # the last one, behind all spans, is one less: maybe nothing
    for kept, taken in zip(kept_parts, parts(noise, count), strict=False):
        spans.append(list(range(at + kept, at + kept + taken)))
        at += kept + taken
    return spans


def _padded(tokens: list[int], size: int) -> Ints:
    return np.pad(np.array(tokens, np.int64), (0, size - len(tokens)))
