"""What a checkpoint's folder says of itself: manifest.json, with the size and the sha256 of every file, and of itself.

    {"format": 2, "step": 100, "meta": {...},
     "files": {"rank-00000.safetensors": {"bytes": 123, "sha256": "..."}},
     "tensors": {"params.norm.weight": {"shape": [512], "dtype": "float32", "boxes": [[[0], [256], "rank-00000..."], ...]}},
     "sha256": "... of all above"}

A box lies in its file under its key where it is the whole tensor, else under `key@offsets`. Formats: 1 was torch's own files
beside a meta.json (read by dcp.py, without unpickling anything but names of dtypes); 2 is this one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from torch import Tensor

from fmegatron.files import sha256
from fmegatron.sharding.chunks import Box, inside
from fmegatron.tensorfile import NAMES
from fmegatron.train import dcp
from fmegatron.train.dcp import Stored

NAME = "manifest.json"
FORMAT = 2
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES}
Read = Callable[[str, Box, Box], Tensor]  # key, saved box, wanted box inside it (global offsets) -> its elements


class Store(Protocol):
    """A checkpoint that can be read, of any format."""

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """What it holds."""

    @property
    def meta(self) -> dict[str, Any]:
        """What the caller of `save` gave along."""

    def reading(self) -> Any:
        """A context that gives a `Read`."""

    def damage(self, share: slice = slice(None)) -> list[str]:
        """What is wrong with a share of its files, a line each."""


@dataclass(frozen=True)
class Manifest:
    """A checkpoint of format 2. Where a tensor's boxes lie: boxes[key][i] -> name of the file."""

    folder: Path
    step: int
    meta: dict[str, Any]
    files: Mapping[str, tuple[int, str]]  # name: bytes, sha256
    tensors: Mapping[str, Stored]
    where: Mapping[str, Mapping[Box, str]] = field(repr=False)

    @contextmanager
    def reading(self) -> Iterator[Read]:
        """Slices out of mapped files: only what is wanted is read."""
        with ExitStack() as stack:
            opened: dict[str, Any] = {}

            def read(key: str, saved: Box, wanted: Box) -> Tensor:
                name = self.where[key][saved]
                if name not in opened:
                    opened[name] = stack.enter_context(safe_open(self.folder / name, framework="pt"))
                entry = box_name(key, self.tensors[key].shape, saved)
                if not saved[0]:
                    return opened[name].get_tensor(entry)
                return opened[name].get_slice(entry)[inside(wanted, saved[0])]

            yield read

    def damage(self, share: slice = slice(None)) -> list[str]:
        """Files that are missing, of another size, or of other bytes than were written."""
        found = []
        for name, (size, digest) in list(self.files.items())[share]:
            path = self.folder / name
            if not path.is_file():
                found.append(f"{name} is missing")
            elif path.stat().st_size != size:
                found.append(f"{name} has {path.stat().st_size} bytes, {size} were written")
            elif sha256(path) != digest:
                found.append(f"{name} has other bytes than were written (its sha256 differs)")
        return found


def dumps(
    step: int, meta: Mapping[str, Any], tensors: Mapping[str, tuple[Stored, list[str]]], files: Mapping[str, tuple[int, str]]
) -> str:
    """The text of a manifest; tensors: what is stored, and for each box its file. `meta` is strict JSON."""
    body = {
        "format": FORMAT,
        "step": step,
        "meta": dict(meta),
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())},
        "tensors": {
            key: {
                "shape": stored.shape,
                "dtype": str(stored.dtype).removeprefix("torch."),
                "boxes": [[*box, name] for box, name in zip(stored.boxes, names, strict=True)],
            }
            for key, (stored, names) in sorted(tensors.items())
        },
    }
    return json.dumps(body | {"sha256": _digest(body)}, allow_nan=False)


def loads(folder: Path, text: str) -> Manifest:
    """The manifest of a folder; ValueError where it is damaged, or of a format that this version does not know."""
    try:
        body = json.loads(text)
        digest = body.pop("sha256")
        version = body["format"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder}: {NAME} is damaged: it is not the JSON that was written") from None
    if version != FORMAT:
        raise ValueError(f"{folder} is a checkpoint of format {version}; this version of fmegatron reads 1 to {FORMAT}")
    if digest != _digest(body):
        raise ValueError(f"{folder}: {NAME} is damaged: its sha256 differs from what was written")
    tensors, where = {}, {}
    for key, given in body["tensors"].items():
        boxes = [((tuple(offsets), tuple(sizes)), name) for offsets, sizes, name in given["boxes"]]
        tensors[key] = Stored(tuple(given["shape"]), DTYPES[given["dtype"]], tuple(box for box, _ in boxes))
        where[key] = dict(boxes)
    files = {name: (given["bytes"], given["sha256"]) for name, given in body["files"].items()}
    return Manifest(folder, body["step"], body["meta"], files, tensors, where)


def box_name(key: str, shape: tuple[int, ...], box: Box) -> str:
    """The name of a box in its file."""
    return key if box[1] == shape else f"{key}@{','.join(map(str, box[0]))}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder claims to be a checkpoint."""
    return any((folder / name).is_file() for name in (NAME, dcp.META))


def open_store(folder: Path) -> Store:
    """The checkpoint in a folder; ValueError where it is none, or where what it says of itself is damaged."""
    if (folder / NAME).is_file():
        return loads(folder, (folder / NAME).read_text(encoding="utf-8", errors="replace"))
    if (folder / dcp.META).is_file():
        return dcp.Dcp.open(folder)
    raise ValueError(f"{folder} is no checkpoint: it holds no {NAME}")


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
