"""A global tensor as the pieces of it that lie here, and how torch.distributed.checkpoint writes and reads those.

torch asks a planner what to write and what to read. Ours speak of boxes inside a global shape and of nothing else: no
DTensor, no mesh. A virtual mesh, which holds every rank's pieces in one process, is the same case as one rank of many.
"""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from fmegatron.sharding.chunks import Chunks


class ChunkSavePlanner(SavePlanner):
    """Writes each piece as one box. ValueError unless the boxes of all processes tile every tensor."""

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.items: dict[str, Chunks] = state_dict

    def create_local_plan(self) -> SavePlan:
        self.pieces: dict[MetadataIndex, torch.Tensor] = {}
        writes: list[WriteItem] = []
        kinds: dict[str, tuple[tuple[int, ...], set[torch.dtype]]] = {}
        for key, chunks in self.items.items():
            kinds[key] = tuple(chunks.shape), {tensor.dtype for _, tensor in chunks.pieces}
            for box, tensor in zip(_boxes(key, chunks), (tensor for _, tensor in chunks.pieces), strict=True):
                if tensor.numel():
                    index = MetadataIndex(key, box.offsets)
                    properties = TensorProperties(dtype=tensor.dtype)
                    data = TensorWriteData(box, properties, torch.Size(chunks.shape))
                    writes.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
                    self.pieces[index] = tensor.detach()
        return SavePlan(writes, planner_data=kinds)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        stored: dict[str, STORAGE_TYPES] = {}
        for key in dict.fromkeys(key for plan in all_plans for key in plan.planner_data):
            held = [plan.planner_data[key] for plan in all_plans if key in plan.planner_data]
            shapes, dtypes = {shape for shape, _ in held}, set[torch.dtype]().union(*(dtypes for _, dtypes in held))
            if len(shapes) > 1 or len(dtypes) > 1:
                raise ValueError(f"{key}: pieces disagree: shapes {sorted(shapes)}, dtypes {sorted(map(str, dtypes))}")
            properties = TensorProperties(dtype=min(dtypes, key=str, default=torch.float32))
            stored[key] = TensorStorageMetadata(properties, torch.Size(shapes.pop()), [])
        for plan in all_plans:
            for item in plan.items:
                tensor = stored[item.index.fqn]
                assert isinstance(tensor, TensorStorageMetadata) and item.tensor_data is not None
                tensor.chunks.append(item.tensor_data.chunk)
        for key, tensor in stored.items():
            assert isinstance(tensor, TensorStorageMetadata)
            _check_tiling(key, tensor.size, tensor.chunks)
        return [replace(plan, planner_data=None) for plan in all_plans], Metadata(stored)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self.pieces[write_item.index]


class ChunkLoadPlanner(LoadPlanner):
    """Reads each saved box that a piece needs, once, and cuts all pieces from it."""

    def __init__(self, name: str) -> None:
        self.name = name  # of the checkpoint, for messages

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self.wanted: dict[str, Chunks] = state_dict
        self.stored = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        self._check_wanted()
        self.cuts: dict[MetadataIndex, list[tuple[torch.Tensor, ReadItem]]] = {}
        reads: list[ReadItem] = []
        for key, chunks in self.wanted.items():
            tensor = self.stored[key]
            assert isinstance(tensor, TensorStorageMetadata)
            sizes = {box.offsets: box.sizes for box in tensor.chunks}
            boxes = _boxes(key, chunks)
            filled = 0
            for cut in create_read_items_for_chunk_list(key, tensor, boxes):
                saved, piece = cut.storage_index, cut.dest_index.index
                assert saved.offset is not None and piece is not None
                if saved not in self.cuts:
                    zeros = torch.Size((0,) * len(saved.offset))
                    reads.append(ReadItem(LoadItemType.TENSOR, saved, zeros, saved, zeros, sizes[saved.offset]))
                self.cuts.setdefault(saved, []).append((chunks.pieces[piece][1].detach(), cut))
                filled += math.prod(cut.lengths)
            assert filled == sum(math.prod(box.sizes) for box in boxes), f"{key}: the saved boxes leave holes"
        return LoadPlan(reads)

    def _check_wanted(self) -> None:
        problems = [problem for key, chunks in self.wanted.items() if (problem := self._problem(key, chunks))]
        if problems:
            more = f" (and {len(problems) - 1} more of {len(self.wanted)} tensors)" if len(problems) > 1 else ""
            raise ValueError(f"checkpoint {self.name}: {problems[0]}{more}")

    def _problem(self, key: str, chunks: Chunks) -> str | None:
        tensor = self.stored.get(key)
        if not isinstance(tensor, TensorStorageMetadata):
            near = difflib.get_close_matches(key, self.stored, n=1)
            return f'no tensor "{key}" of shape {tuple(chunks.shape)}' + (f'; nearest is "{near[0]}"' if near else "")
        if tuple(tensor.size) != tuple(chunks.shape):
            return f'"{key}" has shape {tuple(tensor.size)}, wanted is {tuple(chunks.shape)}'
        saved = tensor.properties.dtype
        for _, piece in chunks.pieces:
            if piece.dtype != saved and not (piece.is_floating_point() and saved.is_floating_point):
                shapes = f"of shape {tuple(tensor.size)} has dtype {saved}, wanted is {tuple(chunks.shape)}"
                return f'"{key}" {shapes} {piece.dtype}; only floating dtypes are converted'
        return None

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("only tensors are saved")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = self.stored[read_item.storage_index.fqn]
        assert isinstance(tensor, TensorStorageMetadata)
        return torch.empty(read_item.lengths, dtype=tensor.properties.dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        for piece, cut in self.cuts.pop(read_item.storage_index):
            source = tensor[_slices(cut.storage_offsets, cut.lengths)]
            piece[_slices(cut.dest_offsets, cut.lengths)].copy_(source)


def _slices(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))


def _boxes(key: str, chunks: Chunks) -> list[ChunkStorageMetadata]:
    boxes = []
    for offsets, tensor in chunks.pieces:
        if not len(offsets) == tensor.ndim == len(chunks.shape) or any(
            start < 0 or start + length > size
            for start, length, size in zip(offsets, tensor.shape, chunks.shape, strict=True)
        ):
            piece = f"piece of shape {tuple(tensor.shape)} at {tuple(offsets)}"
            raise ValueError(f"{key}: a {piece} does not lie inside the global shape {tuple(chunks.shape)}")
        boxes.append(ChunkStorageMetadata(torch.Size(offsets), tensor.shape))
    return boxes


def _check_tiling(key: str, shape: Sequence[int], boxes: Sequence[ChunkStorageMetadata]) -> None:
    """Each element in one box: no two boxes overlap, and their volumes sum to the whole."""
    axis = max(range(len(shape)), key=lambda dim: len({box.offsets[dim] for box in boxes}), default=None)
    if axis is not None:
        active: list[ChunkStorageMetadata] = []  # boxes that the sweep along `axis` has not left yet
        for box in sorted(boxes, key=lambda box: box.offsets[axis]):
            active = [other for other in active if other.offsets[axis] + other.sizes[axis] > box.offsets[axis]]
            for other in active:
                if _overlap(box, other):
                    places = f"{tuple(other.offsets)}+{tuple(other.sizes)} and {tuple(box.offsets)}+{tuple(box.sizes)}"
                    raise ValueError(f"{key}: the pieces {places} overlap; a replicated piece has one owner")
            active.append(box)
    volume, total = sum(math.prod(box.sizes) for box in boxes), math.prod(shape)
    if volume != total:
        raise ValueError(f"{key}: the pieces hold {volume} of the {total} elements of {tuple(shape)}")


def _overlap(a: ChunkStorageMetadata, b: ChunkStorageMetadata) -> bool:
    bounds = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(start < other + length and other < start + size for start, size, other, length in bounds)
