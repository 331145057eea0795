"""What `explain` found out: plain data, printed as tables or as JSON."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict, dataclass

from fmegatron.sharding.traffic import Row, columns, table


@dataclass(frozen=True)
class LeafRow:
    """One leaf. shape: as the model means it; padded: as it lies. Bytes are one rank's: in use, at rest, optimizer state."""

    path: str
    names: str
    shape: tuple[int, ...]
    padded: tuple[int, ...]
    compute: str
    storage: str
    optimizer: str
    compute_bytes: int
    storage_bytes: int
    optimizer_bytes: int
    gradient_bytes: int  # of its accumulator
    notes: tuple[str, ...]


@dataclass(frozen=True)
class MeetingRow:
    """What replicas that go apart exchange: parameters ("params") or a slot of the optimizer's state, in one period."""

    what: str
    every: int  # steps
    count: int
    bytes: int


@dataclass(frozen=True)
class Explanation:
    """Plain data; `str` prints tables, `json()` the same for programs."""

    mesh: dict[str, int]
    rules: str
    batch: tuple[int, int]
    microbatches: int
    remat: str
    parameters: int  # without pads
    leaves: tuple[LeafRow, ...]
    collectives: tuple[Row, ...]  # of one step, as one rank sends them
    meetings: tuple[MeetingRow, ...]  # as one rank sends them
    per_rank: dict[str, int]  # bytes: parameters, gradients, optimizer, and gathered: the largest block in use, and the next

    def json(self) -> str:
        """One JSON object, with the fields of this class."""
        return json_module.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis}={n}" for axis, n in self.mesh.items() if n > 1) or "one device"
        head = f"{self.parameters:,} parameters on {mesh} by {self.rules!r}; a step of {self.batch[0]} x {self.batch[1]} tokens"
        head += f" in {self.microbatches} microbatch(es), remat {self.remat}"
        same = all(leaf.compute == leaf.storage == leaf.optimizer for leaf in self.leaves)
        places = ["placement"] if same else ["in use", "at rest", "optimizer"]
        cells = [["leaf", "shape", *places, "in use B", "at rest B", "optimizer B"]]
        for leaf in self.leaves:
            shape = " ".join(f"{n}" if n == m else f"{n}>{m}" for n, m in zip(leaf.shape, leaf.padded, strict=True))
            at = [leaf.compute] if same else [leaf.compute, leaf.storage, leaf.optimizer]
            sizes = (leaf.compute_bytes, leaf.storage_bytes, leaf.optimizer_bytes)
            cells.append([leaf.path, shape, *at, *(f"{n:,}" for n in sizes)])
        notes = [f"{leaf.path}: {note}" for leaf in self.leaves for note in leaf.notes]
        totals = ", ".join(f"{name} {n:,}" for name, n in self.per_rank.items())
        sent = table(self.collectives, self.mesh) if self.collectives else ["no collectives"]
        blank = [""] if notes else []
        leaves = columns(cells, len(places) + 2)
        said = [head, "", *leaves, "", *notes, *blank, f"bytes a rank: {totals}", "", *sent]
        return "\n".join([*said, *self._meetings()])

    def _meetings(self) -> list[str]:
        """When replicas meet, and what that is a step on the mean."""
        if not self.meetings:
            return []
        cells = [["replicas meet", "every", "collectives", "bytes", "bytes a step"]]
        rates = [row.bytes / row.every for row in self.meetings]
        cells += [[row.what, f"{row.every}", f"{row.count}", f"{row.bytes:,}", f"{rate:,.0f}"]
                  for row, rate in zip(self.meetings, rates, strict=True)]  # fmt: skip
        held = max(row.bytes for row in self.meetings)
        return ["", *columns(cells, 1), f"in all {sum(rates):,.0f} bytes a step; gradients in every step would be {held:,}"]


@dataclass(frozen=True)
class Staged:
    """A step on a mesh with an axis pp: the explanation of each rank of pp, and the numbers of its stages."""

    schedule: str
    stages: tuple[tuple[int, ...], ...]
    ranks: tuple[Explanation, ...]

    def json(self) -> str:
        """One JSON object, with the fields of this class."""
        return json_module.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        parts = []
        for rank, (numbers, own) in enumerate(zip(self.stages, self.ranks, strict=True)):
            which = f"stage{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
            parts.append(f"-- rank {rank} of pp, {which} of {self.schedule} --\n{own}")
        return "\n\n".join(parts)
