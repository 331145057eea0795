"""Compression and hashes of shard files, by the names that an MDS index gives them: `zstd:7`, `xxh64`.

br, bz2, gz, snappy and zstd; a level may follow a colon (not snappy). Hashes are those of hashlib with a fixed length, and
xxhash's. br, snappy, zstd and xxhash are packages of the extra `fmegatron[data]`.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import importlib
import struct
import zlib
from collections.abc import Callable
from typing import Any

LEVELS = {"br": (0, 11, 11), "bz2": (1, 9, 9), "gz": (0, 9, 9), "snappy": (0, 0, 0), "zstd": (1, 22, 3)}
XXHASHES = ("xxh32", "xxh64", "xxh128", "xxh3_64", "xxh3_128")
DAMAGE = (OSError, EOFError, ValueError, struct.error, zlib.error)
PACKAGES = ("brotli", "_brotli", "snappy", "cramjam", "zstandard")
Packed = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


def extension(compression: str) -> str:
    """The ending of a compressed file's name. ValueError names an unknown compression or level."""
    name, colon, level = compression.partition(":")
    low, high, _ = LEVELS.get(name, (0, 0, 0))
    if name not in LEVELS or (colon and (low == high or not level.isdecimal() or not low <= int(level) <= high)):
        legal = ", ".join(f"{key}[:{low}-{high}]" if low < high else key for key, (low, high, _) in LEVELS.items())
        raise ValueError(f"compression {compression!r}: known are {legal}")
    return name


def compress(compression: str, data: bytes) -> bytes:
    """`data`, packed."""
    return _codec(compression)[0](data)


def decompress(compression: str, data: bytes, size: int) -> bytes:
    """Exactly `size` bytes, or ValueError where `data` is damaged or holds another number."""
    try:
        out = _codec(compression)[1](data)
    except Exception as error:  # each package has errors of its own
        if not isinstance(error, DAMAGE) and type(error).__module__.partition(".")[0] not in PACKAGES:
            raise
        raise ValueError(f"damaged {extension(compression)} data: {error}") from None
    if len(out) != size:
        raise ValueError(f"unpacks to {len(out)} bytes, {size} are due")
    return out


def _codec(compression: str) -> Packed:
    name = extension(compression)
    level = int(compression.partition(":")[2] or LEVELS[name][2])
    if name == "gz":
        return lambda data: gzip.compress(data, level, mtime=0), gzip.decompress
    if name == "bz2":
        return lambda data: bz2.compress(data, level), bz2.decompress
    if name == "br":
        brotli = _package("brotli", "brotli")
        return lambda data: brotli.compress(data, quality=level), brotli.decompress
    if name == "snappy":
        snappy = _package("snappy", "python-snappy")
        return snappy.compress, snappy.decompress
    zstd = _package("zstandard", "zstandard")
    return zstd.ZstdCompressor(level=level).compress, lambda data: _unzstd(zstd, data)


def _unzstd(zstd: Any, data: bytes) -> bytes:
    """All frames; a frame need not say its size, and one that is cut off is an error."""
    unpacker, out = zstd.ZstdDecompressor(), bytearray()
    while data:
        frame = unpacker.decompressobj()
        out += frame.decompress(data)
        if not frame.eof:
            raise ValueError("ends inside a frame")
        data = frame.unused_data
    return bytes(out)


def digest(name: str, data: bytes) -> str:
    """The hash in hexadecimal. ValueError: unknown."""
    if name in XXHASHES:
        return str(getattr(_package("xxhash", "xxhash"), name)(data).hexdigest())
    fixed = {known for known in hashlib.algorithms_guaranteed if not known.startswith("shake")}
    if name not in fixed:
        raise ValueError(f"hash {name!r}: known are {', '.join(sorted({*fixed, *XXHASHES}))}")
    return hashlib.new(name, data).hexdigest()


def _package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"this needs the package {package}: pip install 'fmegatron[data]'") from None
