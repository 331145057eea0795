"""Megatron's sample index: which tokens of which documents are sample n, bit for bit as megatron-core 0.16 draws them.

    document index   int32 [epochs * documents]        the documents of all epochs, shuffled: one long text
    sample index     int32 or int64 [samples + 1, 2]   where sample k begins in that text: (place in the document index, offset)
    shuffle index    uint32 or int64 [samples]         the n-th sample drawn is sample shuffle[n]

An epoch that is needed for less than 80 % of its samples is shuffled by itself, so that no document of it comes early.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fmegatron.data import native

BLOCK = 2**16  # documents looked at together: their sizes and ends fit a cache, and are all the memory that is needed


class GptIndex(NamedTuple):
    """The three arrays, in the order in which they are used backwards."""

    document: npt.NDArray[np.int32]
    sample: npt.NDArray[Any]
    shuffle: npt.NDArray[Any]


def gpt_index(
    lengths: npt.ArrayLike,
    documents: npt.ArrayLike | None,
    seq_length: int,
    seed: int,
    epochs: int | None = None,
    samples: int | None = None,
    *,
    extra_token: bool = True,
    drop_last: bool = True,
) -> GptIndex:
    """The index of a GPT data set over `documents`, ids into `lengths` (None: all), identical to megatron-core's.

    Either `epochs` whole epochs (one, unless given) or as many as `samples` samples need. With `extra_token` a sample
    reads seq_length + 1 tokens, the last of them again as the next one's first. Without `drop_last` a last sample that is
    not full counts too. `lengths` are int32, in tokens. Raises ValueError where there is nothing to draw.
    """
    sizes, chosen = _checked(lengths, documents, seq_length, epochs, samples)
    extra, tokens = int(extra_token), int(np.sum(sizes[chosen], dtype=np.int64))
    if tokens == 0:
        raise ValueError(f"{len(chosen)} documents without a token: nothing to draw samples from")
    if samples is None:
        count, apart = epochs or 1, None
    else:
        count = max(1, -(-(samples * seq_length + extra) // tokens))
        apart = _last_epoch_apart(tokens, count, samples, seq_length, extra)
    rng = np.random.RandomState(seed)
    parts = [count] if apart is None else [count - 1, 1]
    order = np.concatenate([_shuffled(np.tile(chosen, part), rng) for part in parts])
    rows = _rows(count * tokens - extra, seq_length, drop_last)
    index = _sample_index(sizes, order, seq_length, extra, rows)
    bounds = [0, rows] if apart is None else [0, apart, rows]
    dtype = np.int64 if rows >= 2**32 - 2 else np.uint32
    pairs = zip(bounds, bounds[1:], strict=False)
    shuffle = np.concatenate([_shuffled(np.arange(first, stop, dtype=dtype), rng) for first, stop in pairs])
    return GptIndex(order, index, shuffle)


def _checked(
    lengths: npt.ArrayLike, documents: npt.ArrayLike | None, seq_length: int, epochs: int | None, samples: int | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    sizes, chosen = np.asarray(lengths), np.arange(np.size(lengths)) if documents is None else np.asarray(documents)
    if sizes.ndim != 1 or chosen.ndim != 1 or not len(sizes) or not len(chosen):
        raise ValueError(f"lengths {sizes.shape} and documents {chosen.shape}: each is a list of at least one number")
    if sizes.min() < 0 or sizes.max() > 2**31 - 1:
        raise ValueError(f"lengths {sizes.min()}..{sizes.max()}: a document has 0 to {2**31 - 1} tokens")
    if not 0 <= chosen.min() <= chosen.max() < len(sizes):
        raise ValueError(f"documents {chosen.min()}..{chosen.max()}: there are lengths for 0..{len(sizes) - 1}")
    if epochs is not None and samples is not None:
        raise ValueError(f"epochs {epochs} and samples {samples}: give one of the two")
    if seq_length < 1 or (1 if epochs is None else epochs) < 1 or (1 if samples is None else samples) < 1:
        raise ValueError(f"seq_length {seq_length}, epochs {epochs}, samples {samples}: at least 1 each")
    return sizes.astype(np.int32, copy=False), chosen.astype(np.int32, copy=False)


def _last_epoch_apart(tokens: int, epochs: int, samples: int, seq_length: int, extra: int) -> int | None:
    """The number of samples before the last epoch, where that one is shuffled by itself."""
    if epochs == 1:
        return None
    before, full = ((epochs - 1) * tokens - extra) // seq_length, (tokens - extra) // seq_length
    assert 0 <= samples - before <= full + 1
    return before if samples - before < int(0.80 * full) else None


def _rows(tokens: int, seq_length: int, drop_last: bool) -> int:
    if drop_last:
        return max(tokens // seq_length, 0)
    return int(np.ceil(np.float32(tokens) / np.float32(seq_length)))  # Megatron divides in single precision


def _sample_index(
    sizes: npt.NDArray[np.int32], order: npt.NDArray[np.int32], seq_length: int, extra: int, rows: int
) -> npt.NDArray[Any]:
    """Row k > 0 is where the last token of sample k - 1 lies, token k * seq_length + extra - 1 of the long text."""
    dtype = np.int32 if max(len(order), int(sizes.max())) <= 2**31 - 1 else np.int64
    index = np.zeros((rows + 1, 2), dtype)
    loops = native.loops() if len(order) + rows > BLOCK else None
    if loops is not None:
        loops.sample_index(np.ascontiguousarray(sizes), order, seq_length, extra, index)
    else:
        _by_blocks(sizes, order, seq_length, extra, index)
    return index


def _by_blocks(
    sizes: npt.NDArray[np.int32], order: npt.NDArray[np.int32], seq_length: int, extra: int, index: npt.NDArray[Any]
) -> None:
    """Fill the sample index with array operations.

    How many rows end before a document does is one division, so the rows of a document are known without a search.
    """
    rows = len(index) - 1
    done, passed = 0, 0  # rows, and tokens, of the blocks before
    for first in range(0, len(order), BLOCK):
        counts = sizes.take(order[first : first + BLOCK])
        ends = counts.cumsum(dtype=np.int64)
        ends += passed
        passed = int(ends[-1])
        within = np.maximum(ends - extra, 0)  # becomes the rows up to the end of each document, less those done
        within //= seq_length
        if within[-1] > rows:
            np.minimum(within, rows, out=within)
        count = int(within[-1]) - done
        within -= done
        place = np.bincount(within).cumsum()[:count]  # of each row: how many documents of the block end before it
        found = index[done + 1 : done + count + 1]
        np.add(place, first, out=found[:, 0], casting="same_kind")
        ends -= counts
        starts = np.arange((done + 1) * seq_length, (done + count + 1) * seq_length, seq_length)
        np.subtract(starts, ends.take(place), out=found[:, 1], casting="same_kind")
        done += count
    index[done + 1 :] = len(order) - 1, max(int(sizes[order[-1]]) - extra, 0)  # a last sample that is not full


def _shuffled(values: npt.NDArray[Any], rng: np.random.RandomState) -> npt.NDArray[Any]:
    rng.shuffle(values)
    return values
