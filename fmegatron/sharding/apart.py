"""Replicas that go apart: a mesh axis along which parameters and optimizer state are each rank's own.

    rules = replace(RULES["fsdp"], apart="replica")       the batch lies over the axis, nothing else does
    sh = Sharding(virtual_mesh(replica=2, dp=2), rules)
    inside(sh)                                            one replica: the same mesh without the axis

What a replica does, it does inside: its losses have denominators of their own, its gradients are sums over the other axes.
That is the law for gradients as it stands, for a loss that is a sum over fewer ranks. Replicas meet in `mean_over`, or in
`send_mean`, whose means are on their way while steps go on, until `arrived`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fmegatron.sharding.bucket import Wire, run_together
from fmegatron.sharding.collectives import Psum, apply
from fmegatron.sharding.mesh import Axis
from fmegatron.sharding.sharding import NO_LAYOUT, Sharding
from fmegatron.sharding.transports import behind

BUCKET = 1 << 24  # most elements in one collective


def axis_of(sh: Sharding) -> Axis | None:
    """The axis along which replicas go apart; None where there is one replica.

    Raises ValueError where it is not the mesh's first, or where the rules put more than the batch on it.
    """
    name = sh.rules.apart
    found = next((axis for axis in sh.mesh.axes if axis.name == name and axis.size > 1), None)
    if found is None:
        return None
    if found is not sh.mesh.axes[0]:
        raise ValueError(f"mesh axis {name!r} of replicas that go apart must be the first, before {sh.mesh.axes[0].name!r}")
    lines = [(dim, [axis.rstrip("?") for axis in axes]) for dim, axes in sh.rules.lines("optimizer")]
    others = [dim for dim, axes in lines if found.name in axes and dim != "batch"]
    if others:
        raise ValueError(f"rules {sh.rules.name!r} put {others[0]!r} on {name!r}, whose replicas go apart: only the batch may")
    return found


def replicas(sh: Sharding) -> int:
    """How many replicas go apart."""
    axis = axis_of(sh)
    return 1 if axis is None else axis.size


def inside(sh: Sharding) -> Sharding:
    """The sharding of one replica; ranks keep their numbers. A sharding without replicas is returned as it is."""
    axis = axis_of(sh)
    if axis is None:
        return sh
    mesh = replace(sh.mesh, axes=sh.mesh.axes[1:])
    return replace(sh, mesh=mesh, rules=replace(sh.rules, apart=None), layout=NO_LAYOUT)


def mean_over(sh: Sharding, xs: Sequence[Tensor], wire: Wire | None = None) -> list[Tensor]:
    """Each tensor's mean over the replicas, all of a dtype in one collective; the tensors themselves where there is one.

    wire: in which dtype they travel and are added; None is their own.
    """
    axis = axis_of(sh)
    if axis is None:
        return list(xs)
    return [x / axis.size for x in run_together(list(xs), [(Psum(axis),)] * len(xs), sh.rank, BUCKET, wire)]


def send_mean(sh: Sharding, xs: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Begin to average tensors of one dtype over the replicas: nobody may look at the results before `arrived`.

    dtype: in which they travel, and arrive; None is their own. On a mesh of processes they have a process group of their own
    where the axis has one, so that no collective of the steps in between queues behind them.
    """
    axis = axis_of(sh)
    if axis is None:
        return [x.to(dtype or x.dtype) for x in xs]
    assert sh.rank is not None
    flat = (torch.cat([x.reshape(-1) for x in xs]) / axis.size).to(dtype or xs[0].dtype)
    via = behind(axis.transport)
    op = Psum(replace(axis, transport=via))
    total = op.issue(flat, sh.rank, via) if via.background else apply(flat, sh.rank, op)
    return [part.reshape(x.shape) for part, x in zip(total.split([x.numel() for x in xs]), xs, strict=True)]


def arrived(sh: Sharding, xs: Sequence[Tensor]) -> list[Tensor]:
    """What `send_mean` gave, to be read; any number of times, and also of tensors that came from a checkpoint."""
    axis = axis_of(sh)
    return list(xs) if axis is None or not axis.transport.background else [axis.transport.wait(x) for x in xs]
