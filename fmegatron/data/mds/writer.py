"""Writes MDS folders: shard files up to a size, then index.json, which makes them readable and comes last.

    with MDSWriter("corpus", {"tokens": "ndarray:uint16"}, compression="zstd", hashes=("xxh64",)) as out:
        out.write({"tokens": tokens})

`out` is a folder or a URL that fsspec knows (s3://...).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fmegatron.data.mds import codecs, index
from fmegatron.data.mds.encodings import encoding
from fmegatron.data.mds.files import write_whole
from fmegatron.data.mds.index import FileInfo, ShardInfo
from fmegatron.data.mds.remote import is_remote, upload

LARGEST = 2**32 - 1  # offsets are uint32


class MDSWriter:
    """Samples, one after another, to a new MDS folder; `index.json` appears when the `with` block ends without an error.

    columns {name: encoding}; size_limit in bytes of a shard (None: one shard); a level of compression follows its name.
    Raises ValueError for what the format cannot hold, or where the folder has an index already.
    """

    def __init__(
        self,
        out: str | Path,
        columns: Mapping[str, str],
        *,
        compression: str | None = None,
        hashes: Sequence[str] = (),
        size_limit: int | None = 2**26,
        allow_unsafe: bool = False,
    ) -> None:
        self.out = str(out)
        if not columns:
            raise ValueError(f"{out}: no columns, choose at least one, such as {{'tokens': 'ndarray:int32'}}")
        if size_limit is not None and not 1 <= size_limit <= LARGEST:
            raise ValueError(f"{out}: size_limit {size_limit}: 1 to {LARGEST} bytes, or None")
        self._columns = [(name, encoding(columns[name], allow_unsafe=allow_unsafe)) for name in sorted(columns)]
        self._ending = "." + codecs.extension(compression) if compression else ""
        for name in hashes:
            codecs.digest(name, b"")
        self._blank = ShardInfo(
            samples=0,
            column_names=tuple(name for name, _ in self._columns),
            column_encodings=tuple(known.name for _, known in self._columns),
            column_sizes=tuple(known.size for _, known in self._columns),
            raw_data=FileInfo("", 0, {}),
            zip_data=None,
            compression=compression,
            hashes=tuple(sorted(set(hashes))),
            size_limit=size_limit,
        )
        self._limit = size_limit or LARGEST
        self._header = index.header(self._blank.table())
        self._shards: list[ShardInfo] = []
        self._samples: list[bytes] = []
        self._size = 8 + len(self._header)  # of the shard so far, had it no samples

    def __enter__(self) -> MDSWriter:
        if is_remote(self.out):
            self._folder = Path(tempfile.mkdtemp(prefix="mds-"))
            self._uploads: list[Future[None]] = []
            self._pool = ThreadPoolExecutor(4, thread_name_prefix="mds-upload")
        else:
            self._folder = Path(self.out)
            if (self._folder / index.INDEX).exists():
                raise ValueError(f"{self._folder / index.INDEX} exists: write to a new folder, or delete this one")
            self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def write(self, sample: Mapping[str, Any]) -> None:
        """Append one sample: a value for each column, of its type."""
        data = self._encode(sample)
        if self._samples and self._size + len(data) + 4 > self._limit:
            self._flush()
        if self._size + len(data) + 4 > LARGEST:
            raise ValueError(f"{self._where()} takes {len(data)} bytes; a shard holds {LARGEST}: split it")
        self._samples.append(data)
        self._size += len(data) + 4

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        try:
            if error is None:
                if self._samples:
                    self._flush()
                self._finish()
        finally:
            if is_remote(self.out):
                self._pool.shutdown(cancel_futures=True)
                shutil.rmtree(self._folder, ignore_errors=True)

    def _encode(self, sample: Mapping[str, Any]) -> bytes:
        if sample.keys() != dict(self._columns).keys():
            columns = ", ".join(self._blank.column_names)
            raise ValueError(f"{self._where()} has columns {', '.join(map(str, sample))}; they are {columns}")
        parts = []
        for name, known in self._columns:
            try:
                parts.append(known.encode(sample[name]))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self._where()}, column {name!r}: {error}") from None
        sizes = [len(part) for part, (_, known) in zip(parts, self._columns, strict=True) if known.size is None]
        return np.array(sizes, "<u4").tobytes() + b"".join(parts)

    def _where(self) -> str:
        return f"{self.out}: sample {sum(shard.samples for shard in self._shards) + len(self._samples)}"

    def _flush(self) -> None:
        """The samples at hand as a shard of their own."""
        begin = 4 * (len(self._samples) + 2) + len(self._header)
        offsets = np.cumsum([begin, *map(len, self._samples)]).astype("<u4")
        raw = b"".join([np.uint32(len(self._samples)).astype("<u4").tobytes(), offsets.tobytes(), self._header, *self._samples])
        name = f"shard.{len(self._shards):05}.mds"
        raw_data, zip_data, data = self._info(name, raw), None, raw
        if self._blank.compression:
            data = codecs.compress(self._blank.compression, raw)
            zip_data = self._info(name + self._ending, data)
        shard = replace(self._blank, samples=len(self._samples), raw_data=raw_data, zip_data=zip_data)
        self._put(shard.remote.basename, data)
        self._shards.append(shard)
        self._samples, self._size = [], 8 + len(self._header)

    def _info(self, name: str, data: bytes) -> FileInfo:
        return FileInfo(name, len(data), {kind: codecs.digest(kind, data) for kind in self._blank.hashes})

    def _put(self, name: str, data: bytes) -> None:
        write_whole(self._folder / name, data)
        if is_remote(self.out):
            self._uploads.append(self._pool.submit(self._send, name))

    def _send(self, name: str) -> None:
        upload(self._folder / name, f"{self.out.rstrip('/')}/{name}")
        os.unlink(self._folder / name)

    def _finish(self) -> None:
        """The index, once every shard has arrived."""
        text = index.dumps(self._shards).encode()
        if is_remote(self.out):
            for future in self._uploads:
                future.result()
            self._put(index.INDEX, text)
            self._uploads[-1].result()
        else:
            write_whole(self._folder / index.INDEX, text)
