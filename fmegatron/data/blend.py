"""Rows of several data sets, mixed by weight: row n is a row of one of them, whichever lags most (blending.py)."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from fmegatron.data.batches import Rows
from fmegatron.data.blending import Blended, blend_index
from fmegatron.data.cycle import FiniteRows
from fmegatron.data.index_cache import cached
from fmegatron.data.samples import HeldOut, Row

SURPLUS = 0.005  # Megatron's mid_level_dataset_surplus: rows drawn of each data set beyond its share


class Blend:
    """A blend without end: its index grows, by doubling, to the largest row that was asked for. Any thread may ask."""

    def __init__(self, rows: Sequence[Rows], weights: Sequence[float]) -> None:
        self.rows, self.weights = rows, weights
        self._index = blend_index(weights, 1024)
        self._lock = threading.Lock()

    def row(self, number: int) -> Row:
        """Row `number`, of the blend's own count."""
        if number < 0:
            raise ValueError(f"sample number {number}: must not be negative")
        with self._lock:
            if number >= len(self._index[0]):
                self._index = blend_index(self.weights, 1 << (number + 1).bit_length())
            which, sample = self._index[0][number], self._index[1][number]
        return self.rows[which].row(int(sample)) | {"sample": np.array(number)}


class GptBlend:
    """Megatron's blend of `len(rows)` rows: its index is made once, and kept in `cache`."""

    def __init__(self, rows: Sequence[Rows], index: Blended) -> None:
        self.rows, self.index = rows, index

    def __len__(self) -> int:
        return len(self.index[0])

    def row(self, number: int) -> Row:
        """Row `number`, 0 to len - 1."""
        if not 0 <= number < len(self):
            raise ValueError(f"row {number} of {len(self)}: this blend was made for fewer samples")
        which, sample = int(self.index[0][number]), int(self.index[1][number])
        return self.rows[which].row(sample) | {"sample": np.array(number)}


class HeldOuts:
    """Held-out rows of several data sets, one after another, `batch` at a time; as a HeldOut else."""

    def __init__(self, parts: Sequence[HeldOut], limit: int | None = None) -> None:
        self.parts, self.batch, self.limit = parts, parts[0].batch, limit
        self.ends = np.cumsum([part.rows for part in parts])
        self.rows = int(self.ends[-1]) if limit is None else min(int(self.ends[-1]), limit)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.rows // self.batch)

    def row(self, number: int) -> Row:
        """Row `number`; padding from `rows` on."""
        if number >= self.rows:
            return self.parts[-1].row(self.parts[-1].rows) | {"sample": np.array(number)}
        which = int(np.searchsorted(self.ends, number, "right"))
        start = int(self.ends[which]) - self.parts[which].rows
        return self.parts[which].row(number - start) | {"sample": np.array(number)}

    def numbers(self) -> Iterator[range]:
        """The row numbers of each batch, the last one's padding included."""
        return (range(i * self.batch, (i + 1) * self.batch) for i in range(len(self)))

    @property
    def bytes(self) -> int | None:
        """Bytes of text that the predicted tokens stand for; None where that is not known, or only some rows are read."""
        found = [part.bytes for part in self.parts]
        return None if self.rows < self.ends[-1] or None in found else sum(size for size in found if size is not None)


def gpt_blend(
    weights: Mapping[str, float | None],
    size: int | None,
    make: Callable[[str, int | None], FiniteRows],
    *,
    surplus: float = SURPLUS,
    cache: str | Path | None = None,
) -> FiniteRows:
    """megatron-core's blend of data sets, {prefix: weight}; `make(prefix, samples)` draws one of them.

    All weights None: one epoch of each, mixed in proportion to their rows, `size` of them at most. Otherwise `size` is
    needed. Raises ValueError where a data set gives fewer rows than the blend asks of it.
    """
    names, given = list(weights), list(weights.values())
    if not names:
        raise ValueError("a blend of no data sets: name at least one")
    if all(weight is None for weight in given):
        if len(names) == 1:
            return make(names[0], size)
        rows = [make(name, None) for name in names]
        counts = [len(part) for part in rows]
        total = None if size is None else min(size, sum(counts))
        wanted = np.array(counts, np.float64)
    else:
        if size is None or any(weight is None for weight in given):
            raise ValueError("a blend with weights needs a weight for each data set, and a number of samples")
        if min(float(weight or 0) for weight in given) <= 0:
            raise ValueError(f"weights {given} of a blend: all above 0; leave out what is not to be read")
        wanted = _shares(np.array(given, np.float64))
        shares = [math.ceil(size * weight) for weight in wanted]
        rows = [make(name, math.ceil(share * (1 + surplus))) for name, share in zip(names, shares, strict=True)]
        total = sum(shares)
    description = {"data sets": names, "rows": [len(part) for part in rows], "weights": wanted.tolist(), "size": total}

    def build() -> Blended:
        return blend_index(wanted.astype(np.int64)) if total is None else blend_index(_shares(wanted), total)

    index = cached(cache, "blend", description, ("dataset_index", "dataset_sample_index"), build)
    asked = np.bincount(index[0], minlength=len(rows))
    for name, part, count in zip(names, rows, asked, strict=True):
        if count > len(part):
            raise ValueError(f"{name}: the blend asks for {count} rows of {len(part)}: raise surplus, now {surplus}")
    return GptBlend(rows, (index[0], index[1]))


def _shares(weights: np.ndarray) -> np.ndarray:
    return weights / np.sum(weights)
