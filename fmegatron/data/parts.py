"""The finished parts of an unfinished job, so that it goes on where it stopped.

    PREFIX.parts/plan.json        what the job is: another job's parts are thrown away
    PREFIX.parts/00003.0.bin/.idx the fourth part of the first output
    PREFIX.parts/00003.json       what had been read when it was complete, and a hash of it; written last

One process at a time works on a prefix; it holds a lock that the system takes back when it dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from fmegatron.data.indexed import IndexedWriter
from fmegatron.data.text import Record

Files = Sequence[str | Path]


class Spent(NamedTuple):
    """What has been read and written; `bytes` counts the text in UTF-8."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0


@dataclass
class Parts:
    """The parts of one job; a context that keeps them after an error and removes the folder if there are none."""

    folder: Path
    outputs: Sequence[str]
    part_bytes: int
    lock: IO[str]
    finished: int = 0
    spent: Spent = Spent()
    read: int = 0  # the digest of the documents in `spent`

    @classmethod
    def open(cls, output: str | Path, outputs: Sequence[str], files: Files | None, job: Any, part_bytes: int) -> Self:
        """The parts of the job that writes `outputs`, with what an earlier process has finished of the same job.

        `files` are compared by name, size and time; empty: documents that are not files; None: they can only be read once.
        """
        folder = Path(f"{output}.parts")
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        lock = open(folder / "lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ValueError(f"{output}: another process is writing it ({folder} is locked)") from None
        parts = cls(folder, outputs, part_bytes, lock)
        plan, path = _plan(files, job, part_bytes), folder / "plan.json"
        if plan is not None and path.is_file() and path.read_text() == plan:
            parts._resume()
        else:
            for old in folder.iterdir():
                if old.name != "lock":
                    old.unlink()
            _save(path, plan or "")
        return parts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or not self.finished:
            shutil.rmtree(self.folder)
        self.lock.close()

    def rest(self, found: Iterable[Record]) -> Iterator[Record]:
        """The records that no finished part holds. Raises ValueError where those before them are not what was read then."""
        rest = iter(found)
        if self.spent.documents and digest(islice(rest, self.spent.documents)) != self.read:
            raise ValueError(f"the first {self.spent.documents} documents are not those that {self.folder} was made of: "
                             "remove that folder and start again")  # fmt: skip
        return rest

    def next(self) -> list[str]:
        """The prefixes of the part that is written next."""
        return self._prefixes(self.finished)

    def finish(self, spent: Spent, read: int) -> None:
        """The part is complete: `spent`, and the digest `read`, are of all documents from the beginning of the job."""
        self.finished, self.spent, self.read = self.finished + 1, spent, read % 2**64
        _save(self.folder / f"{self.finished - 1:05}.json", json.dumps({**spent._asdict(), "read": self.read}))

    def join(self, dtype: npt.DTypeLike) -> None:
        """All parts become the outputs. A single one is only renamed."""
        for number, output in enumerate(self.outputs):
            if self.finished == 1:
                if Path(f"{self._prefixes(0)[number]}.bin").exists():
                    Path(f"{output}.idx").unlink(missing_ok=True)  # as in IndexedWriter: the index goes first and comes last
                for end in (".bin", ".idx"):
                    if (part := Path(f"{self._prefixes(0)[number]}{end}")).exists():  # not so where this was interrupted before
                        os.replace(part, f"{output}{end}")
                continue
            with IndexedWriter(output, np.dtype(dtype)) as out:
                for finished in range(self.finished):
                    out.add_index(self._prefixes(finished)[number])

    def _prefixes(self, part: int) -> list[str]:
        return [str(self.folder / f"{part:05}.{number}") for number in range(len(self.outputs))]

    def _resume(self) -> None:
        while (path := self.folder / f"{self.finished:05}.json").is_file():
            facts = json.loads(path.read_text())
            self.finished, self.read = self.finished + 1, facts.pop("read")
            self.spent = Spent(**facts)


def digest(found: Iterable[Record]) -> int:
    """A hash of documents in which their order does not count: the digests of two runs of them add up (modulo 2^64)."""
    texts = (record.found if isinstance(record.found, bytes) else repr(sorted(record.found.items())).encode(errors="replace")
             for record in found)  # fmt: skip
    return sum(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") for text in texts) % 2**64


def _plan(files: Files | None, job: Any, part_bytes: int) -> str | None:
    paths = [Path(file) for file in files or []]
    if files is None or not all(path.is_file() for path in paths):
        return None  # reading it will say so
    stats = [(str(path), path.stat()) for path in paths]
    facts = {
        "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "job": hashlib.sha256(pickle.dumps(job)).hexdigest(),
        "part_bytes": part_bytes,
    }
    return json.dumps(facts, indent=1)


def _save(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
