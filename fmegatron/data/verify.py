"""Whether a pair of token files is what it was: its index, its ids, its hashes.

The hashes lie in PREFIX.sha256, in the format of sha256sum; `record` writes them and `verify` compares.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from fmegatron.data.indexed import IndexedDataset
from fmegatron.data.inspect import PART, parts

ENDS = (".bin", ".idx")


def verify(prefix: str | Path, vocab_size: int | None = None) -> list[str]:
    """What was found to be right, in lines. Raises ValueError, naming file and place, for the first thing that is not.

    The index is read and every bound in it checked; ids must be below `vocab_size`, where given; the hashes must be those
    of PREFIX.sha256, where there is one.
    """
    data = IndexedDataset(prefix)
    done = [f"{prefix}.idx: {len(data)} sequences in {len(data.documents) - 1} documents, bounds and sizes agree"]
    if vocab_size is not None:
        check_ids(data, vocab_size)
        done.append(f"{prefix}.bin: {len(data.stream)} ids, all in 0..{vocab_size - 1}")
    recorded, found = _recorded(prefix), hashes(prefix)
    for name, digest in found.items():
        if name in recorded and recorded[name] != digest:
            raise ValueError(f"{Path(prefix).parent / name}: its sha256 is {digest[:16]}…, but {prefix}.sha256 says "
                             f"{recorded[name][:16]}…: changed or damaged since; copy it again")  # fmt: skip
        done.append(f"{name}: sha256 {digest}{' as recorded' if name in recorded else ''}")
    return done


def check_ids(data: IndexedDataset, vocab_size: int) -> None:
    """ValueError for the first id outside of the vocabulary."""
    for number, part in enumerate(parts(data)):
        if part.min() < 0 or part.max() >= vocab_size:
            at = int(np.flatnonzero((part < 0) | (part >= vocab_size))[0])
            place = number * PART + at
            sequence = int(np.searchsorted(data.offsets, place, "right")) - 1
            raise ValueError(
                f"{data.prefix}.bin at byte {place * data.dtype.itemsize}: id {part[at]} in sequence {sequence}, but the "
                f"vocabulary ends at {vocab_size - 1}: give the tokenizer that made these files, or a larger vocabulary"
            )


def record(prefix: str | Path) -> None:
    """Write PREFIX.sha256."""
    path = Path(f"{prefix}.sha256")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(f"{digest}  {name}\n" for name, digest in hashes(prefix).items()))
    os.replace(temporary, path)


def hashes(prefix: str | Path) -> dict[str, str]:
    """{file name: sha256}."""
    found = {}
    for end in ENDS:
        with open(f"{prefix}{end}", "rb") as file:
            found[Path(f"{prefix}{end}").name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _recorded(prefix: str | Path) -> dict[str, str]:
    path = Path(f"{prefix}.sha256")
    lines = path.read_text().splitlines() if path.is_file() else []
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    if any(len(pair) != 2 or len(pair[0]) != 64 for pair in pairs):
        raise ValueError(f"{path}: not lines of a sha256 and a file name: remove it, or record anew")
    return {name.lstrip("*"): digest for digest, name in pairs}
