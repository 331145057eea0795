"""Batch sizes that grow with the samples consumed, and how many samples so many updates consume: pure functions of counts.

    sizes = rampup(start=32, increment=32, samples=10_000, end=256)        Megatron-LM's --rampup-batch-size
    sizes = stepwise("0:768 250B:1536", seq=4096)                          its --step-batch-size-schedule, in tokens
    sizes.at(consumed)            the global batch of the next step
    sizes.before(count)           samples consumed by `count` steps: makes a schedule of samples one of updates
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SUFFIXES = (("K", 10**3), ("M", 10**6), ("B", 10**9), ("T", 10**12))


@dataclass(frozen=True)
class BatchSizes:
    """(first sample, batch size), in order; each size is used from the first step at or past its sample."""

    stages: tuple[tuple[int, int], ...]

    def at(self, consumed: int) -> int:
        """The batch size after `consumed` samples."""
        return next(size for start, size in reversed(self.stages) if consumed >= start)

    def turns(self) -> list[tuple[int, int, int]]:
        """(first step, samples before it, batch size) of each stage that has a step."""
        found, step, consumed = list[tuple[int, int, int]](), 0, 0
        for i, (_, size) in enumerate(self.stages):
            if i + 1 < len(self.stages) and self.stages[i + 1][0] <= consumed:
                continue
            found.append((step, consumed, size))
            if i + 1 < len(self.stages):
                steps = -(-(self.stages[i + 1][0] - consumed) // size)
                step, consumed = step + steps, consumed + steps * size
        return found

    def before(self, count: Tensor) -> Tensor:
        """Samples consumed by the first `count` steps, int64; may be mapped over counts."""
        total = torch.zeros_like(count)
        for step, consumed, size in self.turns():
            total = torch.where(count >= step, consumed + (count - step) * size, total)
        return total


def rampup(start: int, increment: int, samples: int, end: int) -> BatchSizes:
    """From start to end by increment, over the first `samples`: start + increment floor(consumed / interval)."""
    if samples < 0:
        raise ValueError(f"a ramp over {samples} samples: at least 0")
    if increment < 1 or start < 1 or (end - start) % increment or end < start:
        raise ValueError(f"a ramp from {start} to {end} by {increment}: {end} - {start} must be a multiple of {increment}")
    n = (end - start) // increment
    every = samples / n if n else 0.0
    # the sizes that floor(consumed / every) gives, so a stage starts with the first whole sample at or past i * every
    return BatchSizes(tuple((-int(-(i * every) // 1), start + i * increment) for i in range(n + 1)))


def stepwise(text: str, seq: int | None = None) -> BatchSizes:
    """ "0:768 250B:1536": threshold:size, with K, M, B, T for powers of 1000; with `seq` thresholds are tokens."""
    stages = []
    for part in text.split():
        threshold, colon, size = part.partition(":")
        unit = dict(SUFFIXES).get(threshold[-1:].upper(), 1)
        number = threshold[:-1] if unit > 1 else threshold
        try:
            stages.append((round(float(number) * unit) // (seq or 1), int(size)))
        except (ValueError, OverflowError):
            colon = ""
        if not colon or stages[-1][1] < 1:
            raise ValueError(f"batch sizes {text!r}: {part!r} is not threshold:size, like 250B:1536")
    starts = [start for start, _ in stages]
    if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
        raise ValueError(f"batch sizes {text!r}: thresholds begin with 0 and rise")
    return BatchSizes(tuple(stages))
