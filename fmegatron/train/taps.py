"""What a step's blocks tapped, on every rank and microbatch, as numbers of the whole: one collective a kind and axis."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.sharding import Sharding
from fmegatron.sharding.collectives import Pmax, Psum
from fmegatron.sharding.moments import described, merged
from fmegatron.train.state import over_ranks, sum_together

NOTHING = {"sum": 0.0, "max": -torch.inf, "moments": 0.0}  # what a rank joins that tapped nothing


def nothing(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """What a rank that has not tapped "tap.OP.NAME", of that shape, adds to it."""
    return like.new_full(shape, NOTHING[name.split(".")[1]], dtype=torch.float64)


def everywhere(sh: Sharding, sums: Mapping[str, Tensor], taps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`sums` and taps of all ranks, 0-D: sums and maxima under their own names, "tap.sum.NAME" and "tap.max.NAME", of moments
    what `described` says: NAME/mean, NAME/l2, ...
    """
    of: dict[str, dict[str, Tensor]] = {op: {} for op in NOTHING}
    for name, x in taps.items():
        of[name.split(".")[1]][name] = x
    out = sum_together(sh, {**sums, **of["sum"]})
    if of["max"]:
        out |= tree.as_one(of["max"], lambda flat: over_ranks(sh, flat, Pmax))
    if of["moments"]:
        whole = merged(torch.stack(list(of["moments"].values())), lambda x: over_ranks(sh, x, Psum))
        for key, x in described(whole).items():
            names = (f"{name.removeprefix('tap.moments.')}/{key}" for name in of["moments"])
            out |= dict(zip(names, x.unbind(0), strict=True))
    return out
