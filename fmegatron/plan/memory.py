"""Memory of one rank by kind, for the fullest stage of a pipeline.

    peak = parameters + gradients + optimizer + activations
    activations = all else that is alive at the fullest moment: what backward needs, gathered weights, logits, buffers

The fullest moment is that of a rehearsed step (`work.py`); further microbatches under way add what each keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

from fmegatron.models import Model
from fmegatron.plan import pipeline
from fmegatron.plan.work import Work
from fmegatron.train.explanation import LeafRow

KINDS = ("parameters", "gradients", "optimizer")


def memory_of(
    model: Model, leaves: Sequence[LeafRow], work: Work, schedule: str, stages: int, virtual: int, microbatches: int
) -> dict[str, int]:
    """Bytes of a rank: parameters, gradients, optimizer, activations, peak. `model` and `leaves` are those of one stage."""
    layers = sum(node.is_layer for node in model.chain)
    found = []
    for number in sorted({0, stages - 1}):
        mine = leaves_of(model, leaves, first=number == 0, last=number == stages - 1)
        other = _bytes(leaves) - _bytes(mine)
        flying = pipeline.in_flight(schedule, stages, virtual, microbatches, number) - 1
        parts = {part: line(layers) for part, line in work.peaks.items()}
        if number != 0:
            del parts["head"]
        if number != stages - 1:
            del parts["tail"]
        more = {part: 0 if part == "update" else flying * work.kept(layers) for part in parts}
        peak = round(max(parts[part] + more[part] for part in parts)) - other
        sums = {kind: sum(_by_kind(row)[kind] for row in mine) for kind in KINDS}
        found.append(sums | {"activations": peak - sum(sums.values()), "peak": peak})
    return max(found, key=lambda kinds: kinds["peak"])


def host_of(
    model: Model, leaves: Sequence[LeafRow], work: Work, schedule: str, stages: int, virtual: int, microbatches: int
) -> dict[str, int]:
    """Bytes in host memory of the stage with most microbatches under way: activations, optimizer (all of it, or none)."""
    flying = pipeline.in_flight(schedule, stages, virtual, microbatches, 0)
    layers, away = sum(node.is_layer for node in model.chain), work.swap(1) > 0
    first = leaves_of(model, leaves, first=True, last=stages == 1)
    both, own = (sum(row.optimizer_bytes for row in rows) * away for rows in (leaves, first))
    return {"activations": round(flying * (work.host(layers) - both)), "optimizer": own}


def leaves_of(model: Model, leaves: Sequence[LeafRow], first: bool, last: bool) -> list[LeafRow]:
    """A stage's leaves, of those of its layers and both ends."""
    order = [node.is_layer for node in model.chain]
    start = order.index(True) if True in order else 0
    held = set()
    for i, node in enumerate(model.chain):
        if node.is_layer or (first if i < start else last):
            held |= {path for _, path in node.params}
    return [row for row in leaves if any(f"{row.path}.".startswith(f"{path}.") for path in held)]


def _by_kind(row: LeafRow) -> dict[str, int]:
    return {"parameters": row.storage_bytes, "gradients": row.gradient_bytes, "optimizer": row.optimizer_bytes}


def _bytes(leaves: Sequence[LeafRow]) -> int:
    return sum(sum(_by_kind(row).values()) for row in leaves)
