"""index.json of an MDS folder: the shards in order, and for each its files, sizes, hashes and columns.

    {"version": 2, "shards": [{"version": 2, "format": "mds", "samples": 31,
      "column_names": [...], "column_encodings": [...], "column_sizes": [bytes, or null],
      "raw_data": {"basename": "shard.00000.mds", "bytes": ..., "hashes": {"sha1": ...}},
      "zip_data": the same of the compressed file, or null, "compression": "zstd:7" or null,
      "hashes": ["sha1"], "size_limit": 67108864}]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fmegatron.data.mds import codecs
from fmegatron.data.mds.encodings import Encoding, encoding

INDEX = "index.json"


@dataclass(frozen=True)
class FileInfo:
    """A file beside the index: its name, size in bytes, and hashes by algorithm."""

    basename: str
    bytes: int
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class ShardInfo:
    """What the index says of one shard; `zip_data` is the compressed file where there is one."""

    samples: int
    column_names: tuple[str, ...]
    column_encodings: tuple[str, ...]
    column_sizes: tuple[int | None, ...]
    raw_data: FileInfo
    zip_data: FileInfo | None
    compression: str | None
    hashes: tuple[str, ...]
    size_limit: int | str | None

    @property
    def remote(self) -> FileInfo:
        """The file that lies on the remote side."""
        return self.zip_data or self.raw_data

    @property
    def space(self) -> int:
        """Bytes on disk while it is being unpacked."""
        return self.raw_data.bytes + (self.zip_data.bytes if self.zip_data else 0)

    def table(self) -> dict[str, Any]:
        """As in index.json."""
        return {"version": 2, "format": "mds", **asdict(self)}

    def columns(self, allow_unsafe: bool = False) -> tuple[tuple[str, Encoding], ...]:
        """(name, encoding) of each column. ValueError names the column that cannot be read."""
        out = []
        for name, kind, size in zip(self.column_names, self.column_encodings, self.column_sizes, strict=True):
            try:
                known = encoding(kind, allow_unsafe=allow_unsafe)
            except ValueError as error:
                raise ValueError(f"column {name!r}: {error}") from None
            if known.size != size:
                raise ValueError(f"column {name!r}: the index gives it {size} bytes, {kind} has {known.size}")
            out.append((name, known))
        return tuple(out)


def header(shard: Mapping[str, Any]) -> bytes:
    """The part of a shard's entry that stands in the shard file itself, between offsets and samples."""
    own = ("column_encodings", "column_names", "column_sizes", "compression", "format", "hashes", "size_limit", "version")
    return json.dumps({key: shard[key] for key in own}, sort_keys=True).encode()


def dumps(shards: list[ShardInfo]) -> str:
    """index.json of these shards."""
    return json.dumps({"shards": [shard.table() for shard in shards], "version": 2}, sort_keys=True)


def loads(data: bytes, where: str) -> tuple[ShardInfo, ...]:
    """The shards of an index.json; ValueError, with `where`, says what is wrong with it."""
    try:
        table = json.loads(data)
    except ValueError as error:
        at = f" at byte {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{where}{at}: not JSON ({error}), {len(data)} bytes: copy the file again") from None
    if not isinstance(table, dict) or table.get("version") != 2 or not isinstance(table.get("shards"), list):
        raise ValueError(f"{where}: expected version 2 and a list of shards, as an MDS writer leaves them")
    return tuple(_shard(shard, f"{where}: shard {number}") for number, shard in enumerate(table["shards"]))


def _shard(table: Any, where: str) -> ShardInfo:
    if not isinstance(table, dict) or table.get("version") != 2 or table.get("format") != "mds":
        found = f"{table.get('format')!r} version {table.get('version')!r}" if isinstance(table, dict) else repr(table)[:80]
        raise ValueError(f"{where}: expected format 'mds' version 2, found {found}")
    try:
        shard = ShardInfo(
            samples=_count(table, "samples"),
            column_names=_texts(table["column_names"]),
            column_encodings=_texts(table["column_encodings"]),
            column_sizes=tuple(table["column_sizes"]),
            raw_data=_file(table["raw_data"]),
            zip_data=_file(table["zip_data"]) if table["zip_data"] else None,
            compression=table["compression"] or None,
            hashes=_texts(table["hashes"]),
            size_limit=table["size_limit"],
        )
        names = shard.column_names
        if not len(names) == len(set(names)) == len(shard.column_encodings) == len(shard.column_sizes):
            raise ValueError("its columns do not match in number")
        if any(size is not None and (type(size) is not int or size < 1) for size in shard.column_sizes):
            raise ValueError(f"column_sizes {shard.column_sizes}: sizes from 1, or null")
        if bool(shard.compression) != bool(shard.zip_data):
            raise ValueError(f"compression {shard.compression!r} but zip_data {'given' if shard.zip_data else 'null'}")
        if shard.compression:
            codecs.extension(shard.compression)
    except KeyError as error:
        raise ValueError(f"{where} lacks {error}: copy the file again") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where}: {error}") from None
    return shard


def _file(table: dict[str, Any]) -> FileInfo:
    name, hashes = table["basename"], table["hashes"]
    if not isinstance(name, str) or not name or "/" in name or "\\" in name or name in (".", "..") or "\0" in name:
        raise ValueError(f"basename {name!r}: a file beside the index")
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        raise ValueError(f"hashes of {name}: a table of texts")
    return FileInfo(name, _count(table, "bytes"), hashes)


def _count(table: dict[str, Any], key: str) -> int:
    if type(table[key]) is not int or table[key] < 1:
        raise ValueError(f"{key} = {table[key]!r}: a number from 1")
    return int(table[key])


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{values!r:.60}: a list of texts")
    return tuple(values)
