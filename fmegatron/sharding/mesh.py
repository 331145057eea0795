"""Meshes: ranks on a grid of named axes, over processes, over a vmap, over threads, or only imagined.

    make_mesh(dp=2, tp=4)       one rank a process, started by torchrun (NCCL or gloo)
    virtual_mesh(dp=2, tp=4)    all ranks in one process, as one torch.func.vmap
    thread_mesh(dp=2, tp=4)     all ranks in one process, a thread each
    abstract_mesh(dp=64, tp=8)  one rank's shapes without any peer, for planning

Axes are given outer to inner: the last one varies fastest with the rank. A mesh is plain data: sizes, and for each axis
the transport that carries values along it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fmegatron.sharding.transports import Abstract, Group, Hub, Stacked, Threads, Transport

REPLICA = "replica"  # the axis whose values may be on their way while steps go on: see apart.py
Kind = Literal["single", "device", "virtual", "threads", "abstract"]


@dataclass(frozen=True)
class Axis:
    """One mesh axis; a rank's coordinate on it is `rank // stride % size`."""

    name: str
    size: int
    stride: int
    transport: Transport

    def coordinate(self, rank: Tensor) -> Tensor:
        """This rank's place on the axis: an int64 tensor of rank's shape."""
        return rank // self.stride % self.size


@dataclass(frozen=True)
class Mesh:
    """Named axes, outer to inner, and the way its ranks run."""

    kind: Kind
    axes: tuple[Axis, ...] = ()
    rank: int | None = None  # of this process; None where one process holds every rank
    device: str = "cpu"

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(axis.size for axis in self.axes)

    @property
    def sizes(self) -> dict[str, int]:
        """{axis name: number of ranks along it}."""
        return {axis.name: axis.size for axis in self.axes}

    def __getitem__(self, name: str) -> Axis:
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise KeyError(f"no mesh axis is named {name!r}: they are {', '.join(self.sizes) or 'none'}")

    def coordinates(self, rank: int) -> dict[str, int]:
        """{axis name: coordinate} of a rank."""
        return {axis.name: rank // axis.stride % axis.size for axis in self.axes}

    @property
    def stacked(self) -> bool:
        """Whether one process holds all ranks, each value with a leading dim of `size`."""
        return self.kind in ("virtual", "threads")


def make_mesh(device: str | None = None, **sizes: int) -> Mesh:
    """A mesh over the processes that torchrun started; one process alone needs no launcher.

    `sizes`: ranks per axis, outer to inner; one of them may be -1: what is left. The process group is started if it is
    not yet: NCCL where there are GPUs, else gloo.
    Raises ValueError when the sizes do not multiply to the number of processes.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    sizes = _complete(sizes, world)
    if world == 1:
        return Mesh("single", device=device)
    if not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        _start_group("nccl" if device == "cuda" else "gloo")
    grid = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    late = {name: _second(grid, i) for i, name in enumerate(sizes) if name == REPLICA and sizes[name] > 1}
    groups = {name: Group(grid.get_group(name).group_name, grid.get_local_rank(name), late.get(name, "")) for name in sizes}
    return Mesh("device", _axes(sizes, groups), rank=dist.get_rank(), device=device)


def _second(grid: DeviceMesh, dim: int) -> str:
    """The name of a second group of this process's row along a dim of the grid."""
    rows = grid.mesh.movedim(dim, -1).reshape(-1, grid.mesh.shape[dim]).tolist()
    made = [(row, dist.new_group(row)) for row in rows]  # every process makes all
    return next(str(group.group_name) for row, group in made if dist.get_rank() in row)


def _start_group(backend: str) -> None:
    """Start the process group; after a restart by torchrun under keys of its own.

    torch 2.13's agent keeps one store over all restarts, with the addresses of killed processes still in it. Nodes count
    their restarts each for itself, so this is for one node; on several, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is torch's way.
    """
    restart, one_node = (os.environ.get(name) for name in ("TORCHELASTIC_RESTART_COUNT", "LOCAL_WORLD_SIZE"))
    if restart in (None, "0") or one_node != os.environ.get("WORLD_SIZE"):
        dist.init_process_group(backend)
        return
    store, rank, world = next(rendezvous("env://"))
    dist.init_process_group(backend, store=PrefixStore(f"restart-{restart}", store), rank=rank, world_size=world)


def virtual_mesh(**sizes: int) -> Mesh:
    """All ranks in this process as one vmap dim: no launcher, deterministic, differentiable from outside."""
    return Mesh("virtual", _axes(sizes, dict.fromkeys(sizes, Stacked())))


def thread_mesh(**sizes: int) -> Mesh:
    """All ranks in this process, a thread each, running the very program of a real mesh."""
    transport = Threads(Hub(math.prod(sizes.values())))
    return Mesh("threads", _axes(sizes, dict.fromkeys(sizes, transport)))


def abstract_mesh(**sizes: int) -> Mesh:
    """Rank 0 of a mesh without peers: collectives return the right shapes and undefined values."""
    return Mesh("abstract", _axes(sizes, dict.fromkeys(sizes, Abstract())), rank=0, device="meta")


def with_transports(mesh: Mesh, wrap: dict[str, Transport]) -> Mesh:
    """The same mesh with other transports, by axis name: to count traffic, or to record launches."""
    return replace(mesh, axes=tuple(replace(axis, transport=wrap[axis.name]) for axis in mesh.axes))


def _axes(sizes: dict[str, int], transports: Mapping[str, Transport]) -> tuple[Axis, ...]:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"mesh axis {name!r} has size {size}: sizes are at least 1")
    strides = [math.prod(list(sizes.values())[i + 1 :]) for i in range(len(sizes))]
    return tuple(Axis(name, sizes[name], stride, transports[name]) for name, stride in zip(sizes, strides, strict=True))


def _complete(sizes: dict[str, int], world: int) -> dict[str, int]:
    """Fill in the axis of size -1, and check the product against the number of processes."""
    known = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh axes {', '.join(free)} are all -1: only one axis can take what is left")
    if free and known and world % known == 0:
        return {name: world // known if size == -1 else size for name, size in sizes.items()}
    shown = " x ".join(f"{name}={size}" for name, size in sizes.items()) or "no axes"
    if free or known != world:
        legal = [n for n in range(1, world + 1) if world % n == 0]
        if not free and len([s for s in sizes.values() if s > 1]) <= 1 and sizes:
            hint = f"set {next((k for k, s in sizes.items() if s > 1), next(iter(sizes)))}={world}"
        else:
            hint = f"the sizes must multiply to {world} (divisors: {', '.join(map(str, legal))})"
        raise ValueError(
            f"mesh {shown} needs {known} process(es) but {world} are running: {hint}, start {known} with "
            f"`torchrun --nproc-per-node {known}`, or run it in one process (virtual_mesh; --mesh.virtual true)"
        )
    return sizes
