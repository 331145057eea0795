"""Megatron's GPT data set: the same rows in the same order as megatron-core's, for the same files, seed and sizes.

    parts = split_bounds("969,30,1", len(data))              the sequences of train, valid and test
    rows = GptSamples(data, GptOptions(seq=1024, seed=1234), documents=np.arange(*parts[0]), samples=50_000, eod=0)
    rows.row(7)                                              as in samples.py
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fmegatron.data.gpt_indices import GptIndex, gpt_index
from fmegatron.data.index_cache import cached
from fmegatron.data.samples import Row


class Sequences(Protocol):
    """An IndexedDataset, or what gives sequences like one."""

    prefix: str

    @property
    def lengths(self) -> npt.NDArray[Any]: ...
    def get(self, index: int, offset: int = 0, length: int | None = None) -> npt.NDArray[Any]: ...


@dataclass(frozen=True)
class GptOptions:
    """Megatron's options of a data set: --seq-length, --seed, --reset-position-ids, --eod-mask-loss and two of its config.

    Without `extra_token` a row reads seq tokens and its last label counts for nothing; without `drop_last` the last row of
    an epoch may be padded.
    """

    seq: int
    seed: int
    reset_positions: bool = False
    eod_mask_loss: bool = False
    extra_token: bool = True
    drop_last: bool = True


class GptSamples:
    """`len(rows)` rows, each as in `samples.Samples`; drawn for `samples` of them, or for one epoch.

    `documents` are the sequences to draw from (all of them, unless given). A row's `documents` change, and `positions` start
    anew, after each `eod`, as Megatron resets its attention mask; without an `eod`, at each sequence. The index arrays are kept
    in `cache`. Raises ValueError for ids of `vocab_size` or more.
    """

    def __init__(
        self,
        data: Sequences,
        options: GptOptions,
        documents: npt.NDArray[np.integer[Any]] | None = None,
        samples: int | None = None,
        *,
        eod: int | None = None,
        vocab_size: int | None = None,
        cache: str | Path | None = None,
    ) -> None:
        self.data, self.options, self.eod, self.vocab_size = data, options, eod, vocab_size
        o, lengths = options, data.lengths
        chosen = np.arange(len(lengths), dtype=np.int32) if documents is None else documents
        if not len(chosen):
            raise ValueError(f"{data.prefix}: no sequence in this split; {len(lengths)} in all: choose other split weights")

        def build() -> GptIndex:
            return gpt_index(lengths, chosen, o.seq, o.seed, samples=samples, extra_token=o.extra_token, drop_last=o.drop_last)

        facts = {"path": data.prefix, "samples": samples, "lengths": zlib.crc32(lengths.tobytes()),
                 "documents": [len(chosen), zlib.crc32(chosen.astype(np.int32).tobytes())], **asdict(o)}  # fmt: skip
        names = ("document_index", "sample_index", "shuffle_index")
        self.index = GptIndex(*cached(cache, "gpt", facts, names, build))

    def __len__(self) -> int:
        return len(self.index.shuffle)

    def row(self, number: int) -> Row:
        """Row `number`, 0 to len - 1."""
        if not 0 <= number < len(self):
            raise ValueError(f"{self.data.prefix}: row {number} of {len(self)}: this index was drawn for fewer samples")
        o = self.options
        text, ends = self._text(int(self.index.shuffle[number]))
        missing = o.seq + o.extra_token - len(text)
        text = np.append(text, np.full(missing, -1, np.int64)) if missing else text
        tokens, labels = (text[:-1], text[1:]) if o.extra_token else (text, np.append(text[1:], -1))
        weights = (labels >= 0).astype(np.float32)
        last = ends[: o.seq] if self.eod is None else tokens == self.eod  # of its document
        if o.eod_mask_loss:
            weights[last] = 0
        numbers = np.cumsum(last) - last
        positions = np.arange(o.seq)
        if o.reset_positions:
            begins = np.zeros(o.seq, np.int64)
            begins[1:] = positions[1:] * last[:-1]
            positions = positions - np.maximum.accumulate(begins)
        return dict(tokens=np.maximum(tokens, 0), labels=np.maximum(labels, 0), weights=weights, positions=positions,
                    documents=numbers, sample=np.array(number))  # fmt: skip

    def _text(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The tokens of a sample, int64, and which of them, in a row, is the last of its sequence."""
        (first, offset), (last, stop) = self.index.sample[index : index + 2].tolist()
        extra = int(self.options.extra_token)
        found: list[npt.NDArray[Any]] = []
        for place in range(first, last + 1):
            begin, end = offset if place == first else 0, stop + extra if place == last else None
            found.append(self.data.get(int(self.index.document[place]), begin, None if end is None else end - begin))
        ends = np.zeros(self.options.seq + 1, bool)
        ends[np.cumsum([len(part) for part in found[:-1]], dtype=np.int64) - 1] = len(found) > 1
        text = np.concatenate(found, dtype=np.int64)
        if self.vocab_size is not None and len(text) and not 0 <= text.min() <= text.max() < self.vocab_size:
            raise ValueError(
                f"{self.data.prefix}: ids {text.min()}..{text.max()} in sequences {self.index.document[first : last + 1]}, but"
                f" the vocabulary ends at {self.vocab_size - 1}: were these files made with another tokenizer?"
            )
        return text, ends


class Mock:
    """Megatron's mock data: 100,000 sequences of 1, 2, 3, … that end with `eod`; no file is read."""

    prefix = "mock"

    def __init__(self, vocab_size: int, eod: int) -> None:
        self.vocab_size, self.eod = vocab_size, eod
        self.lengths = np.random.default_rng(0).integers(1, 4096, 100_000, np.int32)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> npt.NDArray[np.int64]:
        """Tokens [offset, offset + length) of one sequence."""
        size = int(self.lengths[index])
        whole = np.append(np.arange(1, size) % self.vocab_size, self.eod)
        return whole[offset : size if length is None else offset + length]


def split_bounds(split: str, size: int) -> list[tuple[int, int] | None]:
    """Megatron's split string, "969,30,1" for train, valid and test: [first, stop) of each in `size` sequences, or None.

    Raises ValueError for a string that is no such weights.
    """
    if not re.fullmatch(r"\s*\d*\.?\d+(\s*[,/ ]\s*\d*\.?\d+){0,2}\s*", split):
        raise ValueError(f"split {split!r}: one to three weights, of train, valid and test, such as 969,30,1")
    weights = np.array(([float(word) for word in re.findall(r"[.0-9]+", split)] + [0.0, 0.0])[:3])
    if weights.sum() == 0:
        raise ValueError(f"split {split!r}: all weights are 0")
    ends: Sequence[float] = reduce(lambda ends, weight: [*ends, ends[-1] + weight], (weights / weights.sum()).tolist(), [0.0])
    pairs = zip(ends, ends[1:], strict=False)
    return [None if high <= low else (round(low * size), round(high * size)) for low, high in pairs]
