"""Token files in object storage, at any address that fsspec knows (s3://bucket/corpus): blocks on demand, the last kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fmegatron.data.text import needed

BLOCK = 2**22  # bytes asked for at once: a request costs tens of milliseconds whatever its size
KEPT = 16  # blocks
REMEDY = "copy both files there again, and go on from the last checkpoint"


def is_remote(prefix: str | Path) -> bool:
    """Whether a prefix is an address rather than a path."""
    return "://" in str(prefix)


class RemoteTokens:
    """The tokens of a remote `.bin` as a sequence: slices with step 1, and integer arrays, like a numpy array."""

    def __init__(self, address: str, dtype: np.dtype[Any], size: int, block: int = BLOCK, kept: int = KEPT) -> None:
        self.address, self.dtype, self.size, self.kept = address, dtype, size, kept
        self.per_block = max(block // dtype.itemsize, 1)
        self._blocks: OrderedDict[int, npt.NDArray[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, where: slice | npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        places = np.arange(*where.indices(self.size)) if isinstance(where, slice) else where
        found = np.empty(len(places), self.dtype)
        blocks = places // self.per_block
        for number in np.unique(blocks):
            inside = blocks == number
            found[inside] = self._block(int(number))[places[inside] - number * self.per_block]
        return found

    @cached_property
    def _file(self) -> Any:
        return open_file(self.address)

    def _block(self, number: int) -> npt.NDArray[Any]:
        with self._lock:
            if number not in self._blocks:
                start = number * self.per_block
                count = min(self.per_block, self.size - start)
                first, stop = start * self.dtype.itemsize, (start + count) * self.dtype.itemsize
                try:
                    data = self._file[0].cat_file(self._file[1], start=first, end=stop)
                except Exception as error:  # the file system's own, or its client's
                    said = " ".join(str(error).split()) or type(error).__name__
                    raise ValueError(f"{self.address} at byte {first}: not read ({said}); {REMEDY}") from None
                if len(data) != stop - first:
                    said = f"{len(data)} bytes where the index expects {stop - first}"
                    raise ValueError(f"{self.address} at byte {first}: {said}: it was cut or replaced; {REMEDY}")
                self._blocks[number] = np.frombuffer(data, self.dtype)
            self._blocks.move_to_end(number)
            while len(self._blocks) > self.kept:
                self._blocks.popitem(last=False)
            return self._blocks[number]

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteTokens, (self.address, self.dtype, self.size, self.per_block * self.dtype.itemsize, self.kept)


def open_file(address: str) -> tuple[Any, str]:
    """(the file system, the path in it) of an address. Raises ValueError where its package is missing."""
    fsspec = needed("fsspec", address)
    try:
        return tuple(fsspec.core.url_to_fs(address))
    except (ImportError, ValueError) as error:
        raise ValueError(f"{address}: {error}; for S3: pip install 'fmegatron[s3]'") from None


def read_bytes(address: str) -> npt.NDArray[np.uint8]:
    """A whole remote file. Raises ValueError where there is none."""
    return np.frombuffer(_found(address, "cat_file"), np.uint8)


def size_of(address: str) -> int:
    """Bytes of a remote file. Raises ValueError where there is none."""
    return int(_found(address, "size"))


def _found(address: str, method: str) -> Any:
    files, path = open_file(address)
    try:
        return getattr(files, method)(path)
    except FileNotFoundError:
        raise ValueError(f"{address} does not exist; a prefix names two files, PREFIX.bin and PREFIX.idx") from None
    except Exception as error:  # the file system's own, or its client's
        raise ValueError(f"{address}: not read ({' '.join(str(error).split())}); is it right, and may you read it?") from None
