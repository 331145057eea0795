"""Between Megatron's `.bin/.idx` and MDS folders: one sample a document, without loss.

Columns: `tokens`, an ndarray of the file's dtype (bytes, and `dtype` beside it, where a document is empty: an ndarray of MDS
is not); `lengths`, JSON, where documents have other than one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmegatron.data.indexed import IndexedDataset, IndexedWriter, Tokens
from fmegatron.data.mds.streams import Stream, Streams
from fmegatron.data.mds.writer import MDSWriter


def to_mds(prefix: str | Path, out: str | Path, **options: Any) -> int:
    """Write the documents of `prefix.bin` and `prefix.idx` to an MDS folder or URL; their number. options: of `MDSWriter`."""
    data = IndexedDataset(prefix)
    if data.modes is not None:
        raise ValueError(f"{prefix}.idx holds modes of a multimodal file: these are not converted")
    bounds = data.documents
    ends = data.offsets[bounds]
    empty, single = bool((np.diff(ends) == 0).any()), bool((np.diff(bounds) == 1).all())
    columns = {"tokens": "bytes", "dtype": "str"} if empty else {"tokens": f"ndarray:{data.dtype.name}"}
    with MDSWriter(out, columns | ({} if single else {"lengths": "json"}), **options) as file:
        for document in range(len(bounds) - 1):
            tokens = np.asarray(data.stream[ends[document] : ends[document + 1]])
            sample: dict[str, Any] = {"tokens": tokens.tobytes(), "dtype": data.dtype.name} if empty else {"tokens": tokens}
            if not single:
                sample["lengths"] = data.lengths[bounds[document] : bounds[document + 1]].tolist()
            file.write(sample)
    return len(bounds) - 1


def to_indexed(folder: str | Path, prefix: str | Path, column: str = "tokens", dtype: str | None = None) -> int:
    """Write the samples of a local MDS folder as documents to `prefix.bin` and `prefix.idx`; their number.

    column: of one-dimensional arrays of one dtype, or of bytes that are numbers of `dtype`. Raises ValueError otherwise.
    """
    streams = Streams([Stream(str(folder))])
    try:
        documents = (_document(streams, number, column, dtype) for number in range(len(streams)))
        return _write(streams, documents, prefix)
    finally:
        streams.cache.close()


def _write(streams: Streams, documents: Iterator[tuple[Tokens, Sequence[int]]], prefix: str | Path) -> int:
    first, lengths = next(documents)
    with IndexedWriter(prefix, first.dtype) as file:
        tokens, count = first, 0
        while True:
            if tokens.dtype != first.dtype:
                raise ValueError(f"{streams.where(count)}: {tokens.dtype.name}, those before it are {first.dtype.name}")
            if len(tokens) != sum(lengths) or min(lengths, default=0) < 0:
                raise ValueError(f"{streams.where(count)}: {len(tokens)} tokens, its lengths say {sum(lengths)}")
            file.add_document(*np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else [])
            count += 1
            if (following := next(documents, None)) is None:
                return count
            tokens, lengths = following


def _document(streams: Streams, number: int, column: str, dtype: str | None) -> tuple[Tokens, Sequence[int]]:
    """A sample's tokens, and the lengths of its sequences."""
    sample: Mapping[str, Any] = streams.sample(number)
    if column not in sample:
        raise ValueError(f"{streams.where(number)}: no column {column!r}, choose of {', '.join(sample)}")
    tokens, kind = sample[column], dtype or sample.get("dtype")
    if isinstance(tokens, bytes) and kind is not None and len(tokens) % np.dtype(kind).itemsize == 0:
        tokens = np.frombuffer(tokens, kind)
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1:
        hint = ": name their dtype" if isinstance(tokens, bytes) else ""
        raise ValueError(f"{streams.where(number)}: column {column!r} holds {type(tokens).__name__}, not tokens{hint}")
    return tokens, sample.get("lengths", [len(tokens)])
