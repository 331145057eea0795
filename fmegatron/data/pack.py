"""Packing: whole examples of any length laid into rows, by an index that is built once and kept on disk.

    examples   0: ▄▄▄▄▄   1: ▄▄▄▄▄▄▄▄   2: ▄▄▄   3: ▄▄          starts [0, 2, 4]       row r holds the examples
    rows       │ 0 0 0 0 0 2 2 2 │  │ 1 1 1 1 1 1 1 1 3 3 │     items  [0, 2, 1, 3]    items[starts[r]:starts[r + 1]]

    first_fit    as many examples a row as fit, each in the first row with room for it
    one_each     one example a row, the rest padding
    by_length    rows as long as their longest example, gathered in steps of at most so many tokens

Nothing is cut unless its user says so. An example of n tokens takes n - 1 places: its last token is only a label.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from fmegatron.data.samples import Row, permutation

Ints = npt.NDArray[np.int64]
Piece = tuple[npt.NDArray[Any], npt.NDArray[Any]]  # tokens [n]; weights [n], of each token as a label


class Examples(Protocol):
    """Tokenized examples: `lengths` int64, the places that each takes in a row (its tokens less one)."""

    @property
    def lengths(self) -> Ints: ...
    def __getitem__(self, index: int, /) -> Piece: ...


class PackIndex(NamedTuple):
    """Row r holds examples `items[starts[r]:starts[r + 1]]`."""

    starts: Ints  # [rows + 1]
    items: Ints  # [examples]


class StepIndex(NamedTuple):
    """Step s holds examples `items[starts[s]:starts[s + 1]]`, a row each, of `lengths[s]` places; -1 is an empty row."""

    starts: Ints  # [steps + 1]
    items: Ints
    lengths: Ints  # [steps]


def first_fit(lengths: Ints, seq: int, seed: int) -> PackIndex:
    """Each example, in an order drawn from the seed, goes to the first row of `seq` places that has room for it.

    Raises ValueError for an example that is longer than a row. Time is proportional to n log n.
    """
    _fits(lengths, seq)
    size = 1 << max(len(lengths) - 1, 1).bit_length()
    room = [seq] * (2 * size)  # a tree of maxima: node i is over 2 i and 2 i + 1, the leaves are rows
    row_of = np.zeros(len(lengths), np.int64)
    order = permutation(len(lengths), seed, 0)
    for example, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        node = 1
        while node < size:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        row_of[example] = node - size
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    items = order[np.argsort(row_of[order], kind="stable")]
    return PackIndex(_starts(np.bincount(row_of)), items)


def one_each(lengths: Ints, seq: int) -> PackIndex:
    """A row for each example. Raises ValueError for one that is longer than a row."""
    _fits(lengths, seq)
    return PackIndex(np.arange(len(lengths) + 1), np.arange(len(lengths)))


def by_length(
    lengths: Ints, tokens: int, seed: int, *, rows: int = 1, multiple: int = 8, most: int | None = None
) -> StepIndex:
    """Steps of at most `tokens` places: examples of like length, rows as long as the longest, up to a multiple, or `most`.

    The number of rows of each step is a multiple of `rows` (data-parallel ranks times microbatches), so every mesh whose
    ranks divide it sees the same steps. Steps come in an order drawn from the seed.
    Raises ValueError where `rows` of the longest example are more than `tokens`.
    """
    padded = -(-lengths // multiple) * multiple
    padded = padded if most is None else np.maximum(np.minimum(padded, most), lengths)
    if len(lengths) and rows * (longest := int(padded.max())) > tokens:
        raise ValueError(
            f"a budget of {tokens} tokens: the longest example takes {longest} and a step has at least {rows} rows of it, "
            f"so at least {rows * longest}"
        )
    order = permutation(len(lengths), seed, 0)
    order = order[np.argsort(-padded[order], kind="stable")]  # long ones first; like ones stay in the drawn order
    groups, sizes, first = [], [], 0
    while first < len(order):
        size = int(padded[order[first]])
        group = order[first : first + tokens // size // rows * rows]
        first += len(group)
        groups.append(np.pad(group, (0, -len(group) % rows), constant_values=-1))
        sizes.append(size)
    deal = permutation(len(groups), seed, 1).tolist()
    counts = np.array([len(groups[i]) for i in deal], np.int64)
    items = np.concatenate([groups[i] for i in deal]) if deal else np.zeros(0, np.int64)
    return StepIndex(_starts(counts), items, np.array(sizes, np.int64)[deal])


class Packed:
    """Rows of `seq` places by a pack index; `row(r)` for r beyond the last is padding.

    Row: tokens, labels, positions, documents int64 [seq], weights float32 [seq]. `documents` counts examples within the
    row, so attention does not cross them; what is left is padding of weight 0 and a document of its own.
    """

    def __init__(self, examples: Examples, index: PackIndex, seq: int, *, reset_positions: bool = True) -> None:
        self.examples, self.index, self.seq, self.reset_positions = examples, index, seq, reset_positions

    def __len__(self) -> int:
        return len(self.index.starts) - 1

    def row(self, number: int) -> Row:
        """Row `number` of the index."""
        first, stop = self.index.starts[number : number + 2] if number < len(self) else (0, 0)
        pieces = [self.examples[int(i)] for i in self.index.items[first:stop]]
        return lay(pieces, self.seq, self.reset_positions) | {"sample": np.array(number)}


class Steps:
    """Rows of steps of unequal size, without end: `step(consumed)` are the numbers of the next step's rows.

    The steps are dealt in another order in each epoch, found by a binary search: nothing is remembered.
    """

    def __init__(self, examples: Examples, index: StepIndex, seed: int, *, reset_positions: bool = True) -> None:
        if not len(index.items):
            raise ValueError("no examples: nothing to make steps of")
        self.examples, self.index, self.seed, self.reset_positions = examples, index, seed, reset_positions
        self._deals: dict[int, tuple[Ints, Ints]] = {}
        self._lock = threading.Lock()

    def step(self, consumed: int) -> range:
        """The sample numbers of the step that `consumed` samples, those of whole steps, have come before."""
        step = self.around(consumed)
        if step.start != consumed:
            raise ValueError(f"{consumed} samples end within a step, the last one began at {step.start}")
        return step

    def around(self, number: int) -> range:
        """The sample numbers of the step that sample `number` belongs to."""
        epoch, at = divmod(number, len(self.index.items))
        starts, _ = self._deal(epoch)
        step = int(np.searchsorted(starts, at, side="right")) - 1
        return range(number - at + int(starts[step]), number - at + int(starts[step + 1]))

    def row(self, number: int) -> Row:
        """The row of sample `number`, as long as its step says."""
        epoch, at = divmod(number, len(self.index.items))
        starts, deal = self._deal(epoch)
        step = int(np.searchsorted(starts, at, side="right")) - 1
        example = int(self.index.items[self.index.starts[deal[step]] + at - starts[step]])
        pieces = [self.examples[example]] if example >= 0 else []
        return lay(pieces, int(self.index.lengths[deal[step]]), self.reset_positions) | {"sample": np.array(number)}

    def _deal(self, epoch: int) -> tuple[Ints, Ints]:
        with self._lock:  # the last two epochs are kept
            if epoch not in self._deals:
                deal = permutation(len(self.index.lengths), self.seed, 2 + epoch)
                last = dict(list(self._deals.items())[-1:])
                self._deals = last | {epoch: (_starts(np.diff(self.index.starts)[deal]), deal)}
            return self._deals[epoch]


class Sizes(NamedTuple):
    """Of steps of unequal size: at most `tokens` places, a multiple of `rows` rows, as long as a multiple of `multiple`."""

    tokens: int
    rows: int
    multiple: int


def stepped(
    examples: Examples, seq: int, seed: int, sizes: Sizes, folder: str | Path, key: str, reset_positions: bool = True
) -> Steps:
    """Examples of at most `seq` places in steps, by an index that is kept in `folder` under `key`, seed and sizes."""

    def index() -> dict[str, Any]:
        rest = {"rows": sizes.rows, "multiple": sizes.multiple, "most": seq}
        return by_length(examples.lengths, sizes.tokens, seed, **rest)._asdict()

    kept = cached(folder, f"{key} steps seq={seq} seed={seed} {tuple(sizes)}", index)
    return Steps(examples, StepIndex(**kept), seed, reset_positions=reset_positions)


def lay(pieces: Sequence[Piece], seq: int, reset_positions: bool = True) -> Row:
    """Whole examples side by side in a row of `seq` places, as `Packed` describes it."""
    tokens, labels, documents = (np.zeros(seq, np.int64) for _ in range(3))
    positions, weights = np.arange(seq), np.zeros(seq, np.float32)
    at = 0
    for number, (text, wanted) in enumerate(pieces):
        here = slice(at, at + len(text) - 1)
        tokens[here], labels[here], weights[here] = text[:-1], text[1:], wanted[1:]
        documents[here] = number
        if reset_positions:
            positions[here] -= at
        at = here.stop
    documents[at:] = len(pieces)
    if reset_positions:
        positions[at:] -= at
    return dict(tokens=tokens, labels=labels, weights=weights, positions=positions, documents=documents)


def cached(folder: str | Path, key: str, build: Callable[[], dict[str, npt.NDArray[Any]]]) -> dict[str, npt.NDArray[Any]]:
    """Arrays that `build` makes, kept below `folder` under a hash of `key` and mapped from there.

    They appear whole or not at all; of several processes that build at once, the first to finish is taken.
    """
    root = Path(folder) / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not root.is_dir():
        scratch = root.with_name(f".{root.name}.{uuid.uuid4().hex}.tmp")
        scratch.mkdir(parents=True)
        try:
            for name, array in build().items():
                np.save(scratch / f"{name}.npy", array)
            (scratch / "key.txt").write_text(key)
            os.rename(scratch, root)
        except OSError:
            if not root.is_dir():  # another process may have been faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(root.glob("*.npy"))}


def _starts(counts: npt.NDArray[Any]) -> Ints:
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def _fits(lengths: Ints, seq: int) -> None:
    if len(long := np.flatnonzero(lengths > seq)):
        at = int(long[0])
        raise ValueError(
            f"{len(long)} of {len(lengths)} examples are longer than a row of {seq}, the first is example {at} of "
            f"{lengths[at]} places: raise seq to {lengths.max()}, or drop or truncate them"
        )
