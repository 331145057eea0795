"""Steps and their numbers on the way to the writers: what a step's metrics become in metrics.jsonl and on the screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fmegatron.sharding import Mesh
from fmegatron.train.flops import mfu, peak_flops
from fmegatron.train.metrics import Writer
from fmegatron.train.progress import memory_bytes

More = Callable[[], Mapping[str, float]]


class Book:
    """Adds a step's numbers, and writes them: on a GPU one step later, so that reading them does not hold it up."""

    def __init__(
        self,
        writers: Sequence[Writer],
        mesh: Mesh,
        *,
        batch: int,
        seq: int,
        flops: float,
        schedule: Callable[[Tensor], Tensor],
        precision: str,
    ) -> None:
        self.writers, self.device, self.batch, self.tokens, self.flops = writers, mesh.device, batch, batch * seq, flops
        self.schedule = schedule
        self.waits = torch.device(mesh.device).type == "cuda"  # elsewhere a step is done when it returns
        self.peak = peak_flops(torch.cuda.get_device_name(), precision) if self.waits else None
        self.devices = 1 if mesh.stacked else mesh.size
        self.waiting: tuple[int, Mapping[str, Tensor]] | None = None
        self.restart()

    def restart(self) -> None:
        """Time from here: what came before was not training."""
        self.clock = time.perf_counter()

    def add(self, step: int, numbers: Mapping[str, Tensor], more: More | None = None) -> None:
        """Take the numbers of a step that was just started; write them when the next one has, where that saves a wait."""
        self.write()
        self.waiting = (step, numbers)
        if more is not None or not self.waits:
            self.write(more)

    def write(self, more: More | None = None) -> None:
        """Write the step that waits, with more numbers of the same step, whose time does not count."""
        if self.waiting is None:
            return
        (step, numbers), self.waiting = self.waiting, None
        values = {name: x.flatten()[0].item() for name, x in numbers.items() if x.dim() <= 1}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        applied = step - int(values["skipped"])
        rate = self.flops / seconds
        record: dict[str, Any] = {"step": step, "loss": values["loss"], "grad_norm": values["grad_norm"]}
        record["lr"] = float(self.schedule(torch.tensor(max(applied - 1, 0))))
        record |= {"tokens_per_second": self.tokens / seconds, "seconds": seconds, "tflops": rate / 1e12}
        record |= {"mfu": share} if (share := mfu(rate, self.peak, self.devices)) is not None else {}
        record |= {"memory_bytes": memory_bytes(self.device), "skipped": int(values["skipped"])}
        record["consumed"] = step * self.batch
        record |= {name: x for name, x in values.items() if name not in record and not name.startswith("count.")}
        if more is not None:
            record |= more()
            self.restart()
        for writer in self.writers:
            writer.write(record)
