"""Checkpoints in object storage: the same files under an address, s3://bucket/run, by fsspec.

    save("s3://bucket/run", 100, items, meta)      each rank uploads its own file; the manifest follows once all are there,
                                                   then everything is read back and hashed, and `latest` is written last
    load("s3://bucket/run", wanted)                a rank fetches only the files that hold what it wants, and hashes them

Storage of objects has no rename. What makes a step a checkpoint is its manifest, which is written after its files and names
their hashes; what makes it the last one is the marker, which is written after all of it was found to be good.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from fmegatron import tensorfile
from fmegatron.sharding.chunks import Box
from fmegatron.train.dcp import Stored
from fmegatron.train.manifest import NAME, Manifest, loads
from fmegatron.train.steps import step_of, superseded

PIECE = 1 << 24  # bytes read back at a time
P = ParamSpec("P")
T = TypeVar("T")


class Url(str):
    """An address, with the two parts of a path that the rest asks for."""

    @property
    def name(self) -> str:
        """Its last part."""
        return self.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """All but its last part."""
        return Url(self.rstrip("/").rpartition("/")[0])

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.rstrip('/')}/{name}")


def is_remote(path: object) -> bool:
    """Whether a path is an address of object storage."""
    return isinstance(path, str) and "://" in path


def told(method: Callable[P, T]) -> Callable[P, T]:
    """A method of which the storage's own errors (no credentials, no answer, no bucket) become one that names the address."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            address = str(getattr(args[0], "url", ""))
            if type(error).__module__ == "builtins" and (not isinstance(error, OSError) or address in str(error)):
                raise
            raise OSError(f"{address}: {str(error) or type(error).__name__}") from error

    return call


@dataclass(frozen=True)
class Bucket:
    """A folder of steps, or one step, under an address. ImportError in one line where the storage's package is missing.

    Whatever the storage's client raises becomes an OSError that names the address.
    """

    url: Url

    @property
    def fs(self) -> Any:
        """The storage, as fsspec sees it; its listings are never cached, for other processes write too."""
        import fsspec

        try:
            fs, _ = fsspec.core.url_to_fs(str(self.url), use_listings_cache=False)
        except ImportError as error:
            more = ": pip install fmegatron[s3]" if self.url.startswith("s3") else ""
            raise ImportError(f"{self.url}: {error}{more}") from None
        except ValueError as error:  # no such protocol
            raise ValueError(f"{self.url}: {error}; an address is s3://bucket/folder") from None
        return fs

    # -- read -------------------------------------------------------------------------------------------------------
    @told
    def is_checkpoint(self) -> bool:
        """Whether this is a step's address."""
        return bool(self.fs.isfile(self.url / NAME))

    @told
    def candidates(self) -> list[Url]:
        """Steps, best first: the one that the marker names, then earlier ones, then later ones; some may be half-written."""
        fs = self.fs
        if not fs.isdir(self.url):
            bucket = str(self.url).partition("://")[2].partition("/")[0]
            if bucket and not fs.exists(bucket):  # told before the first step is run, not when it is to be saved
                raise OSError(f"{self.url}: there is no bucket {bucket}")
            return []
        names = sorted((path.rstrip("/").rpartition("/")[2] for path in fs.ls(self.url, detail=False)), reverse=True)
        steps = [name for name in names if step_of(name) is not None]
        marker = fs.cat_file(self.url / "latest").decode(errors="replace").strip() if "latest" in names else ""
        first = [name for name in steps if name == marker] + [name for name in steps if name < marker]
        return [self.url / name for name in first + [name for name in steps if name not in first]]

    @told
    def open(self) -> RemoteStore:
        """The checkpoint at this address; ValueError where it is none or damaged."""
        fs = self.fs
        if not fs.isfile(self.url / NAME):
            raise ValueError(f"{self.url} is no checkpoint: it holds no {NAME}")
        text = fs.cat_file(self.url / NAME).decode(errors="replace")
        return RemoteStore(self, loads(Path(str(self.url)), text))

    # -- write ------------------------------------------------------------------------------------------------------
    def address(self, step: int | None = None) -> Url:
        """Where the checkpoint of a step lies; None: here."""
        return self.url if step is None else self.url / f"step-{step:08d}"

    @told
    def prepare(self, step: int) -> None:
        """Clear away a step of the same number: first its manifest, so that it is no checkpoint any more."""
        self._delete(self.address(step))

    @told
    def write(self, step: int, name: str, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
        """Upload one rank's file; its bytes and sha256."""
        with tempfile.TemporaryDirectory(prefix="fmegatron-") as folder:
            file = Path(folder) / name
            digest = tensorfile.write(file, tensors)
            self.fs.put_file(str(file), self.address(step) / name)
            return file.stat().st_size, digest

    @told
    def publish(self, step: int, text: str, keep: int, keep_every: int) -> None:
        """The manifest; then read all back; then the marker; then delete what is superseded."""
        final = self.address(step)
        self.fs.pipe_file(final / NAME, text.encode())
        bad = Bucket(final).open().damage(hashed=True)
        if bad:
            raise OSError(f"{final} is not what was written: {bad[0]}")
        self.fs.pipe_file(self.url / "latest", f"{final.name}\n".encode())
        there = [url.name for url in self.candidates() if Bucket(url).is_checkpoint()] if keep else []
        for name in superseded(there, final.name, keep, keep_every):
            self._delete(self.url / name)

    @told
    def discard(self, step: int) -> None:
        """Delete a step that failed."""
        self._delete(self.address(step))

    def _delete(self, url: Url) -> None:
        fs = self.fs
        if fs.isfile(url / NAME):
            fs.rm_file(url / NAME)
        if fs.exists(url):
            fs.rm(url, recursive=True)


@dataclass(frozen=True)
class RemoteStore:
    """A checkpoint in object storage: its manifest here, its files there."""

    bucket: Bucket
    manifest: Manifest

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """What it holds."""
        return self.manifest.tensors

    @property
    def meta(self) -> dict[str, Any]:
        """What the caller of `save` gave along."""
        return self.manifest.meta

    @contextmanager
    def reading(self) -> Iterator[Callable[[str, Box, Box], Tensor]]:
        """Files are fetched into a temporary folder when they are first asked for, and hashed on the way."""
        with tempfile.TemporaryDirectory(prefix="fmegatron-") as folder:
            local = replace(self.manifest, folder=Path(folder))
            with local.reading() as read:

                def fetched(key: str, saved: Box, wanted: Box) -> Tensor:
                    name = self.manifest.where[key][saved]
                    if not (Path(folder) / name).exists():
                        self._fetch(name, Path(folder) / name)
                    return read(key, saved, wanted)

                yield fetched

    def _fetch(self, name: str, target: Path) -> None:
        with open(target, "wb") as out:
            found = self._hash(name, out.write)
        if found != self.manifest.files[name]:
            raise ValueError(f"checkpoint {self.bucket.url} is damaged: {name} has other bytes than were written")

    def _hash(self, name: str, sink: Callable[[bytes], Any]) -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0
        with self.bucket.fs.open(self.bucket.url / name, "rb") as stream:
            while data := stream.read(PIECE):
                digest.update(data)
                sink(data)
                size += len(data)
        return size, digest.hexdigest()

    def damage(self, share: slice = slice(None), hashed: bool = False) -> list[str]:
        """Files that are missing or of another size; of other bytes where `hashed` (else found when they are fetched)."""
        bad, fs = [], self.bucket.fs
        for name, (size, digest) in list(self.manifest.files.items())[share]:
            if not fs.isfile(self.bucket.url / name):
                bad.append(f"{name} is missing")
            elif (there := fs.info(self.bucket.url / name)["size"]) != size:
                bad.append(f"{name} has {there} bytes, {size} were written")
            elif hashed and self._hash(name, lambda _: None) != (size, digest):
                bad.append(f"{name} has other bytes than were written (its sha256 differs)")
        return bad
