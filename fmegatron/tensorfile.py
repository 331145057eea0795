"""Safetensors files written a tensor at a time, hashed on the way: no copy of what they hold is ever made whole.

    sha = write("model.safetensors", {"w": x, "table": Lazy((50257, 768), torch.bfloat16, lambda: gather(table))})

The format: 8 bytes length, a JSON header, raw bytes. The library `safetensors` reads them, and is the oracle of the test;
its own writer first copies all tensors to bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

NAMES = MappingProxyType({
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL"})  # fmt: skip
PIECE = 1 << 22  # bytes hashed and written at a time


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made when its turn comes, and dropped once it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def order(tensors: Mapping[str, Tensor | Lazy]) -> list[str]:
    """Names in the order of the file: wide dtypes first, so that each tensor is aligned, then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def write(path: Path, tensors: Mapping[str, Tensor | Lazy]) -> str:
    """Write the file through to the disk; the sha256 of its bytes, in hex. Raises ValueError for a dtype it cannot hold."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order(tensors):
        x = tensors[name]
        if x.dtype not in NAMES:
            raise ValueError(f"{name} has dtype {x.dtype}, which safetensors files do not hold")
        start, end = end, end + math.prod(x.shape) * x.dtype.itemsize
        header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as stream:
        for part in _parts(text, tensors):
            digest.update(part)
            written = 0
            while written < len(part):  # an unbuffered write may take less
                written += stream.write(part[written:])
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _parts(text: bytes, tensors: Mapping[str, Tensor | Lazy]) -> Iterator[memoryview]:
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order(tensors):
        given = tensors[name]
        x = given.make() if isinstance(given, Lazy) else given
        assert x.dtype == given.dtype and tuple(x.shape) == tuple(given.shape), name
        data: memoryview = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), PIECE):
            yield data[start : start + PIECE]
