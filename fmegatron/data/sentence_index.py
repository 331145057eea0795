"""Samples made of whole sentences: Megatron's index for BERT and T5, the same rows for the same seed.

    index [samples, 3]     first sentence, end of the last, tokens to aim for

Sentences of a document are gathered until they reach the aim, which now and then is shorter than the row. Documents of
too few sentences, or with a sentence of more than 512 tokens, are left out. Definition: megatron-core's `build_mapping`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fmegatron.data.samples import Ints

Words = npt.NDArray[np.uint64]

LONGEST = 512  # tokens of a sentence
WORDS = 4096  # drawn at once


def sentence_index(
    documents: Ints,
    lengths: npt.NDArray[np.int32],
    aim: int,
    seed: int,
    *,
    samples: int | None = None,
    short: float = 0.1,
    least: int = 1,
) -> npt.NDArray[np.int64]:
    """Sentences [first, stop) and the tokens to aim for of each sample: int64 [n, 3], shuffled.

    documents [D + 1]: the first sentence of each, and the end; lengths: of every sentence. `samples` asks for as many
    passes over the documents as give that many at least; None: one pass. `short`: how often the aim is drawn from 2 to
    `aim`. `least`: sentences that a sample has at least.
    """
    if aim < 2 or not 0 <= short <= 1 or least < 1:
        raise ValueError(f"sentences aim for {aim} tokens (at least 2), short ones {short} (0 to 1), {least} (at least 1)")
    every = int(1 / short + 0.5) if short > 0 else 0
    words = _words32(seed) if every else iter(())

    def drawn() -> int:
        word = next(words) if every else 1
        return 2 + word % (aim - 1) if every and word % every == 0 else aim

    sizes, rows = lengths.tolist(), list[tuple[int, int, int]]()
    bounds = [(int(a), int(b)) for a, b in zip(documents, documents[1:], strict=False)]
    usable = [(a, b) for a, b in bounds if b - a >= least and (b - a < 2 or max(sizes[a:b]) <= LONGEST)]
    if not usable:
        raise ValueError(f"no document has {least} sentences, none of them over {LONGEST} tokens")
    while not rows or (samples is not None and len(rows) < samples):
        for first, stop in usable:
            target, tokens, count = drawn(), 0, 0
            for at in range(first, stop):
                tokens, count, left = tokens + sizes[at], count + 1, stop - at - 1
                if (tokens >= target and left > 1 and count >= least) or left == 0:
                    rows.append((first, at + 1, target))
                    first, target, tokens, count = at + 1, drawn(), 0, 0
    order = list(range(len(rows)))
    places = np.arange(len(rows) - 1, 0, -1, dtype=np.uint64)
    for i, j in zip(places.tolist(), (_words64(seed + 1, len(places)) % (places + np.uint64(1))).tolist(), strict=True):
        order[i], order[j] = order[j], order[i]
    return np.array(rows, np.int64)[order]


def _words32(seed: int) -> Iterator[int]:
    """The words of std::mt19937(seed), which numpy's old generator shares."""
    state = np.random.RandomState(seed)
    while True:
        yield from state.randint(0, 2**32, WORDS, np.uint32).tolist()


def _words64(seed: int, count: int) -> Words:
    """The first words of std::mt19937_64(seed) (Nishimura and Matsumoto 2004)."""
    state = [seed % 2**64]
    for i in range(1, 312):
        state.append((6364136223846793005 * (state[-1] ^ state[-1] >> 62) + i) % 2**64)
    mt, out = np.array(state, np.uint64), []

    def twist(upper: Words, lower: Words, far: Words) -> Words:
        x = (upper & np.uint64(0xFFFFFFFF80000000)) | (lower & np.uint64(0x7FFFFFFF))
        return far ^ (x >> np.uint64(1)) ^ (x & np.uint64(1)) * np.uint64(0xB5026F5AA96619E9)

    for _ in range(-(-count // 312)):
        low = twist(mt[:156], mt[1:157], mt[156:])
        high = twist(mt[156:], np.append(mt[157:], low[:1]), low)
        x = mt = np.concatenate([low, high])
        x = x ^ (x >> np.uint64(29)) & np.uint64(0x5555555555555555)
        x = x ^ (x << np.uint64(17)) & np.uint64(0x71D67FFFEDA60000)
        x = x ^ (x << np.uint64(37)) & np.uint64(0xFFF7EEE000000000)
        out.append(x ^ (x >> np.uint64(43)))
    return np.concatenate(out)[:count] if out else np.zeros(0, np.uint64)
