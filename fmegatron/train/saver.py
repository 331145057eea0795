"""Saving while training goes on: a copy of the state on the host, then a thread that writes it.

    with Saver(write, items, background=True) as saver:
        saver.save(state, step, meta)     returns once the state is copied; the save before is waited for first
        saver.check()                     each step: raises what went wrong in the thread, returns what was written

`write` is `checkpoint.save` with its folder; in a background it gets a process group of its own, so that its messages and
the training's never meet. What it writes is bit for bit what it writes in the foreground. `items` (`saving.items`) cuts a
state into a checkpoint's tensors; of the copy they are views, made once and good for as long as the state keeps its structure.
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

from fmegatron import tree
from fmegatron.sharding.chunks import Chunks
from fmegatron.train.together import Group
from fmegatron.tree import Tree

Items = Mapping[str, Chunks]
Write = Callable[[int, Items, Mapping[str, Any], Group], Path]  # step, items, meta, group


class Saver:
    """Writes one checkpoint at a time, in the foreground or behind the training's back; every process has one."""

    def __init__(self, write: Write, items: Callable[[Tree], Items], *, background: bool) -> None:
        self._write, self._items = write, items
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._group = dist.new_group(backend="gloo") if background and dist.is_initialized() else None
        self._under_way: Future[Path] | None = None
        self._host: Host | None = None  # memory of the last copy, used again: fresh pages are slow

    def save(
        self, state: Tree, step: int, meta: Mapping[str, Any], only: Callable[[Items], Items] = lambda items: items
    ) -> Path | None:
        """Begin to save; the checkpoint that was finished meanwhile, or in the foreground this one. only: picks of them."""
        if self._pool is None:
            return self._write(step, only(self._items(state)), meta, None)
        before = self.wait()
        if self._host is None or not self._host.fits(state):
            self._host = None  # its memory goes before new is taken
            self._host = Host(state, self._items)
        self._under_way = self._pool.submit(self._write, step, only(self._host.take(state)), meta, self._group)
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


class Host:
    """Memory on the host for states of one structure, pinned where they come from a GPU, and the items that lie in it.

    A leaf of which this process gives nothing (a copy of what another rank gives) has no memory here.
    """

    def __init__(self, state: Tree, items: Callable[[Tree], Items]) -> None:
        self._leaves, self._spec = tree.flatten(state)
        self._likes = _likes(self._leaves)
        given = items(tree.unflatten(self._spec, [x.detach() for x in self._leaves]))
        bases = {x.untyped_storage().data_ptr() for chunks in given.values() for _, x in chunks.pieces if x.numel()}
        own = [x.untyped_storage().data_ptr() in bases for x in self._leaves]
        self._own = [i for i, gives in enumerate(own) if gives]
        self._memory = [_memory(x) if gives else _nothing(x) for x, gives in zip(self._leaves, own, strict=True)]
        self._items = items(tree.unflatten(self._spec, self._memory))
        self._leaves = []

    def fits(self, state: Tree) -> bool:
        """Whether a state has the structure, shapes, dtypes and devices of this one."""
        leaves, spec = tree.flatten(state)
        return bool(spec == self._spec) and _likes(leaves) == self._likes

    def take(self, state: Tree) -> Items:
        """Copy a state; its items, until the next call."""
        leaves = tree.leaves(state)
        with torch.no_grad():
            torch._foreach_copy_([self._memory[i] for i in self._own], [leaves[i] for i in self._own], non_blocking=True)
        if any(like[2].type == "cuda" for like in self._likes):
            torch.cuda.synchronize()
        return self._items


def _likes(leaves: list[Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(x.shape, x.dtype, x.device) for x in leaves]


def _memory(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)


def _nothing(x: Tensor) -> Tensor:
    """In place of a leaf that is not given: its shape and dtype, and one element of memory."""
    return torch.empty((), dtype=x.dtype).expand(x.shape)
