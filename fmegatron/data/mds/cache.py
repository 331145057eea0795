"""A local folder of shards that lie elsewhere: fetched when needed or ahead, checked, unpacked, and evicted under a limit.

All state is the folder itself, so processes of one machine share it: a shard's lock file keeps two from fetching the same,
the folder's lock counts and evicts, and the time at which a shard was last opened is its file's. Nothing is ever evicted
that has no remote side. A shard appears under its name when it is whole and its hash is right.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmegatron.data.mds import codecs, remote
from fmegatron.data.mds.files import write_whole
from fmegatron.data.mds.index import INDEX, FileInfo, ShardInfo, loads
from fmegatron.data.mds.shard import Shard

HASHES = ("xxh3_64", "xxh3_128", "xxh64", "xxh128", "xxh32", "sha1", "md5")  # the first that a file has is checked
STALE = 3600.0  # seconds after which a scratch file belongs to nobody


@dataclass(frozen=True)
class Place:
    """Where an MDS folder lies: `local` alone, or a local copy of what `remote` (URL or folder) has."""

    local: Path
    remote: str | None = None

    def read_index(self, retries: int, storage: Mapping[str, Any] | None) -> tuple[ShardInfo, ...]:
        """The shards of the folder; its index is fetched once."""
        path = self.local / INDEX
        if not path.is_file() and self.remote is not None:
            scratch = path.with_name(f".{INDEX}.{os.getpid()}.{threading.get_ident()}.tmp")
            self.local.mkdir(parents=True, exist_ok=True)
            try:
                remote.download(f"{self.remote.rstrip('/')}/{INDEX}", scratch, retries=retries, storage=storage)
                os.replace(scratch, path)
            finally:
                scratch.unlink(missing_ok=True)
        if not path.is_file():
            raise ValueError(f"{path} does not exist: an MDS folder has one; name the remote folder, or write it anew")
        return loads(path.read_bytes(), str(path))


class Cache:
    """The shards of several folders by number: `shard(i)` has it here, `ahead(numbers)` starts fetching in the background.

    limit: bytes of all shard files with a remote side (None: all may stay). hash: the algorithm to check (None: one that
    the index has, where it has any). threads: fetches at once. Raises ValueError and OSError in one line.
    """

    def __init__(
        self,
        shards: Sequence[tuple[Place, ShardInfo]],
        *,
        limit: int | None = None,
        retries: int = 2,
        hash: str | None = None,
        threads: int = 4,
        opened: int = 64,
        allow_unsafe: bool = False,
        storage: Mapping[str, Any] | None = None,
    ) -> None:
        self.shards, self.limit, self.retries, self.hash = tuple(shards), limit, retries, hash
        self.allow_unsafe, self.storage, self._threads, self._most = allow_unsafe, storage, threads, opened
        self._far = [(place, info) for place, info in self.shards if place.remote is not None]
        least = 2 * max((info.space for _, info in self._far), default=0)
        if limit is not None and limit < least:
            raise ValueError(f"cache_limit {limit}: at least {least} bytes, two of the largest shard with its packed file")
        self._lock = threading.Lock()
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._coming: dict[int, Future[Shard]] = {}
        self._wanted: list[int] = []  # ahead, soonest first
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mds-fetch")
        for folder in {place.local for place, _ in self._far}:
            _sweep(folder)

    def close(self) -> None:
        """Start no further fetch, and wait for those under way."""
        self._wanted = []
        self._pool.shutdown(cancel_futures=True)

    def shard(self, number: int) -> Shard:
        """Shard `number`, fetched if it is not here."""
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
            coming = self._start(number)
        return coming.result()

    def ahead(self, numbers: Iterable[int]) -> None:
        """Fetch in the background what comes next, soonest first: as much as fits in half the limit."""
        wanted, room = [], self.limit // 2 if self.limit is not None else None
        for number in numbers:
            place, info = self.shards[number]
            if room is not None and place.remote is not None:
                room -= info.space
                if room < 0:
                    break
            wanted.append(number)
        with self._lock:
            self._wanted = wanted
            self._next()

    def _next(self) -> None:
        while self._wanted and len(self._coming) < self._threads:
            number = self._wanted.pop(0)
            if number not in self._open:
                self._start(number)

    def _start(self, number: int) -> Future[Shard]:
        if number not in self._coming:
            self._coming[number] = self._pool.submit(self._bring, number)
        return self._coming[number]

    def _bring(self, number: int) -> Shard:
        """The shard, opened; what was used least recently is closed."""
        shard = None
        try:
            shard = self._opened(number)
        finally:
            with self._lock, suppress(RuntimeError):  # no new work when the interpreter ends
                self._coming.pop(number, None)
                if shard is not None:
                    self._open[number] = shard
                    while len(self._open) > self._most:
                        self._open.popitem(last=False)
                self._next()
        return shard

    def _opened(self, number: int) -> Shard:
        place, info = self.shards[number]
        path = place.local / info.raw_data.basename
        for _ in range(3):  # another process may evict it between the two lines
            self._have(place, info, path)
            try:
                return Shard(path, info, allow_unsafe=self.allow_unsafe)
            except ValueError:
                if path.exists() or place.remote is None:
                    raise
        raise ValueError(f"{path} is evicted as soon as it is here: raise cache_limit")

    def _have(self, place: Place, info: ShardInfo, path: Path) -> None:
        if not path.exists():
            place.local.mkdir(parents=True, exist_ok=True)
            with _locked(place.local / f".{path.name}.lock"):
                if not path.exists():
                    self._fetch(place, info, path)
        if place.remote is not None and self.limit is not None:
            with suppress(FileNotFoundError):  # evicted in between: the caller sees that
                os.utime(path)

    def _fetch(self, place: Place, info: ShardInfo, path: Path) -> None:
        packed = place.local / info.remote.basename
        if place.remote is None:
            if info.zip_data is not None and packed.is_file():
                write_whole(path, _unpacked(packed, packed, info, self.hash))
            return  # else opening says that it is missing
        scratch = path.with_name(f".{path.name}.tmp")
        self._make_room(info, scratch)
        source = f"{place.remote.rstrip('/')}/{info.remote.basename}"
        try:
            for left in range(self.retries, -1, -1):
                remote.download(source, scratch, retries=self.retries, storage=self.storage)
                try:
                    data = _unpacked(scratch, source, info, self.hash)
                    break
                except ValueError:
                    if not left:
                        raise
            if info.zip_data is not None:
                scratch.write_bytes(data)
            with _locked(place.local / ".cache.lock"):  # else a scan may miss the file under its old name and its new one
                os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)

    def _make_room(self, info: ShardInfo, scratch: Path) -> None:
        """Evict what was opened longest ago until this shard fits, and announce it by its scratch file."""
        if self.limit is None:
            return
        with ExitStack() as stack:
            for folder in sorted({place.local for place, _ in self._far}):
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(folder / ".cache.lock"))
            used, old = self._used()
            while used + info.space > self.limit and old:
                _, size, number = old.pop(0)
                place, victim = self.shards[number]
                (place.local / victim.raw_data.basename).unlink(missing_ok=True)
                used -= size
                with self._lock:
                    self._open.pop(number, None)
            scratch.touch()

    def _used(self) -> tuple[int, list[tuple[int, int, int]]]:
        """(bytes here or announced, [(last opened, bytes, number)] of those here, oldest first)."""
        used, here = 0, []
        stats = {folder: _files(folder) for folder in {place.local for place, _ in self._far}}
        for number, (place, info) in enumerate(self.shards):
            if place.remote is not None:
                files, name = stats[place.local], info.raw_data.basename
                if name in files:
                    here.append((files[name].st_mtime_ns, info.raw_data.bytes, number))
                    used += info.raw_data.bytes
                elif f".{name}.tmp" in files:
                    used += info.space
        return used, sorted(here)


def _unpacked(file: Path, where: str | Path, info: ShardInfo, hash: str | None) -> bytes:
    """What a fetched file holds, once its size and hash are right."""
    data = file.read_bytes()
    check(data, info.remote, where, hash)
    if info.compression is None:
        return data
    try:
        return codecs.decompress(info.compression, data, info.raw_data.bytes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}: copy the file again, or write it anew") from None


def check(data: bytes, info: FileInfo, where: str | Path, hash: str | None = None) -> None:
    """ValueError where `data` has another size or hash than the index says."""
    if len(data) != info.bytes:
        said = f"{len(data)} bytes, the index says {info.bytes}"
        raise ValueError(f"{where}: {said}: truncated, or of another index; copy it again")
    if hash is not None and hash not in info.hashes:
        there = ", ".join(info.hashes) or "no hash"
        raise ValueError(f"{where}: the index has no {hash} of it, but {there}: check one of those")
    known = [name for name in (*HASHES, *info.hashes) if name in info.hashes]
    for name in [hash] if hash else known[:1]:
        if (found := codecs.digest(name, data)) != info.hashes[name]:
            due = info.hashes[name]
            raise ValueError(f"{where}: {name} is {found}, the index says {due}: damaged; copy it again, or write it anew")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file ends the lock


def _files(folder: Path) -> dict[str, os.stat_result]:
    out = {}
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):  # another process has just evicted or renamed it
            out[entry.name] = entry.stat()
    return out


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half-written."""
    if folder.is_dir():
        for name, stat in _files(folder).items():
            if name.startswith(".") and name.endswith(".tmp") and time.time() - stat.st_mtime > STALE:
                (folder / name).unlink(missing_ok=True)
