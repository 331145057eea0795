"""Where text comes from: plain files, JSONL, and this machine's own Python library, real text that is always there."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# Tests are skipped because many machines lack them.
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
HELD_OUT = 0.05


class Document(NamedTuple):
    """A text and where it came from, for messages: a file, or file:line."""

    source: str
    text: str


def documents(files: Iterable[str | Path], key: str = "text") -> Iterator[Document]:
    """The documents of `.jsonl` files (one object a line, its text under `key`) and of any other file (its whole text).

    Raises ValueError naming file and line for what is not UTF-8, not JSON, or has no such text.
    """
    for file in files:
        path = Path(file)
        if not path.is_file():
            raise ValueError(f"{path} is not a file")
        if path.suffix == ".jsonl":
            yield from _lines(path, key)
        else:
            yield Document(str(path), _decoded(path.read_bytes(), str(path)))


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


def _lines(path: Path, key: str) -> Iterator[Document]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            source = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                text = json.loads(_decoded(line, source))[key]
            except json.JSONDecodeError as error:
                raise ValueError(f"{source}: not JSON: {error.msg} at column {error.colno}") from None
            except (KeyError, TypeError):
                raise ValueError(f'{source}: no {key!r} in it; each line is {{"{key}": …}}') from None
            if not isinstance(text, str):
                raise ValueError(f"{source}: {key!r} is {type(text).__name__}, not a string")
            if any("\ud800" <= character <= "\udfff" for character in set(text)):
                raise ValueError(f"{source}: {key!r} holds half of a surrogate pair, which is no Unicode text")
            yield Document(source, text)


def _decoded(data: bytes, source: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 at byte {error.start}; convert it, for example with iconv") from None
