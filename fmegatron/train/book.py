"""Steps and their numbers on the way to the writers: what a step's metrics become in metrics.jsonl and on the screen."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmegatron.data.batches import Batches
from fmegatron.data.place import size_of
from fmegatron.sharding import Mesh, Sharding
from fmegatron.train.clock import Clock
from fmegatron.train.flops import mfu, peak_flops
from fmegatron.train.metrics import Writer
from fmegatron.train.progress import memory_bytes


class Taken(NamedTuple):
    """What a step took, over all ranks: padding counts."""

    samples: int
    tokens: int


More = Callable[[], Mapping[str, float]]
Number = Callable[[Tensor], Tensor]  # by the number of applied updates


@dataclass(frozen=True)
class Past:
    """What goodput is measured by: seconds of earlier sessions' steps that still count, skipped ones, when the run began."""

    useful: float = 0.0
    skipped: int = 0
    started: float | None = None


class Reading:
    """A step's numbers on their way to the host: one copy, and `values` waits for it and the step, not for what came after.

    stacked: numbers have a leading dim of ranks, of which the first is taken. Of a vector (the load of experts, say) the
    largest element over the mean is told, as NAME/imbalance; what has more dims is left out.
    """

    def __init__(self, numbers: Mapping[str, Tensor], stacked: bool = False) -> None:
        first = {name: (x[0] if stacked and x.dim() else x).detach().double() for name, x in numbers.items()}
        kept = {name: x for name, x in first.items() if x.dim() == 0}
        kept |= {f"{name}/imbalance": x.amax() / x.mean() for name, x in first.items() if x.dim() == 1 and x.numel()}
        self.names, self.event = list(kept), None
        self.packed = torch.stack(list(kept.values()))
        if self.packed.is_cuda:
            host = torch.empty(self.packed.shape, dtype=self.packed.dtype, pin_memory=True)
            host.copy_(self.packed, non_blocking=True)
            self.packed, self.event = host, torch.cuda.Event()
            self.event.record()

    def values(self) -> dict[str, float]:
        """{name: number}."""
        if self.event is not None:
            self.event.synchronize()
        return dict(zip(self.names, self.packed.tolist(), strict=True))


class Feed:
    """Batches, and what the last of them held."""

    def __init__(self, sh: Sharding, batches: Batches) -> None:
        self.sh, self.batches, self.taken = sh, batches, Taken(0, 0)
        self.close = batches.close

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> dict[str, Tensor]:
        batch = next(self.batches)
        self.taken = Taken(*size_of(self.sh, batch))
        return batch


class Book:
    """Adds a step's numbers, and writes them: on a GPU one step later, so that reading them does not hold it up.

    consumed: samples before the first step. flops: of a sample of `seq` tokens. numbers: of the optimizer by applied updates,
    lr among them. late: as on a GPU; None: on one.
    """

    def __init__(
        self,
        writers: Sequence[Writer],
        mesh: Mesh,
        *,
        consumed: int = 0,
        seq: int,
        flops: float,
        numbers: Mapping[str, Number],
        precision: str,
        past: Past | None = None,
        late: bool | None = None,
    ) -> None:
        self.writers, self.device, self.consumed, self.seq, self.flops = writers, mesh.device, consumed, seq, flops
        self.numbers, past = numbers, past or Past()
        cuda = torch.device(mesh.device).type == "cuda"
        self.waits = cuda if late is None else late  # elsewhere a step is done when it returns
        self.peak = peak_flops(torch.cuda.get_device_name(), precision) if cuda else None
        self.stacked, self.devices = mesh.stacked, 1 if mesh.stacked else mesh.size
        self.waiting: tuple[int, Taken, Reading, Clock | None] | None = None
        self.useful, self.started, self.skipped = past.useful, past.started or time.time(), past.skipped
        self.spent: dict[str, float] = {}
        self.clock = time.perf_counter()

    def restart(self, part: str | None = None) -> None:
        """Time from here: what came before was not training, but `part`, which the next record tells."""
        now = time.perf_counter()
        if part is not None:
            self.spent[part] = self.spent.get(part, 0.0) + now - self.clock
        self.clock = now

    def add(
        self, step: int, taken: Taken, numbers: Mapping[str, Tensor], clock: Clock | None = None, more: More | None = None
    ) -> None:
        """Take the numbers of a step that was just started; write them when the next one has, where that saves a wait."""
        reading = Reading(numbers, self.stacked)
        self.write()
        self.waiting = (step, taken, reading, clock)
        if more is not None or not self.waits:
            self.write(more)

    def write(self, more: More | None = None) -> None:
        """Write the step that waits, with more numbers of the same step, whose time does not count."""
        if self.waiting is None:
            return
        (step, taken, reading, clock), self.waiting = self.waiting, None
        values = {name.removeprefix("tap.max.").removeprefix("tap.sum."): x for name, x in reading.values().items()}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.consumed += taken.samples
        rate = self.flops * taken.tokens / self.seq / seconds
        record: dict[str, Any] = {"step": step, **losses(values), "grad_norm": values["grad_norm"]}
        applied = torch.tensor(max(step - int(values["skipped"]) - 1, 0))
        record |= {name: float(value(applied)) for name, value in self.numbers.items()}
        record |= {"tokens_per_second": taken.tokens / seconds, "seconds": seconds, "tflops": rate / 1e12}
        record |= {"mfu": share} if (share := mfu(rate, self.peak, self.devices)) is not None else {}
        record |= memory(self.device) | {"skipped": int(values["skipped"]), "consumed": self.consumed}
        record |= {f"time/{part}": x for part, x in (clock.seconds() if clock is not None else {}).items()}
        counts = values["skipped"] <= self.skipped
        self.useful, self.skipped = self.useful + (seconds if counts else 0.0), int(values["skipped"])
        record |= {"time": time.time(), "goodput": self.useful / max(time.time() - self.started, self.useful)}
        others = {name: x for name, x in values.items() if name not in record and not name.startswith("count.")}
        record |= others | over_layers(others)
        if more is not None:
            record |= more()
            self.restart("validation")
        record |= {f"time/{part}": x for part, x in self.spent.items()}
        self.spent = {}
        for writer in self.writers:
            writer.write(record)


def losses(values: dict[str, float]) -> dict[str, float]:
    """loss, perplexity (of the cross-entropy), and the loss beside that of token frequencies, where a step measures it."""
    nats = values.get("ce", values["loss"])
    out = {"loss": values["loss"], "perplexity": math.exp(nats) if nats < 700 else math.inf}
    if "unigram" in values:
        unigram = values.pop("unigram")
        out |= {"unigram_loss": unigram, "unigram_normalised_loss": nats - unigram}
    return out


def memory(device: torch.device | str) -> dict[str, float]:
    """memory_bytes; on a GPU also what the allocator holds at most, and how often it had to flush its cache and try again."""
    out: dict[str, float] = {"memory_bytes": memory_bytes(device)}
    if torch.device(device).type == "cuda":
        retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
        out |= {"memory_reserved_bytes": torch.cuda.max_memory_reserved(device), "memory_retries": retries}
    return out


def over_layers(values: Mapping[str, float]) -> dict[str, float]:
    """Of a statistic that layers have, "activations/03.attn/kurtosis": average, median, min and max over them all."""
    found: dict[tuple[str, str], list[float]] = {}
    for name, x in values.items():
        kind, _, rest = name.partition("/")
        number, dot, rest = rest.partition(".")
        if dot and number.isdigit() and math.isfinite(x):
            found.setdefault((kind, rest.rpartition("/")[2]), []).append(x)
    ways = {"average": statistics.fmean, "median": statistics.median, "min": min, "max": max}
    return {f"{kind}/{what}/{way}": fn(xs) for (kind, what), xs in found.items() for way, fn in ways.items()}  # type: ignore
