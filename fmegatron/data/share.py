"""One reader for the ranks that hold the same rows: it reads and sends each batch, the others read nothing.

    dp=2 tp=2 cp=2      reader of rows 0 … n/2 - 1       rank 0, to ranks 1, 2, 3
                        reader of the others             rank 4, to ranks 5, 6, 7

A batch travels in host memory, over a gloo group of its own, in the caller's thread: what it costs is part of what a step
waits for its batch. An error of the reader is raised on all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fmegatron.sharding import Sharding

Batch = dict[str, Tensor]
ALIGN = 8  # bytes: every array of a message begins at a multiple


@dataclass(frozen=True)
class Share:
    """The processes that hold the same rows; the group's first reads."""

    group: dist.ProcessGroup
    reads: bool

    def spread(self, made: Iterator[Batch], pin: bool = False) -> Iterator[Batch]:
        """The reader's batches, on every rank of the group; `made` is not touched on the others.

        pin: received into memory that a GPU copies from without waiting. Raises ValueError on all where the reader fails.
        """
        while True:
            batch, error = _next(made) if self.reads else (None, None)
            said = self._send(_packed(batch, error)) if self.reads else self._receive()
            if error is not None:
                raise error
            if not self.reads:
                batch = _unpacked(said)
                batch = {key: x.pin_memory() for key, x in batch.items()} if batch and pin else batch
            if batch is None:
                return
            yield batch

    def _send(self, message: Tensor) -> Tensor:
        dist.broadcast(torch.tensor([len(message)]), group=self.group, group_src=0)
        dist.broadcast(message, group=self.group, group_src=0)
        return message

    def _receive(self) -> Tensor:
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, group=self.group, group_src=0)
        message = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(message, group=self.group, group_src=0)
        return message


def share_of(sh: Sharding) -> Share | None:
    """Who reads for whom on a mesh of processes, which all call this; None where each reads rows of its own."""
    mesh = sh.mesh
    if mesh.kind != "device" or mesh.rank is None:
        return None
    ranks = sharers(sh, mesh.rank)
    if len(ranks) == 1:
        return None
    return Share(dist.new_group(ranks, backend="gloo", use_local_synchronization=True), mesh.rank == ranks[0])


def sharers(sh: Sharding, rank: int) -> list[int]:
    """The ranks that hold the same rows of a batch as `rank`, itself among them."""
    cut = sh.placement("batch seq").of("batch")
    row = [sh.mesh.coordinates(rank)[axis] for axis in cut]
    return [r for r in range(sh.mesh.size) if [sh.mesh.coordinates(r)[axis] for axis in cut] == row]


def _next(made: Iterator[Batch]) -> tuple[Batch | None, Exception | None]:
    try:
        return next(made, None), None
    except Exception as error:
        return None, error


def _packed(batch: Batch | None, error: Exception | None) -> Tensor:
    """One message, uint8: the length of its head, the head (JSON), the arrays; the inverse of `_unpacked`."""
    arrays = {key: np.ascontiguousarray(x.numpy()) for key, x in (batch or {}).items()}
    entries = {key: (x.dtype.str, x.shape) for key, x in arrays.items()}
    head = json.dumps({"batch": None if batch is None else entries, "error": None if error is None else str(error)}).encode()
    parts = [len(head).to_bytes(8, "little"), head, *(x.reshape(-1).view(np.uint8).data for x in arrays.values())]
    whole = b"".join(part + bytes(-len(part) % ALIGN) for part in map(bytes, parts))
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8)


def _unpacked(message: Tensor) -> Batch | None:
    whole = message.numpy()
    at = ALIGN + int.from_bytes(whole[:8].tobytes(), "little")
    head = json.loads(whole[8:at].tobytes())
    if head["error"] is not None:
        raise ValueError(f"the rank that reads for this one: {head['error']}")
    if head["batch"] is None:
        return None
    batch: Batch = {}
    for key, (dtype, shape) in head["batch"].items():
        at += -at % ALIGN
        size = np.dtype(dtype).itemsize * int(np.prod(shape))
        batch[key] = torch.from_numpy(whole[at : at + size].view(dtype).reshape(shape))
        at += size
    return batch
