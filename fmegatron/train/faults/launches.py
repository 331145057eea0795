"""Which collectives this process has launched, and which one it waits for now: a transport around each of the mesh's own.

    mesh = noted(mesh, launches)          launches.waiting, launches.last, launches.count, launches.stalled

For a rank that hangs, and for how long a rank waits for others. Compiled blocks launch from compiled code, unseen: they are
noted while they are traced.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmegatron.sharding import Mesh
from fmegatron.sharding.mesh import Axis, with_transports
from fmegatron.sharding.transports import Around, Splits, Transport

KEPT = 8  # launches told in a report
PENDING = 1024  # results that may be waited for


class Launch(NamedTuple):
    """One collective: the how-manieth of this process, its kind, axis, and what this rank gave."""

    number: int
    collective: str
    axis: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.collective} over {self.axis} of {list(self.shape)} {self.dtype} (the {self.number}th collective)"


class Launches:
    """The record, written by the thread that trains and read by the one that watches."""

    def __init__(self) -> None:
        self.count = 0
        self.last: deque[Launch] = deque(maxlen=KEPT)
        self.waiting: Launch | None = None
        self.stalled = 0.0  # seconds on the CPU's clock
        self._pending: OrderedDict[int, Launch] = OrderedDict()
        self._events: list[tuple[Any, Any]] = []  # on a GPU: before and after each wait on its stream

    def issue(self, collective: str, axis: str, payload: Tensor, result: Tensor) -> Tensor:
        """Note a launch whose result will be `result`."""
        self.count += 1
        launch = Launch(self.count, collective, axis, tuple(payload.shape), str(payload.dtype).removeprefix("torch."))
        self.last.append(launch)
        self._pending[id(result)] = launch
        while len(self._pending) > PENDING:
            self._pending.popitem(last=False)
        return result

    def wait(self, x: Tensor, inner: Transport) -> Tensor:
        """Wait for a result, and count the time."""
        self.waiting = self._pending.pop(id(x), None)
        if x.is_cuda and len(self._events) < PENDING:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            x = inner.wait(x)
            after.record()
            self._events.append((before, after))
        else:
            start = time.perf_counter()
            x = inner.wait(x)
            self.stalled += time.perf_counter() - start
        self.waiting = None
        return x

    def take_stalled(self) -> float:
        """Seconds that this process has waited for collectives since the last call."""
        if self._events:
            torch.cuda.synchronize()
            self.stalled += sum(before.elapsed_time(after) for before, after in self._events) / 1e3
            self._events.clear()
        seconds, self.stalled = self.stalled, 0.0
        return seconds


def noted(mesh: Mesh, launches: Launches) -> Mesh:
    """The same mesh with transports that note what they launch in `launches`, where processes are its ranks."""
    if mesh.kind != "device":
        return mesh
    wrap: dict[str, Transport] = {axis.name: Noted(axis.transport, launches) for axis in mesh.axes}
    return with_transports(mesh, wrap)


@dataclass(frozen=True)
class Noted(Around):
    """Another transport, noting each collective that communicates."""

    launches: Launches = field(compare=False, repr=False)

    def all_reduce(self, x: Tensor, axis: Axis, rank: Tensor, op: str) -> Tensor:
        return self.launches.issue("all_reduce", axis.name, x, self.inner.all_reduce(x, axis, rank, op))

    def all_gather(self, x: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        return self.launches.issue("all_gather", axis.name, x, self.inner.all_gather(x, axis, rank))

    def reduce_scatter(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        return self.launches.issue("reduce_scatter", axis.name, blocks, self.inner.reduce_scatter(blocks, axis, rank))

    def all_to_all(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        return self.launches.issue("all_to_all", axis.name, blocks, self.inner.all_to_all(blocks, axis, rank))

    def permute(self, x: Tensor, axis: Axis, rank: Tensor, source: tuple[int, ...]) -> Tensor:
        return self.launches.issue("permute", axis.name, x, self.inner.permute(x, axis, rank, source))

    def exchange(self, x: Tensor, axis: Axis, rank: Tensor, send: Splits, receive: Splits) -> Tensor:
        return self.launches.issue("all_to_all", axis.name, x, self.inner.exchange(x, axis, rank, send, receive))

    def wait(self, x: Tensor) -> Tensor:
        return self.launches.wait(x, self.inner)
