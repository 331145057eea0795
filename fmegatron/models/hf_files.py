"""The files of a Hugging Face folder: its JSON, and its tensors by name, read in slices. What is damaged is named."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fmegatron.models import hf_quantized

INDEX = "model.safetensors.index.json"


def json_of(file: Path) -> dict[str, Any]:
    """The table in a file; ValueError, naming the file, where it holds none."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{file} is damaged: it holds no table")
    return held


def _index(folder: Path) -> dict[str, str] | None:
    """{tensor: its file}, where there are several files."""
    index = folder / INDEX
    if not index.is_file():
        return None
    where = json_of(index).get("weight_map")
    if not isinstance(where, dict):
        raise ValueError(f"{index} is damaged: it holds no weight_map")
    return where


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def has(folder: Path, name: str) -> bool:
    """Whether a tensor is among the folder's files; without weights, as the config says."""
    where, single = _index(folder), folder / "model.safetensors"
    if where is not None:
        return name in where
    if not single.is_file():
        return True
    with _open(single) as file:
        return name in file.keys()  # noqa: SIM118


class Files:
    """The tensors of a folder by name, read in slices when asked for; remembers which were not."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        index = _index(folder)
        names = ["model.safetensors"] if index is None else sorted(set(index.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder}: no {missing[0]} here; weights are read from safetensors files only")
        opened = [stack.enter_context(_open(folder / name)) for name in names]
        self.folder, self.where = folder, {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        self.unread = set(self.where)

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor; ValueError where there is none of that name."""
        if f"{name}_blocks" in self.where:
            experts, out, groups, _ = self.shape(f"{name}_blocks")
            return [experts, groups * hf_quantized.GROUP, out]
        return list(self.where[self._own(name)].get_slice(self._own(name)).get_shape())

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """A box of a tensor; only its bytes are read. What is stored in few bits comes as numbers."""
        if f"{name}_blocks" in self.where:
            return hf_quantized.read_mxfp4(self._stored, name, slices)
        if f"{name}_scale_inv" in self.where:
            return hf_quantized.read_fp8(self._stored, name, slices)
        return self._stored(name, slices)

    def _stored(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        name = self._own(name)
        return self.where[name].get_slice(name)[slices]

    def known(self, name: str) -> None:
        """Note that a tensor has its place in the model, whichever process reads it."""
        packed = f"{name}_blocks" in self.where
        self.unread -= {f"{name}_blocks", f"{name}_scales"} if packed else {self._own(name), f"{name}_scale_inv"}

    def _own(self, name: str) -> str:
        name = name if name in self.where else name.removeprefix("transformer.")  # GPT-2's own files have no prefix
        if name not in self.where:
            raise ValueError(f"{self.folder}: tensor {name} is missing from the weights")
        return name
