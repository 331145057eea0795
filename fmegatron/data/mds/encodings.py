"""Column encodings of MDS: how one value of a sample becomes bytes, and bytes a value again (all little-endian).

    bytes, str (UTF-8), json                          int, int8 ... uint64, float16 ... float64: fixed size
    str_int, str_float, str_decimal: decimal digits   ndarray[:DTYPE[:DIM,DIM,...]]: what the name leaves out, a value says
    pkl: Python's pickle, which runs code when it is read: only where it is allowed

An ndarray value: dtype code (1 byte) unless the name has the dtype, `ndim << 2 | w` (1 byte) and dims of 2**w bytes each
unless the name has the shape, then the numbers in C order. Scalars come back as numpy's, int as Python's.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

SCALARS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
DTYPE_CODES = {
    "uint8": 8, "int8": 9, "uint16": 16, "int16": 17, "float16": 18, "uint32": 32, "int32": 33, "float32": 34,
    "uint64": 64, "int64": 65, "float64": 66,
}  # fmt: skip
CODE_DTYPES = {code: name for name, code in DTYPE_CODES.items()}
IMAGES = ("pil", "jpeg", "png", "jpeg_array", "jpegarray", "list[pil]", "list[jpeg]", "list[png]")


@dataclass(frozen=True)
class Encoding:
    """One column's encoding: its name, its size in bytes where all values have the same, and the two functions."""

    name: str
    size: int | None
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


def encoding(name: str, *, allow_unsafe: bool = False) -> Encoding:
    """The encoding of that name. ValueError: unknown, needs an image library, or pkl that was not allowed."""
    kind, colon, arguments = name.partition(":")
    if kind == "ndarray":
        return _ndarray(name, arguments if colon else None)
    if name in SCALARS:
        return _scalar(name)
    if name == "pkl" and not allow_unsafe:
        raise ValueError("encoding pkl runs code when it is read: set allow_unsafe_types where you trust the writer")
    plain: dict[str, tuple[int | None, Callable[[Any], bytes], Callable[[bytes], Any]]] = {
        "bytes": (None, lambda x: _typed(x, bytes), bytes),
        "str": (None, lambda x: _typed(x, str).encode("utf-8"), lambda data: data.decode("utf-8")),
        "int": (8, lambda x: _integer(x).to_bytes(8, "little", signed=True), _int),
        "str_int": (None, lambda x: str(_typed(x, int)).encode(), lambda data: int(data.decode())),
        "str_float": (None, lambda x: str(_typed(x, float)).encode(), lambda data: float(data.decode())),
        "str_decimal": (None, lambda x: str(_typed(x, Decimal)).encode(), _decimal),
        "json": (None, lambda x: json.dumps(x.tolist() if isinstance(x, np.ndarray) else x).encode(), json.loads),
        "pkl": (None, pickle.dumps, pickle.loads),
    }
    if name not in plain:
        known = ", ".join(sorted([*plain, *SCALARS, "ndarray[:DTYPE[:SHAPE]]"]))
        images = "an image, which is not read here; " if name in IMAGES else ""
        raise ValueError(f"encoding {name!r}: {images}known are {known}")
    return Encoding(name, *plain[name])


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int | np.integer) or not -(2**63) <= value < 2**63:
        raise ValueError(f"expected an int of 64 bits, got {value!r}")
    return int(value)


def _int(data: bytes) -> int:
    return int.from_bytes(_sized(data, 8), "little", signed=True)


def _decimal(data: bytes) -> Decimal:
    try:
        return Decimal(data.decode())
    except InvalidOperation:
        raise ValueError(f"{data[:40]!r} is no decimal number") from None


def _sized(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes where {size} are due")
    return data


def _scalar(name: str) -> Encoding:
    dtype = np.dtype(name).newbyteorder("<")

    def encode(value: Any) -> bytes:
        try:
            with np.errstate(over="raise"):
                stored = np.asarray(value).astype(dtype, casting="unsafe")
        except (TypeError, ValueError, OverflowError, FloatingPointError):
            raise ValueError(f"{value!r} is no {name}") from None
        if stored.ndim or (dtype.kind in "iu" and not stored == value):
            raise ValueError(f"{value!r} is no {name}")
        return stored.tobytes()

    def decode(data: bytes) -> Any:
        return np.frombuffer(_sized(data, dtype.itemsize), dtype)[0]

    return Encoding(name, dtype.itemsize, encode, decode)


def _ndarray(name: str, arguments: str | None) -> Encoding:
    """Arrays whose dtype and shape are in the name, or in each value."""
    parts = arguments.split(":") if arguments else []
    static = parts[0] if parts else None
    shape: tuple[int, ...] | None = None
    try:
        shape = tuple(int(dim) for dim in parts[1].split(",")) if len(parts) > 1 else None
    except ValueError:
        shape = (0,)
    if len(parts) > 2 or (static is not None and static not in DTYPE_CODES) or (shape is not None and min(shape) < 1):
        raise ValueError(f"encoding {name!r}: expected ndarray, ndarray:DTYPE or ndarray:DTYPE:DIM,DIM of dims from 1")
    size = None if static is None or shape is None else math.prod(shape) * np.dtype(static).itemsize

    def encode(value: Any) -> bytes:
        if not isinstance(value, np.ndarray) or value.dtype.name not in DTYPE_CODES or not value.size or not value.ndim:
            raise ValueError(f"expected an array with numbers in it and at least one dim, got {_shown(value)}")
        if (static or value.dtype.name) != value.dtype.name or (shape or value.shape) != value.shape:
            raise ValueError(f"expected {name}, got {_shown(value)}")
        head = b"" if static else bytes([DTYPE_CODES[value.dtype.name]])
        numbers = value.astype(value.dtype.newbyteorder("<"), copy=False)
        return head + (b"" if shape else _shape_bytes(value)) + numbers.tobytes()

    def decode(data: bytes) -> Array:
        kind, at, dims = static, 0, shape
        if kind is None:
            kind = CODE_DTYPES.get(data[0]) if data else None
            at = 1
            if kind is None:
                raise ValueError(f"dtype code {data[0] if data else 'missing'} is none of {sorted(CODE_DTYPES)}")
        if dims is None:
            dims, at = _read_shape(data, at)
        dtype = np.dtype(kind).newbyteorder("<")
        due = at + math.prod(dims) * dtype.itemsize
        return np.frombuffer(_sized(data, due), dtype, offset=at).reshape(dims)

    return Encoding(name, size, encode, decode)


def _shape_bytes(value: Array) -> bytes:
    width = next(w for w in range(4) if max(value.shape) < 2 ** (8 * 2**w))
    return bytes([value.ndim << 2 | width]) + np.array(value.shape).astype(f"<u{2**width}").tobytes()


def _read_shape(data: bytes, at: int) -> tuple[tuple[int, ...], int]:
    """(shape, offset behind it)."""
    if len(data) <= at:
        raise ValueError("the value ends before its shape")
    ndim, width = data[at] >> 2, 2 ** (data[at] & 3)
    end = at + 1 + ndim * width
    _sized(data[at + 1 : end], ndim * width)
    return tuple(int.from_bytes(data[i : i + width], "little") for i in range(at + 1, end, width)), end


def _shown(value: Any) -> str:
    return f"{value.dtype.name} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
