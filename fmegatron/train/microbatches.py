"""A step's batch in parts: one batch that is cut by rows, or a list of batches, each with a length of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fmegatron.models.model import Model, Values
from fmegatron.sharding import Sharding

Batch = Mapping[str, Tensor]
Batches = Batch | Sequence[Batch]
Parts = int | Callable[[int], int]


def microbatches_of(model: Model, sh: Sharding, batch: Batches, parts: Parts, even: bool = True) -> list[Values]:
    """The microbatches of a local batch, with what they lacked; a list of batches is taken as it is.

    parts: how many, or that by the number of local rows. even: whether rows must divide. Raises ValueError in one line
    where batches and `parts` do not fit.
    """
    parts = parts(rows_of(batch)) if callable(parts) else parts
    if isinstance(batch, Mapping):
        return split(model.inputs(sh, batch), parts, even)
    if len(batch) != parts:
        raise ValueError(f"{len(batch)} batches in a step of {parts} microbatches: give as many, or one to cut")
    return [model.inputs(sh, one) for one in batch]


def split(values: Values, parts: int, even: bool = True) -> list[Values]:
    """Microbatches: rows of a local batch in equal, neighbouring parts; raises ValueError where they are not equal.

    even False: where they do not divide, the first parts have a row more.
    """
    rows = rows_of(values)
    if rows % parts and (even or rows < parts):
        legal = [n for n in range(1, rows + 1) if rows % n == 0 or not even]
        raise ValueError(f"{rows} samples a rank do not divide into {parts} microbatches: use one of {legal}")
    starts = [i * (rows // parts) + min(i, rows % parts) for i in range(parts + 1)]
    return [
        {name: x.narrow(0, starts[i], starts[i + 1] - starts[i]) for name, x in values.items()} for i in range(parts)
    ]


def rows_of(batch: Batches) -> int:
    """The number of samples in a local batch."""
    if not isinstance(batch, Mapping):
        return sum(map(rows_of, batch))
    return batch["tokens"].shape[0] if "tokens" in batch else next(iter(batch.values())).shape[0]


def shards_of_batch(sh: Sharding) -> int:
    """The number of different local batches."""
    size = 1
    for axis in sh.placement("batch").of("batch"):
        size *= sh.mesh[axis].size
    return size


def with_samples(sh: Sharding, consumed: Tensor, batch: Batches) -> Any:
    """A batch whose rows have sample ids, so that dropout does not depend on how rows lie; the first has id `consumed`."""
    if isinstance(batch, Mapping):
        if "sample" in batch:
            return batch
        return {**batch, "sample": consumed + sh.index("batch", "batch seq", batch["tokens"])}
    out = []
    for one in batch:
        out.append(with_samples(sh, consumed, one))
        consumed = consumed + rows_of(one) * shards_of_batch(sh)
    return out
