"""Saving while training goes on: a copy of the state on the host, then a thread that writes it.

    with Saver(write, background=True) as saver:
        saver.save(items, step, meta)     returns once the state is copied; the save before is waited for first
        saver.check()                     each step: raises what went wrong in the thread, returns what was written

`write` is `checkpoint.save` with its folder; in a background it gets a process group of its own, so that its messages and
the training's never meet. What it writes is bit for bit what it writes in the foreground.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fmegatron.sharding.chunks import Chunks
from fmegatron.train.together import Group

Write = Callable[[int, Mapping[str, Chunks], Mapping[str, Any], Group], Path]  # step, items, meta, group


class Saver:
    """Writes one checkpoint at a time, in the foreground or behind the training's back; every process has one."""

    def __init__(self, write: Write, *, background: bool) -> None:
        self._write = write
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._group = dist.new_group(backend="gloo") if background and dist.is_initialized() else None
        self._under_way: Future[Path] | None = None
        self._host: dict[tuple[str, int], Tensor] = {}  # memory of the last copy, used again: fresh pages are slow

    def save(self, items: Mapping[str, Chunks], step: int, meta: Mapping[str, Any]) -> Path | None:
        """Begin to save; the checkpoint that was finished meanwhile, or in the foreground this one."""
        if self._pool is None:
            return self._write(step, items, meta, None)
        before = self.wait()
        copied = snapshot(items, self._host)
        self._under_way = self._pool.submit(self._write, step, copied, meta, self._group)
        return before

    def check(self) -> Path | None:
        """The checkpoint that is newly finished, if any; raises the thread's error. Does not wait."""
        return self.wait() if self._under_way is not None and self._under_way.done() else None

    def wait(self) -> Path | None:
        """Wait for the save under way; its checkpoint, or its error."""
        under_way, self._under_way = self._under_way, None
        return under_way.result() if under_way is not None else None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            if error is None:
                self.wait()


def snapshot(items: Mapping[str, Chunks], host: dict[tuple[str, int], Tensor]) -> dict[str, Chunks]:
    """Copies of all pieces in host memory, pinned where they come from a GPU; `host` keeps the memory for the next time."""
    copied = {}
    for key, chunks in items.items():
        pieces = []
        for i, (offsets, x) in enumerate(chunks.pieces):
            old = host.get((key, i))
            if old is None or old.shape != x.shape or old.dtype != x.dtype:
                old = host[key, i] = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
            old.copy_(x.detach(), non_blocking=True)
            pieces.append((offsets, old))
        copied[key] = Chunks(chunks.shape, tuple(pieces))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copied
