"""Where a step's time goes, told without waiting for a device: marks at the ends of its parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Mark = Callable[[str], None]


def unmarked(part: str) -> None:
    """No clock."""


class Clock:
    """Notes when parts end: `mark("data")`, `mark("forward_backward")`, ...; `seconds` of each, once all of them are over.

    On a GPU a mark is an event in its stream, and `seconds` may be asked when the device is past it; on a CPU a time. Where
    ranks are threads each of them marks, and the last one counts.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.first = self._now()
        self.marks: dict[str, Any] = {}

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, part: str) -> None:
        """A part ends here, and the next begins."""
        self.marks[part] = self._now()

    def seconds(self) -> dict[str, float]:
        """{part: seconds}, in the order of the marks."""
        at, out = self.first, {}
        for part, then in self.marks.items():
            out[part] = at.elapsed_time(then) / 1e3 if self.cuda else then - at
            at = then
        return out
