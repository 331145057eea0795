"""Keys of [training] about batches that grow; config/__init__.py makes a group of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fmegatron.toml import option


@dataclass(frozen=True)
class BatchSizes:
    """Keys of [training]: see docs/optimizers.md. The batch in the end is training.global_batch."""

    rampup_batch: tuple[int, ...] = option((), "start, increment, samples: the batch grows to global_batch over so many")
    batch_sizes: str | None = option(None, 'from which sample on which batch, such as "0:16 10K:32", in place of rampup_batch')
    batch_unit: Literal["samples", "tokens"] = option("samples", "of batch_sizes' thresholds")
