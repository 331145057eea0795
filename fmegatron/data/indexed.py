"""Token files in Megatron's format: `PREFIX.bin` holds tokens back to back, `PREFIX.idx` says where each sequence lies.

    .idx   b"MMIDIDX\\0\\0"  magic, 9 bytes             int32[N]  lengths in tokens
           uint64 = 1       version                    int64[N]  byte offsets into .bin
           uint8            dtype code                 int64[D]  first sequence of each document, then N
           uint64 N, D      sequences, documents + 1   int8[N]   modes, only in multimodal files
                                                                 (all little-endian)

`IndexedDataset(prefix)` reads, `IndexedWriter(prefix, dtype)` writes, never half a file under the final name.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from fmegatron.data import remote
from fmegatron.data.remote import RemoteTokens

Tokens = npt.NDArray[Any]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
PART = 2**22  # tokens copied at once
CODES = {dtype: code for code, dtype in DTYPES.items()}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Megatron's choice: uint16 for a vocabulary under 65,500 tokens, otherwise int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedDataset(Sequence[Tokens]):
    """A read-only sequence of token arrays, mapped from disk, or read by blocks from an address such as s3://bucket/corpus.

    `stream` is the whole `.bin` as one array; `lengths` int32 [N]; `offsets` int64 [N + 1], in tokens; `modes` int8 [N]
    or None; `documents` int64 [D]: sequences `documents[d]:documents[d + 1]` are document d.
    Raises ValueError, naming file and offset, where the two files are damaged or do not belong together.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.dtype, self.lengths, self.offsets, self.documents, self.modes = _read_index(f"{prefix}.idx")
        self.stream = _map_tokens(f"{prefix}.bin", self.dtype, int(self.offsets[-1]))

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokens]: ...
    def __getitem__(self, index: int | slice) -> Tokens | list[Tokens]:
        if isinstance(index, slice):
            return [self.get(i) for i in range(*index.indices(len(self)))]
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> Tokens:
        """Tokens [offset, offset + length) of one sequence, to its end without `length`: a view of the mapped file."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self.prefix}")
        index %= len(self)
        size = int(self.lengths[index])
        stop = size if length is None else offset + length
        if not 0 <= offset <= stop <= size:
            raise ValueError(f"{self.prefix}: tokens {offset}:{stop} of sequence {index}, which has {size}")
        start = int(self.offsets[index])
        return self.stream[start + offset : start + stop]

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexedDataset, (self.prefix,)  # other processes map the file again

    def __repr__(self) -> str:
        return f"IndexedDataset({self.prefix!r}: {len(self)} sequences, {len(self.stream)} tokens, {self.dtype.name})"


class IndexedWriter:
    """Writes `prefix.bin` and `prefix.idx`; both appear, complete, when the `with` block ends without an error.

    >>> with IndexedWriter("corpus", token_dtype(50_000)) as out:
    ...     out.add_document([11, 12, 13])
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<") if np.dtype(dtype).itemsize > 1 else np.dtype(dtype)
        if self.dtype not in CODES:
            raise ValueError(f"{prefix}: dtype {np.dtype(dtype)} has no code in this format; choose from {_names()}")
        self._bin, self._idx = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self._lengths, self._documents = array("i"), array("q", [0])

    def __enter__(self) -> IndexedWriter:
        self._bin.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(_temporary(self._bin), "wb")
        return self

    def add_document(self, *sequences: npt.ArrayLike) -> None:
        """Append one document of any number of sequences (usually one); values must fit the dtype."""
        arrays = [self._checked(np.asarray(sequence)) for sequence in sequences]
        for tokens in arrays:
            self._write(tokens)
            self._lengths.append(len(tokens))
        self._documents.append(len(self._lengths))

    def add_many(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike, sequences: npt.ArrayLike) -> None:
        """Append many documents at once: all their tokens, the length of each sequence, and each document's sequences."""
        values, sizes, counts = self._checked(np.asarray(tokens)), np.asarray(lengths), np.asarray(sequences)
        assert sizes.sum() == len(values) and counts.sum() == len(sizes)
        self._write(values)
        self._documents.frombytes((np.cumsum(counts, dtype=np.int64) + len(self._lengths)).tobytes())
        self._lengths.frombytes(sizes.astype(np.int32).tobytes())

    def add_documents(self, documents: Iterable[npt.ArrayLike]) -> None:
        """Append documents of one sequence each."""
        for tokens in documents:
            self.add_document(tokens)

    def add_index(self, prefix: str | Path) -> None:
        """Append the documents of another pair of files, of the same dtype."""
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype or other.modes is not None:
            kind = other.dtype.name if other.modes is None else "a multimodal file"
            raise ValueError(f"{prefix}: {kind} cannot be appended to {self._bin} of {self.dtype.name}: tokenize anew")
        for first in range(0, len(other.stream), PART):
            self._write(other.stream[first : first + PART])
        self._documents.frombytes((other.documents[1:].astype(np.int64) + len(self._lengths)).tobytes())
        self._lengths.frombytes(other.lengths.astype(np.int32).tobytes())

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        temporary = _temporary(self._bin), _temporary(self._idx)
        try:
            if error is None:
                _flush(self._file)
                with open(temporary[1], "wb") as index:
                    index.write(self._index_bytes())
                    _flush(index)
                # The index is what makes the pair readable: it goes first and comes last.
                self._idx.unlink(missing_ok=True)
                os.replace(temporary[0], self._bin)
                os.replace(temporary[1], self._idx)
        except OSError as failed:
            raise self._no_room(failed) from None
        finally:
            with suppress(OSError):  # what could not be written is thrown away
                self._file.close()
            for path in temporary:
                path.unlink(missing_ok=True)

    def _write(self, tokens: Tokens) -> None:
        try:
            self._file.write(tokens.tobytes())
        except OSError as error:
            raise self._no_room(error) from None

    def _no_room(self, error: OSError) -> OSError:
        done = f"after {len(self._documents) - 1} documents; nothing is left of them: make room and start again"
        return OSError(error.errno, f"{error.strerror} {done}", error.filename or str(self._bin))

    def _checked(self, tokens: Tokens) -> Tokens:
        where = f"{self._bin}: document {len(self._documents) - 1}"
        if tokens.ndim != 1:
            raise ValueError(f"{where} has shape {tokens.shape}; a sequence is one-dimensional")
        if len(tokens) >= 2**31:
            raise ValueError(f"{where} has {len(tokens)} tokens; a sequence holds at most {2**31 - 1}: split it")
        if len(tokens) and self.dtype.kind in "iu":
            limits, low, high = np.iinfo(str(self.dtype)), tokens.min(), tokens.max()
            if tokens.dtype.kind not in "iu" or low < limits.min or high > limits.max:
                raise ValueError(f"{where} holds values {low}..{high} ({tokens.dtype}), outside {self.dtype.name}")
        return tokens.astype(self.dtype)

    def _index_bytes(self) -> bytes:
        lengths = np.frombuffer(self._lengths, np.int32).astype("<i4")
        documents = np.frombuffer(self._documents, np.int64).astype("<i8")
        pointers = ((np.cumsum(lengths, dtype=np.int64) - lengths) * self.dtype.itemsize).astype("<i8")
        header = HEADER.pack(MAGIC, 1, CODES[self.dtype], len(lengths), len(documents))
        return b"".join([header, lengths.tobytes(), pointers.tobytes(), documents.tobytes()])


def _read_index(path: str) -> tuple[np.dtype[Any], Tokens, Tokens, Tokens, Tokens | None]:
    """(dtype, lengths, offsets in tokens, documents, modes) of an index file, or ValueError."""
    data = _map_bytes(path)
    if len(data) < HEADER.size:
        raise _damaged(path, len(data), f"a header of {HEADER.size} bytes, the file ends here")
    magic, version, code, sequences, boundaries = HEADER.unpack(data[: HEADER.size].tobytes())
    if magic != MAGIC or version != 1:
        raise _damaged(path, 0, f"{MAGIC!r} version 1, found {magic!r} version {version}: not an index of this format")
    if code not in DTYPES:
        raise _damaged(path, 17, f"a dtype code of 1 to 8, found {code}")
    dtype = DTYPES[code]
    size = HEADER.size + 12 * sequences + 8 * boundaries
    if len(data) not in (size, size + sequences):
        raise _damaged(path, len(data), f"{size} bytes for {sequences} sequences and {boundaries} document boundaries")

    pointers_at, documents_at = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
    lengths: Tokens = data[HEADER.size : pointers_at].view("<i4")
    pointers: Tokens = data[pointers_at:documents_at].view("<i8")
    documents: Tokens = data[documents_at:size].view("<i8")
    modes: Tokens | None = data[size:].view(np.int8) if len(data) > size else None

    if len(negative := np.flatnonzero(lengths < 0)):
        at = int(negative[0])
        raise _damaged(path, HEADER.size + 4 * at, f"the length of sequence {at}, found {lengths[at]}")
    offsets = np.zeros(sequences + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if len(moved := np.flatnonzero(pointers != offsets[:-1] * dtype.itemsize)):
        at = int(moved[0])
        due = f"sequence {at} to start at byte {offsets[at] * dtype.itemsize} of the .bin, found {pointers[at]}"
        raise _damaged(path, pointers_at + 8 * at, due)
    if not boundaries or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise _damaged(path, documents_at, f"document boundaries that rise from 0 to {sequences}")
    return dtype, lengths, offsets, documents, modes


def _map_tokens(path: str, dtype: np.dtype[Any], tokens: int) -> Tokens | RemoteTokens:
    """The whole token file as one array, once its size is what the index says."""
    size = remote.size_of(path) if remote.is_remote(path) else len(data := _map_bytes(path))
    if size != tokens * dtype.itemsize:
        raise ValueError(
            f"{path}: {size} bytes, but {Path(path).stem}.idx expects {tokens} tokens of {dtype.name},"
            f" {tokens * dtype.itemsize} bytes: truncated, or not a pair; copy both files again or tokenize anew"
        )
    return RemoteTokens(path, dtype, tokens) if remote.is_remote(path) else data.view(dtype)


def _map_bytes(path: str) -> npt.NDArray[np.uint8]:
    if remote.is_remote(path):
        return remote.read_bytes(path)
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; a prefix names two files, PREFIX.bin and PREFIX.idx")
    if Path(path).stat().st_size == 0:
        return np.empty(0, np.uint8)  # an empty file cannot be mapped
    return np.memmap(path, np.uint8, "r").view(np.ndarray)


def _damaged(path: str, offset: int, expected: str) -> ValueError:
    return ValueError(f"{path} at byte {offset}: expected {expected}; copy the file again or tokenize anew")


def _names() -> str:
    return ", ".join(dtype.name for dtype in CODES)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
