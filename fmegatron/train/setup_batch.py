"""How many samples a run's steps take: its keys about batches that grow, as functions of consumed samples."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fmegatron import optim
from fmegatron.config import ConfigError, RunConfig
from fmegatron.optim import BatchSizes
from fmegatron.toml import unheard


def sizes_of(c: RunConfig) -> BatchSizes:
    """The run's batch sizes by consumed samples; of one stage where they do not grow. Raises ConfigError."""
    t = c.training
    if t.rampup_batch and t.batch_sizes:
        raise ConfigError("training.rampup_batch and training.batch_sizes are both set: a batch grows in one way")
    try:
        if not t.batch_sizes:
            unheard("training", t, ("batch_unit",), "training.batch_sizes")
        if t.rampup_batch:
            if len(t.rampup_batch) != 3:
                raise ValueError(f"rampup_batch = {list(t.rampup_batch)}: start, increment, samples")
            start, increment, samples = t.rampup_batch
            sizes = optim.rampup(start, increment, samples, t.global_batch)
        elif t.batch_sizes:
            sizes = optim.stepwise(t.batch_sizes, c.data.seq if t.batch_unit == "tokens" else None)
        else:
            return BatchSizes(((0, t.global_batch),))
    except ValueError as error:
        raise ConfigError(f"training: {error}") from None
    if (most := max(size for _, size in sizes.stages)) != t.global_batch:
        raise ConfigError(f"training.batch_sizes grow to {most}, and training.global_batch is {t.global_batch}: say the same")
    if c.data.streams:
        raise ConfigError("data.streams are cut into batches of one size: drop training.rampup_batch and batch_sizes")
    return sizes


def samples_before(c: RunConfig, steps: int) -> int:
    """Samples that the first `steps` steps of a run take."""
    return int(sizes_of(c).before(torch.tensor(steps)))


def parts_of(c: RunConfig, shards: int) -> int | Callable[[int], int]:
    """Microbatches of a step; of a run whose batch grows, by a rank's rows: as few as are not larger than those of the end.

    Of a pipeline always as many. Raises ConfigError where a size does not divide over ranks, or a pipeline's microbatches.
    """
    t, sizes = c.training, sizes_of(c)
    unit = shards * (t.microbatches if c.mesh.pp > 1 else 1)
    for _, size in sizes.stages:
        if size % unit:
            near = " or ".join(str(n) for n in (size // unit * unit, -(-size // unit) * unit) if n)
            raise ConfigError(f"training: a batch of {size} does not divide into {unit} parts (ranks, a pipeline's "
                              f"microbatches): use {near}")
    if len(sizes.stages) == 1 or c.mesh.pp > 1:
        return t.microbatches
    most = t.global_batch // shards // t.microbatches

    def parts(rows: int) -> int:
        return next(n for n in range(-(-rows // most), rows + 1) if rows % n == 0)

    return parts
