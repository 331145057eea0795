"""What is in a pair of token files: numbers, a picture of the documents' lengths, and a piece of it to read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fmegatron.data.indexed import IndexedDataset
from fmegatron.data.tokenizers import Tokenizer

PART = 2**22  # tokens looked at at once


@dataclass(frozen=True)
class Statistics:
    """Numbers of one pair of files; `lengths` int64 [documents], in tokens; ids are 0 to 0 where there are no tokens."""

    documents: int
    sequences: int
    tokens: int
    dtype: str
    lengths: np.ndarray
    smallest: int
    largest: int
    distinct: int

    def lines(self) -> list[str]:
        """The numbers as text."""
        found = [f"{self.documents:,} documents, {self.sequences:,} sequences, {self.tokens:,} tokens of {self.dtype}"]
        if self.tokens:
            found.append(f"ids {self.smallest} to {self.largest}, {self.distinct:,} different ones")
        if self.documents:
            marks = np.quantile(self.lengths, [0, 0.01, 0.5, 0.99, 1]).astype(int)
            names = zip(("shortest", "1 %", "median", "99 %", "longest"), marks, strict=True)
            found.append(f"tokens of a document: {', '.join(f'{name} {mark:,}' for name, mark in names)}")
            found.append(f"mean {self.lengths.mean():,.1f}; {int((self.lengths == 0).sum()):,} documents are empty")
        return found


def statistics(data: IndexedDataset) -> Statistics:
    """The numbers of a data set; reads every token once."""
    lengths = data.offsets[data.documents[1:]] - data.offsets[data.documents[:-1]]
    smallest, largest, seen = 0, 0, np.zeros(0, bool)
    for number, part in enumerate(parts(data)):
        low, high = int(part.min()), int(part.max())
        smallest, largest = (low, high) if number == 0 else (min(low, smallest), max(high, largest))
        if data.dtype.kind in "iu" and 0 <= low and high < 2**26:
            seen = np.append(seen, np.zeros(max(high + 1 - len(seen), 0), bool))
            seen[part] = True
    return Statistics(
        len(lengths), len(data), len(data.stream), data.dtype.name, lengths, smallest, largest, int(seen.sum())
    )


def parts(data: IndexedDataset) -> Iterator[np.ndarray]:
    """All tokens, piece by piece."""
    for first in range(0, len(data.stream), PART):
        yield data.stream[first : first + PART]


def picture(found: Statistics, path: str | Path, title: str) -> None:
    """Write a picture of the lengths: how many documents have each, and how many tokens lie in them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = found.lengths[found.lengths > 0]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}: {found.documents:,} documents, {found.tokens:,} tokens", fontsize=11)
    low, high = int(lengths.min(initial=2**31)), int(lengths.max(initial=1)) + 1
    edges = np.unique(np.geomspace(min(low, high - 1), high, 60).round())
    kinds = (("documents", None, "#4477aa"), ("tokens in them", lengths, "#cc6677"))
    for axis, (name, weights, color) in zip(figure.subplots(1, 2), kinds, strict=True):
        axis.hist(lengths, edges, weights=weights, color=color)
        axis.set(xscale="log", xlabel="tokens in a document", title=name)
        axis.spines[["top", "right"]].set_visible(False)
        if len(lengths):
            middle = float(np.median(lengths))
            axis.axvline(middle, color="black", linewidth=1, linestyle=":", label=f"median {middle:,.0f}")
            axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def excerpt(data: IndexedDataset, tokenizer: Tokenizer | None, tokens: int, seed: int) -> Iterator[str]:
    """Text around a place that `seed` chooses, `tokens` long, a line before each document saying which it is.

    Without a tokenizer the ids themselves. A document is shown from its beginning, or from where the excerpt begins.
    """
    if not len(data.stream):
        return
    first = int(np.random.default_rng(seed).integers(max(len(data.stream) - tokens, 0) + 1))
    stop = min(first + tokens, len(data.stream))
    bounds = data.offsets[data.documents]
    number = int(np.searchsorted(bounds, first, "right")) - 1
    while first < stop:
        end = min(int(bounds[number + 1]), stop)
        if first < end:
            ids = data.stream[first:end].tolist()
            start, size = bounds[number], bounds[number + 1] - bounds[number]
            yield f"── document {number}, tokens {first - start} to {end - start} of {size} ──"
            yield tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
        first, number = max(first, end), number + 1
