"""A shard file: any of its samples from its number.

    uint32       n, the number of samples
    uint32[n+1]  where each sample begins in this file; the last is the file's size
    JSON         what the index says of the columns
    samples      each: uint32 size of every column without a fixed one, then the values, columns in the index's order
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fmegatron.data.mds.index import ShardInfo

Sample = dict[str, Any]
REMEDY = "copy the shard again, or write it anew"


class Shard(Sequence[Sample]):
    """A read-only sequence of samples, {column: value}, mapped from disk.

    Raises ValueError, naming file and offset, where the file is not what the index says. Hashes are checked where a file
    is fetched (`cache.py`), not here. `data`: the file's bytes, where it does not lie on the disk.
    """

    def __init__(self, path: str | Path, info: ShardInfo, *, allow_unsafe: bool = False, data: bytes | None = None) -> None:
        self.path, self.info = Path(path), info
        try:
            self.columns = info.columns(allow_unsafe)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        self._data = _mapped(self.path, info.raw_data.bytes) if data is None else np.frombuffer(data, np.uint8)
        self._offsets = self._read_offsets()
        self._sizes = [known.size for _, known in self.columns]
        self._head = 4 * self._sizes.count(None)
        self._fixed = sum(size for size in self._sizes if size is not None)

    def __len__(self) -> int:
        return self.info.samples

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.path}")
        return self.sample(index % len(self))

    def sample(self, index: int, column: str | None = None) -> Any:
        """One sample, or one column of it."""
        begin, end = self._offsets[index : index + 2].tolist()
        data = self._data[begin:end].tobytes()
        out, at = {}, self._head
        for (name, known), size in zip(self.columns, self._column_sizes(data, begin, index), strict=True):
            if column in (None, name):
                try:
                    out[name] = known.decode(data[at : at + size])
                except Exception as error:  # of a pickle, any
                    where = f"sample {index}, column {name!r} at byte {begin + at}"
                    raise ValueError(f"{self.path}: {where}: not a {known.name}: {error}; {REMEDY}") from None
            at += size
        return out if column is None else out[column]

    def _column_sizes(self, data: bytes, begin: int, index: int) -> list[int]:
        heads = [int.from_bytes(data[at : at + 4], "little") for at in range(0, self._head, 4)]
        due = self._head + self._fixed + sum(heads)
        if len(data) != due:
            raise self._damaged(begin, f"{due} bytes of sample {index} as its columns say, there are {len(data)}")
        rest = iter(heads)
        return [next(rest) if size is None else size for size in self._sizes]

    def _read_offsets(self) -> npt.NDArray[np.uint32]:
        samples, size = self.info.samples, len(self._data)
        begin = 4 * (samples + 2)
        if size < begin or (found := int(self._data[:4].view("<u4")[0])) != samples:
            what = "a shorter file" if size < begin else str(found)
            raise self._damaged(0, f"{samples} samples as in the index, found {what}")
        offsets = self._data[4:begin].view("<u4")
        if len(wrong := np.flatnonzero(offsets[1:] < offsets[:-1])):
            at = int(wrong[0]) + 1
            raise self._damaged(4 + 4 * at, f"an offset from {offsets[at - 1]}, found {offsets[at]}")
        if offsets[0] < begin:
            raise self._damaged(4, f"the first sample behind byte {begin}, found {offsets[0]}")
        if offsets[-1] != size:
            raise self._damaged(begin - 4, f"the last sample to end with the file at {size}, found {offsets[-1]}")
        return offsets

    def _damaged(self, at: int, expected: str) -> ValueError:
        return ValueError(f"{self.path} at byte {at}: expected {expected}; {REMEDY}")


def _mapped(path: Path, size: int) -> npt.NDArray[np.uint8]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist, but the index names it: copy it, or name the remote folder that has it")
    if path.stat().st_size != size:
        found = path.stat().st_size
        raise ValueError(f"{path}: {found} bytes, the index says {size}: truncated or of another index; {REMEDY}")
    return np.memmap(path, np.uint8, "r").view(np.ndarray)
