"""Where text comes from: text files, JSONL, Parquet, compressed or not, any sequence of dicts, and this machine's own
Python library, real text that is always there.

Reading is in two halves: `records` finds where documents begin, in the order of the sources, and `texts_of` makes text of
one of them, which other processes can do.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

# Tests are skipped because many machines lack them.
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
HELD_OUT = 0.05
LARGEST = 2**31 - 1  # bytes of a document: more tokens than that no sequence can hold
LINES = (".jsonl", ".ndjson", ".json")

Source = str | Path | Mapping[str, Any]  # a file, or a document itself


class Document(NamedTuple):
    """A text and where it came from, for messages: a file, or file:line."""

    source: str
    text: str


class Record(NamedTuple):
    """A document as it was found: a line of JSONL, a file's bytes, or a mapping from keys to texts."""

    source: str
    found: bytes | Mapping[str, Any]
    line: bool = False


def documents(sources: Iterable[Source], key: str = "text") -> Iterator[Document]:
    """The documents of files, or dicts, in order.

    `.jsonl`, `.ndjson`, `.json` hold one object a line, its text under `key`, `.parquet` a column `key`; any other file is
    one document. `.gz` and `.zst` behind a name are decompressed. Raises ValueError naming file and line for what is
    damaged, not UTF-8, not JSON, or has no such text.
    """
    for record in records(sources, (key,)):
        yield Document(record.source, texts_of(record, (key,))[0])


def records(sources: Iterable[Source], keys: Sequence[str]) -> Iterator[Record]:
    """What `texts_of` makes text of, cheaply; `keys` are the columns to read of Parquet files."""
    for number, source in enumerate(sources, 1):
        if isinstance(source, Mapping):
            yield Record(f"document {number}", {key: source[key] for key in keys if key in source})
            continue
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"{source} is not a file of this machine")
        if path.suffix == ".parquet":
            yield from _rows(path, keys)
            continue
        kind = path.with_suffix("").suffix if path.suffix in (".gz", ".zst") else path.suffix
        with _opened(path) as file:
            yield from _lines(path, file) if kind in LINES else _whole(path, file)


def texts_of(record: Record, keys: Sequence[str]) -> list[str]:
    """The texts of a record under each key; a file of text has but one."""
    source, found, line = record
    if isinstance(found, bytes):
        text = _decoded(found, source)
        if not line:
            return [text] * len(keys)
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}: not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise ValueError(f"{source}: not JSON that can be read: nested too deep") from None
    return [_text(source, found, key) for key in keys]


def stdlib_documents(split: str) -> Iterator[Document]:
    """The source files of the Python standard library, sorted by path; a hash of the path keeps 5 % for "valid".

    `split` is "train" or "valid". About 10 MB in 660 files: no tests, no generated tables, only UTF-8.
    """
    if split not in ("train", "valid"):
        raise ValueError(f"split {split!r}: choose train or valid")
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in stdlib_files(root):
        name = path.relative_to(root).as_posix()
        if held_out(name) == (split == "valid"):
            try:
                yield Document(name, path.read_bytes().decode())
            except UnicodeDecodeError:
                continue


def stdlib_files(root: Path) -> list[Path]:
    """The hand-written `.py` files below `root`, sorted by relative path."""
    paths = (path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))
    return sorted((path for path in paths if not _generated(path)), key=lambda path: path.relative_to(root).as_posix())


def held_out(name: str) -> bool:
    """Whether a document of this name is kept for validation: the same answer on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < HELD_OUT * 2**64


def _generated(path: Path) -> bool:
    with open(path, "rb") as file:
        return b"generated" in file.read(200).lower()  # character maps, the documentation as a table, build settings


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix != ".zst":
        return open(path, "rb")
    return io.BufferedReader(_Zst(path), 2**20)


class _Zst(io.RawIOBase):
    """The text of a .zst file of any number of frames. The library's own reader takes a file cut short for a whole one."""

    def __init__(self, path: Path) -> None:
        self.library = needed("zstandard", str(path))
        self.file, self.frame, self.ready, self.rest = open(path, "rb"), None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            data = self.rest or self.file.read(2**16)
            if not data:
                if self.frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            frame = self.frame or self.library.ZstdDecompressor().decompressobj()
            self.ready, self.rest = frame.decompress(data), frame.unused_data
            self.frame = None if frame.eof else frame
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def _whole(path: Path, file: IO[bytes]) -> Iterator[Record]:
    parts, total = [], 0
    for part in _parts(path, lambda: file.read(2**24)):
        parts.append(part)
        total += len(part)
        if total > LARGEST:
            raise ValueError(f"{path}: longer than {LARGEST} bytes, more than a document can hold: split it, or use .jsonl")
    yield Record(str(path), b"".join(parts))


def _lines(path: Path, file: IO[bytes]) -> Iterator[Record]:
    for number, line in enumerate(_parts(path, lambda: file.readline(LARGEST + 2)), 1):
        if len(line) > LARGEST:
            raise ValueError(f"{path}:{number}: longer than {LARGEST} bytes, more than a document can hold: split it")
        if line.strip():
            yield Record(f"{path}:{number}", line, True)


def _parts(path: Path, read: Callable[[], bytes]) -> Iterator[bytes]:
    """What `read` gives until it gives nothing; errors of a damaged archive name the file."""
    total = 0
    while True:
        try:
            part = read()
        except Exception as error:
            if not isinstance(error, OSError | EOFError | zlib.error) and type(error).__name__ != "ZstdError":
                raise
            raise ValueError(f"{path}: cannot be read after {total} bytes of text: {error}; copy the file again") from None
        if not part:
            return
        total += len(part)
        yield part


def _rows(path: Path, keys: Sequence[str]) -> Iterator[Record]:
    parquet, arrow = needed("pyarrow.parquet", str(path)), needed("pyarrow", str(path))
    try:
        file = parquet.ParquetFile(path)
        if missing := [key for key in keys if key not in file.schema_arrow.names]:
            raise ValueError(f"{path}: no column {missing[0]!r}; there are {', '.join(file.schema_arrow.names)}")
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=list(dict.fromkeys(keys))):
            for row in batch.to_pylist():
                number += 1
                yield Record(f"{path}: row {number}", row)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}; copy the file again") from None


def _text(source: str, found: Any, key: str) -> str:
    if not isinstance(found, Mapping) or key not in found:
        raise ValueError(f'{source}: no {key!r} in it; each line is {{"{key}": …}}')
    text = found[key]
    if not isinstance(text, str):
        raise ValueError(f"{source}: {key!r} is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{source}: {key!r} holds half of a surrogate pair, which is no Unicode text") from None
    return text


def _decoded(data: bytes, source: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 at byte {error.start}; convert it, for example with iconv") from None


def needed(module: str, what: str) -> Any:
    """An optional module, or ValueError that says what needs it and how it is installed."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        package = module.split(".")[0]
        raise ValueError(f"{what} needs {package}: pip install 'fmegatron[data]', or pip install {package}") from None
