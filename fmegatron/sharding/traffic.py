"""What a program sends: every collective of every rank, in order, on any kind of mesh. No globals, no hooks.

    mesh, traffic = counted(virtual_mesh(dp=2, tp=4))      a mesh like the given one, whose transports report
    step = make_step(model, tx, Sharding(mesh, rules))
    step(state, batch)
    print(traffic)                                         count and bytes by collective and axis

Bytes are what one rank hands in; for an all_gather, what it receives. So an all_gather and its transpose, a reduce_scatter,
have equal bytes. Over the wire a rank sends, by the ring algorithm on n ranks:

    all_reduce 2 (n - 1) / n bytes      all_gather, reduce_scatter, all_to_all (n - 1) / n bytes      permute bytes

Counting is Python's: a compiled block reports while it is traced and not when it runs, so count an eager step; and a
derivative taken outside of a virtual mesh goes through the tensors that stand for the ranks, not through its transports.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from fmegatron.sharding.mesh import Axis, Mesh, with_transports
from fmegatron.sharding.transports import Around, Splits, Transport


class Event(NamedTuple):
    """One collective on one rank is issued, or its result is waited for."""

    kind: Literal["issue", "wait"]
    collective: str
    axis: str
    bytes: int


@dataclass(frozen=True)
class Row:
    """All collectives of one kind along one axis: how many, their bytes, and what a rank sends of them over the wire."""

    collective: str
    axis: str
    count: int
    bytes: int
    wire: int


def wire_bytes(collective: str, ranks: int, payload: int) -> int:
    """What one rank sends for a collective of `payload` bytes, by the ring algorithm."""
    if collective == "permute":
        return payload
    return payload * (ranks - 1) // ranks * (2 if collective == "all_reduce" else 1)


class Traffic:
    """The events of every rank, in order. Where one process runs all ranks as one (virtual, abstract) rank 0 is all of them."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = sizes  # ranks by axis
        self.events: dict[int, list[Event]] = {}
        self._lock = threading.Lock()
        self._issued: dict[int, tuple[Tensor, int, Event]] = {}  # by the identity of an unfinished result

    def add(self, rank: int, events: Iterable[Event]) -> None:
        """Note events of a rank."""
        with self._lock:
            self.events.setdefault(rank, []).extend(events)

    def issue(self, rank: int, collective: str, axis: str, payload: Tensor, result: Tensor) -> None:
        """Note that a rank has issued a collective, which will fill `result`."""
        event = Event("issue", collective, axis, payload.numel() * payload.element_size())
        self.add(rank, [event])
        with self._lock:
            self._issued[id(result)] = (result, rank, event)

    def wait(self, result: Tensor) -> None:
        """Note that what was issued is waited for; nothing where that was in an earlier step (`apart.arrived`)."""
        with self._lock:
            _, rank, event = self._issued.pop(id(result), (None, 0, None))
        if event is not None:
            self.add(rank, [event._replace(kind="wait")])

    def clear(self) -> None:
        """Forget what was noted so far."""
        with self._lock:
            self.events.clear()

    def cut(self, rank: int, start: int) -> list[Event]:
        """Take a rank's events from number `start` on out of the record."""
        with self._lock:
            events = self.events.setdefault(rank, [])
            self.events[rank], taken = events[:start], events[start:]
        return taken

    def rows(self, rank: int | None = None) -> list[Row]:
        """What one rank sent, by collective and axis; None is the first rank seen here."""
        events = self.events.get(min(self.events, default=0) if rank is None else rank, [])
        count: Counter[tuple[str, str]] = Counter()
        total: Counter[tuple[str, str]] = Counter()
        wire: Counter[tuple[str, str]] = Counter()
        for kind, collective, axis, payload in events:
            if kind == "issue":
                count[collective, axis] += 1
                total[collective, axis] += payload
                wire[collective, axis] += wire_bytes(collective, self.sizes[axis], payload)
        return [Row(*key, count[key], total[key], wire[key]) for key in sorted(count)]

    def counts(self, rank: int | None = None) -> dict[tuple[str, str], tuple[int, int]]:
        """{(collective, axis): (count, bytes)} of one rank."""
        return {(row.collective, row.axis): (row.count, row.bytes) for row in self.rows(rank)}

    def __str__(self) -> str:
        return "\n".join(table(self.rows(), self.sizes))


def table(rows: Iterable[Row], sizes: dict[str, int]) -> list[str]:
    """Lines of a table of rows, one rank's."""
    cells: list[Sequence[str]] = [("collective", "axis", "ranks", "count", "bytes", "sent by ring")]
    cells += [(r.collective, r.axis, f"{sizes[r.axis]}", f"{r.count}", f"{r.bytes:,}", f"{r.wire:,}") for r in rows]
    return columns(cells, 2)


def columns(cells: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of cells as a table; the first `left` columns are set to the left, the others to the right."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]

    def line(row: Sequence[str]) -> str:
        sides = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(sides).rstrip()

    return [line(row) for row in cells]


def counted(mesh: Mesh) -> tuple[Mesh, Traffic]:
    """The same mesh with transports that report, and the record that they report to."""
    traffic = Traffic(mesh.sizes)
    wrap: dict[str, Transport] = {axis.name: Counted(axis.transport, traffic, mesh) for axis in mesh.axes}
    return with_transports(mesh, wrap), traffic


@dataclass(frozen=True)
class Counted(Around):
    """Another transport, reporting each collective that communicates. pick, spread and keep_first do not."""

    traffic: Traffic = field(compare=False, repr=False)
    mesh: Mesh = field(compare=False, repr=False)

    def _report(self, name: str, axis: Axis, rank: Tensor, payload: Tensor, ranks_at: int, result: Tensor) -> Tensor:
        """Note a collective; on a virtual mesh the payload has the ranks on dim `ranks_at`."""
        mine = payload.select(ranks_at, 0) if self.mesh.kind == "virtual" else payload
        here = int(rank) if self.mesh.kind == "threads" else self.mesh.rank or 0
        self.traffic.issue(here, name, axis.name, mine, result)
        return result

    def all_reduce(self, x: Tensor, axis: Axis, rank: Tensor, op: str) -> Tensor:
        return self._report("all_reduce", axis, rank, x, 0, self.inner.all_reduce(x, axis, rank, op))

    def all_gather(self, x: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        blocks = self.inner.all_gather(x, axis, rank)
        return self._report("all_gather", axis, rank, blocks, 1, blocks)

    def reduce_scatter(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        return self._report("reduce_scatter", axis, rank, blocks, 1, self.inner.reduce_scatter(blocks, axis, rank))

    def all_to_all(self, blocks: Tensor, axis: Axis, rank: Tensor) -> Tensor:
        return self._report("all_to_all", axis, rank, blocks, 1, self.inner.all_to_all(blocks, axis, rank))

    def permute(self, x: Tensor, axis: Axis, rank: Tensor, source: tuple[int, ...]) -> Tensor:
        return self._report("permute", axis, rank, x, 0, self.inner.permute(x, axis, rank, source))

    def exchange(self, x: Tensor, axis: Axis, rank: Tensor, send: Splits, receive: Splits) -> Tensor:
        return self._report("all_to_all", axis, rank, x, 0, self.inner.exchange(x, axis, rank, send, receive))

    def wait(self, x: Tensor) -> Tensor:
        self.traffic.wait(x)
        return self.inner.wait(x)
