"""Folders of torch.distributed.checkpoint, read without unpickling: our format 1, Megatron-LM's torch_dist, TorchTitan's.

torch keeps the table of tensors as a pickle (`.metadata`), and each box as one `torch.save`. A pickle names the functions
that it wants called; here only the dataclasses of that table, sizes and dtypes are given to it, and anything else is
refused by name. Boxes are read by `torch.load(weights_only=True)`, torch's own restricted reader.
"""

from __future__ import annotations

import collections
import importlib
import io
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fmegatron.sharding.chunks import Box, inside

META = "meta.json"
# All that a table of tensors is made of. torch's part is imported when it is asked for: seven hundred modules come along.
TORCH = MappingProxyType({
    "torch.distributed.checkpoint.metadata": ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
                                              "MetadataIndex", "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
})  # fmt: skip
TABLE = MappingProxyType({
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{(module, name): PurePath for module in ("pathlib", "pathlib._local")
       for name in ("PosixPath", "WindowsPath", "PurePosixPath")},
})  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint: its true global shape, and the boxes that it was written in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]


class Inert:
    """Stands for an object that nobody needs: takes anything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


INERT = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")  # plans of the writer lie beside the table


class _Table(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in TORCH.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if (module, name) not in TABLE:
            if module.startswith(INERT):
                return Inert
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a table of tensors does not need")
        return TABLE[module, name]


@dataclass(frozen=True)
class Dcp:
    """A folder of torch.distributed.checkpoint; `meta` is our meta.json of format 1, else empty."""

    folder: Path
    tensors: Mapping[str, Stored]
    meta: dict[str, Any]
    where: Mapping[tuple[str, tuple[int, ...]], Any]  # (key, offsets) -> torch's file, offset and length

    @staticmethod
    def open(folder: Path) -> Dcp:
        """ValueError where the table is missing, damaged, or a pickle of something else."""
        try:
            table = _Table(io.BytesIO((folder / ".metadata").read_bytes())).load()
            stored = {key: _stored(x) for key, x in table.state_dict_metadata.items() if hasattr(x, "chunks")}
            where = {(index.fqn, tuple(index.offset or ())): info for index, info in table.storage_data.items()}
            meta = json.loads((folder / META).read_text(encoding="utf-8"))["meta"] if (folder / META).is_file() else {}
        except FileNotFoundError:
            raise ValueError(f"{folder} is damaged: its .metadata is missing") from None
        except Exception as error:  # a torn pickle fails in any way
            raise ValueError(f"{folder} is damaged: .metadata or {META} cannot be read: {error}") from None
        return Dcp(folder, stored, meta, where)

    @contextmanager
    def reading(self) -> Iterator[Callable[[str, Box, Box], Tensor]]:
        """Boxes are loaded whole; the last one is kept, since pieces next to each other share it."""
        last: dict[tuple[str, Box], Tensor] = {}

        def read(key: str, saved: Box, wanted: Box) -> Tensor:
            if (key, saved) not in last:
                last.clear()
                last[key, saved] = self._load(key, saved)
            return last[key, saved][inside(wanted, saved[0])]

        yield read

    def _load(self, key: str, saved: Box) -> Tensor:
        info = self.where[key, saved[0]]
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{self.folder}: {key} is compressed ({info.transform_descriptors[0]}): not supported")
        with open(self._file(info), "rb") as stream:
            stream.seek(info.offset)
            data = io.BytesIO(stream.read(info.length))
        try:
            box = torch.load(data, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{self.folder}: {info.relative_path} is damaged at {key}: {error}") from None
        assert isinstance(box, Tensor)
        return box.reshape(saved[1])

    def _file(self, info: Any) -> Path:
        name = str(info.relative_path)
        if Path(name).name != name:
            raise ValueError(f"{self.folder} is damaged: its table names a file outside of it, {name}")
        return self.folder / name

    def damage(self, share: slice = slice(None)) -> list[str]:
        """Files that are missing or too short; this format has no hashes."""
        ends: dict[str, int] = {}
        for info in self.where.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        found = []
        for name, end in sorted(ends.items())[share]:
            path = self.folder / Path(name).name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size < end:
                found.append(f"{name} has {path.stat().st_size} bytes, {end} were written")
        return found


def _stored(x: Any) -> Stored:
    boxes = tuple((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in x.chunks)
    return Stored(tuple(x.size), x.properties.dtype, boxes)
