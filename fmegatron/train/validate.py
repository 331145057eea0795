"""A run's held-out numbers: of its own held-out text, and of each further set by its name.

    heldout_loss, heldout_perplexity, bits_per_byte                      validation/NAME/loss, perplexity, bits_per_byte
"""

from __future__ import annotations

from typing import Any

from fmegatron.data.batches import held_out_batches
from fmegatron.train.assemble import Parts
from fmegatron.train.evaluate import held_out
from fmegatron.train.source import Source, sets
from fmegatron.train.state import TrainState

EVALUATED = 8192  # tokens of held-out text at once, where a training batch has fewer
BATCHES = 8


def measure(parts: Parts, state: TrainState, whole: bool) -> dict[str, float]:
    """Over a part of each held-out text, or all of it where the run says so, or compressors have read it too."""
    c = parts.config
    size = c.training.global_batch
    part = None if c.validation.full else (c.validation.batches or BATCHES) * size
    batch = size * max(1, EVALUATED // (size * c.data.seq))

    params = parts.average(state.params)

    def numbers(source: Source, limit: int | None) -> dict[str, float]:
        if not source.has_held_out:
            return {}
        rows: Any = source.held_out(c, batch, limit) if source.reads else None
        return held_out(parts.evaluate, params, held_out_batches(rows, **parts.reading), rows.bytes if source.reads else None)

    out = numbers(parts.source, None if whole and parts.source.compressors else part)
    for name, source in sets(c, parts.source).items():
        found = numbers(source, part)
        out |= {f"validation/{name}/{key.removeprefix('heldout_')}": x for key, x in found.items()}
    return out
