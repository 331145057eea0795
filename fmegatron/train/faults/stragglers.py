"""Which ranks are slow: each one's own time of a step, without what it waits for others; gathered every so many steps.

In a synchronous step all ranks take equally long. A rank's own time is the step's less the waits in collectives: the slow
rank waits least.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist


class Stragglers:
    """Adds up a rank's own seconds; `report` compares the ranks."""

    def __init__(self, devices: Sequence[str], *, every: int, ratio: float, file: Path, device: str) -> None:
        self.devices, self.every, self.ratio, self.file, self.device = devices, every, ratio, file, device
        self.own, self.data, self.steps = 0.0, 0.0, 0

    def add(self, seconds: float, stalled: float, data: float) -> None:
        """A step: its time, how much of it was waiting for others, and the time to get its batch."""
        self.own += max(seconds - stalled, 0.0)
        self.data += data
        self.steps += 1

    def report(self, number: int) -> str:
        """Where it is time: a line that names slow ranks, and one object more in the file of the first rank; else "".

        Every rank calls this after every step.
        """
        if not self.every or self.steps < self.every:
            return ""
        mine = [self.own / self.steps, self.data / self.steps]
        table = torch.tensor(mine, dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            parts = [torch.empty_like(table) for _ in self.devices]
            dist.all_gather(parts, table)
            table = torch.stack(parts)
        rows = table.reshape(-1, 2).tolist()
        steps, self.own, self.data, self.steps = self.steps, 0.0, 0.0, 0
        own, data = ([row[i] for row in rows] for i in range(2))
        if not dist.is_initialized() or dist.get_rank() == 0:
            with open(self.file, "a", encoding="utf-8") as out:
                out.write(json.dumps({"step": number, "steps": steps, "own_seconds": own, "data_seconds": data}) + "\n")
        return describe(own, data, self.devices, self.ratio, number, steps)


def describe(
    own: Sequence[float], data: Sequence[float], devices: Sequence[str], ratio: float, number: int, steps: int
) -> str:
    """The ranks whose own time, or whose wait for data, is `ratio` times the (lower) median's, slowest first; "" if none."""
    found = []
    for times, what in ((own, "own time"), (data, "wait for data")):
        middle = statistics.median_low(times)
        total = statistics.median_low(own) + statistics.median_low(data)
        slow = [rank for rank, t in enumerate(times) if t > ratio * middle and t - middle > (ratio - 1) * total]
        for rank in sorted(slow, key=lambda rank: -times[rank]):
            much = f"{times[rank] / middle:.2f} times the median" if middle else "the median is 0"
            found.append(f"rank {rank} ({devices[rank]}): {what} {times[rank]:.4f} s a step, {much}")
    return f"stragglers of steps {number - steps + 1} to {number}: " + "; ".join(found) if found else ""
