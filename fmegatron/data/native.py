"""loops.cpp, compiled once where a C++ compiler is at hand: the two indices whose loops no array operation holds well.

    loops = native.loops()          None: no compiler, or no place to keep what it makes; numpy does the same, slower

The library lies in $XDG_CACHE_HOME/fmegatron (~/.cache/fmegatron), under a hash of its source and compiler flags.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SOURCE = Path(__file__).with_name("loops.cpp")
FLAGS = ("-O3", "-shared", "-fPIC", "-std=c++17", "-ffp-contract=off")  # no fused multiply-add: numpy has none either


@dataclass(frozen=True)
class Loops:
    """The functions of a loaded library."""

    library: ctypes.CDLL

    def sample_index(
        self, sizes: npt.NDArray[np.int32], order: npt.NDArray[np.int32], seq: int, extra: int, index: npt.NDArray[Any]
    ) -> None:
        """Fill `index` [rows + 1, 2], int32 or int64, as `gpt_indices` describes it."""
        fill = self.library.sample_index_int32 if index.dtype == np.int32 else self.library.sample_index_int64
        fill(_array(sizes), _array(order), *map(ctypes.c_int64, (len(order), seq, extra, len(index) - 1)), _array(index))

    def blend(
        self, weights: npt.NDArray[np.float64], limits: npt.NDArray[np.int64] | None, number: npt.NDArray[np.int16],
        sample: npt.NDArray[np.int64],
    ) -> None:  # fmt: skip
        """Fill `number` and `sample` [size], as `blending` describes them."""
        size, sets = ctypes.c_int64(len(number)), ctypes.c_int64(len(weights))
        most = None if limits is None else _array(limits)
        self.library.blend(_array(weights), sets, most, size, _array(number), _array(sample))


def loops() -> Loops | None:
    """The library, compiled first where it is not there yet."""
    path = cache_folder() / f"loops-{_key()}.so"
    try:
        if not path.is_file():
            _compile(path)
        return Loops(ctypes.CDLL(os.fspath(path)))
    except (OSError, subprocess.SubprocessError):
        return None


def cache_folder() -> Path:
    """Where compiled code is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fmegatron"


def _key() -> str:
    facts = [SOURCE.read_text(), *FLAGS, platform.machine(), platform.system()]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _compile(path: Path) -> None:
    """Whole or not at all, whoever else compiles at the same time. Raises OSError without a compiler."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        words = [compiler, *FLAGS, os.fspath(SOURCE), "-o", os.fspath(temporary)]
        subprocess.run(words, check=True, capture_output=True, timeout=60)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _array(x: npt.NDArray[Any]) -> ctypes.c_void_p:
    assert x.flags.c_contiguous
    return ctypes.c_void_p(x.ctypes.data)
