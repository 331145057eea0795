"""Between the world of global tensors and the ranks of a mesh: shard and unshard, spmd, shard_map.

    local = shard(sh, x, "batch seq")        unshard(sh, local, "batch seq") == x
    spmd(sh, fn)(*trees)                     fn(sh, *local trees) on every rank
    shard_map(fn, sh, in_names, out_names)   both together, as one function of global tensors

Where one process holds all ranks (virtual and thread meshes) a local tensor has a leading dim of ranks; on a device mesh it
is this process's own piece. A derivative taken outside of shard_map is the derivative of the global function.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.sharding.collectives import Once, Op, Psum, apply
from fmegatron.sharding.mesh import Mesh
from fmegatron.sharding.placement import Placement
from fmegatron.sharding.relayout import plan_relayout, run
from fmegatron.sharding.rules import SEQ_NAMES, Kind
from fmegatron.sharding.sharding import Sharding
from fmegatron.sharding.transports import Threads
from fmegatron.sharding.zigzag import unzigzag, zigzag
from fmegatron.tree import Tree


def shard(sh: Sharding, x: Tensor, names: str, kind: Kind | None = None, leaf: str | None = None) -> Tensor:
    """A global tensor's local pieces: this rank's, or all ranks' stacked; pads are zeros."""
    place = sh.placement(names, kind, leaf)
    x = stored(sh, _pad(sh, x, place.names, leaf), place.names)
    for dim, pad in enumerate(place.pads):
        x = torch.cat([x, x.new_zeros((*x.shape[:dim], pad, *x.shape[dim + 1 :]))], dim) if pad else x
    if sh.mesh.stacked:
        return stack_shards(sh.mesh, x, place)
    if sh.mesh.rank is None:
        return x
    here = sh.mesh.coordinates(sh.mesh.rank)
    for dim, axes in enumerate(place.axes):
        for name in axes:
            x = x.unflatten(dim, (sh.mesh[name].size, -1)).select(dim, here[name])
    return x.contiguous()


def unshard(sh: Sharding, x: Tensor, names: str, kind: Kind | None = None) -> Tensor:
    """The global tensor from its local pieces, without pads; every process gets it."""
    place = sh.placement(names, kind)
    if sh.mesh.stacked:
        whole = unstack_shards(sh.mesh, x, place)
    else:
        replicated = Placement(place.names, ((),) * len(place.names))
        whole = run(x, rank_of(sh.mesh), plan_relayout(sh.mesh, place, replicated))
    whole = natural(sh, whole, place.names)
    for dim, name in enumerate(place.names):
        if name in sh.sizes:
            whole = whole.narrow(dim, 0, sh.true_size(name))
    return whole


def stored(sh: Sharding, x: Tensor, names: Sequence[str]) -> Tensor:
    """A whole tensor with its sequence in the order in which it is stored, which is the natural one unless it lies zigzag."""
    return _along_seq(sh, x, names, zigzag)


def natural(sh: Sharding, x: Tensor, names: Sequence[str]) -> Tensor:
    """A whole tensor with its sequence in natural order, the inverse of `stored`."""
    return _along_seq(sh, x, names, unzigzag)


def _along_seq(sh: Sharding, x: Tensor, names: Sequence[str], move: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    n = sh.zigzag if sh.rules.zigzag else 1
    for dim, name in enumerate(names) if n > 1 else ():
        if name in SEQ_NAMES and x.shape[dim] > 1:
            x = move(x, dim, n)
    return x


def _pad(sh: Sharding, x: Tensor, names: Sequence[str], leaf: str | None) -> Tensor:
    if x.dim() != len(names):
        raise ValueError(f"{leaf or 'a tensor'} of shape {tuple(x.shape)} is named [{' '.join(names)}]: one name a dim")
    for dim, name in enumerate(names):
        if name in sh.sizes and sh.size(name) != x.shape[dim]:
            if x.shape[dim] != sh.true_size(name):
                where = f"{leaf}: " if leaf else ""
                raise ValueError(
                    f"{where}dim {name!r} has size {x.shape[dim]}, but the table of sizes says {sh.true_size(name)}"
                )
            pads = x.new_zeros((*x.shape[:dim], sh.size(name) - x.shape[dim], *x.shape[dim + 1 :]))
            x = torch.cat([x, pads], dim)
    return x


def stack_shards(mesh: Mesh, x: Tensor, place: Placement) -> Tensor:
    """[ranks, *local] from a global tensor; its transpose sums the cotangents of replicated copies."""
    position: dict[str, int] = {}
    for dim in reversed(range(len(place.axes))):  # from the last dim, so that earlier dims keep their numbers
        for i, name in enumerate(place.axes[dim]):
            if x.shape[dim + i] % mesh[name].size:
                raise ValueError(
                    f"dim {place.names[dim]!r} of size {x.shape[dim + i]} does not divide over mesh axis {name!r} of "
                    f"{mesh[name].size}"
                )
            x = x.unflatten(dim + i, (mesh[name].size, -1))
        position = {name: at + len(place.axes[dim]) for name, at in position.items()}
        position |= {name: dim + i for i, name in enumerate(place.axes[dim])}
    order = [position[axis.name] for axis in mesh.axes if axis.name in position]
    x = x.permute([*order, *(d for d in range(x.dim()) if d not in order)])
    for i, axis in enumerate(mesh.axes):
        if axis.name not in position:
            x = x.unsqueeze(i).expand(*x.shape[:i], axis.size, *x.shape[i:])
    return x.reshape(mesh.size, *x.shape[len(mesh.axes) :])


def unstack_shards(mesh: Mesh, x: Tensor, place: Placement) -> Tensor:
    """The global tensor from [ranks, *local]: the inverse of `stack_shards`; partial axes are summed."""
    x = x.reshape(*(axis.size for axis in mesh.axes), *x.shape[1:])
    for i in reversed(range(len(mesh.axes))):
        name = mesh.axes[i].name
        if name in place.partial:
            x = x.sum(i)
        elif name not in place.placed:
            x = x.select(i, 0)
    leading = [axis.name for axis in mesh.axes if axis.name in place.placed]
    order: list[int] = []
    for dim, axes in enumerate(place.axes):
        order += [leading.index(name) for name in axes] + [len(leading) + dim]
    x = x.permute(order)
    for dim, axes in enumerate(place.axes):
        x = x.flatten(dim, dim + len(axes))
    return x


def rank_of(mesh: Mesh) -> Tensor | None:
    """This process's rank as a 0-D tensor; None on a single device."""
    if mesh.rank is None:
        return None
    return torch.full((), mesh.rank, dtype=torch.int64, device=mesh.device)  # no copy from the host: a graph may record it


def spmd(sh: Sharding, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(sh, *local trees) -> local tree` on every rank; local tensors are stacked where one process holds all ranks."""
    if sh.mesh.kind == "virtual":

        def virtual(*trees: Any) -> Any:
            check_stacked(sh.mesh, trees)
            dims = tuple(tree.map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, t) for t in trees)
            return torch.vmap(lambda rank, *local: fn(sh.at(rank), *local), in_dims=(0, *dims))(
                torch.arange(sh.mesh.size), *trees
            )

        return virtual
    if sh.mesh.kind == "threads":
        return lambda *trees: _run_threads(sh, fn, trees)
    rank = rank_of(sh.mesh)
    here = sh if rank is None else sh.at(rank)
    return lambda *trees: fn(here, *trees)


def check_stacked(mesh: Mesh, trees: Sequence[Any]) -> None:
    """ValueError where a tensor is not all ranks' pieces, which one process that holds them all stacks on a leading dim."""
    leaves: list[Any] = tree.leaves(list(trees))  # type: ignore[arg-type]
    for leaf in leaves:
        if isinstance(leaf, Tensor) and (not leaf.dim() or leaf.shape[0] != mesh.size):
            said = f"a tensor of shape {tuple(leaf.shape)} has no leading dim of the mesh's {mesh.size} ranks"
            raise ValueError(f"{said}: cut it by fm.shard(sh, x, names), or make it on this mesh")


def _run_threads(sh: Sharding, fn: Callable[..., Any], trees: Sequence[Any]) -> Any:
    check_stacked(sh.mesh, trees)
    transports = (getattr(axis.transport, "inner", axis.transport) for axis in sh.mesh.axes)
    hub = next(transport.hub for transport in transports if isinstance(transport, Threads))
    hub.open()
    outputs: list[Any] = [None] * sh.mesh.size
    errors: list[BaseException] = []
    grad_mode = torch.is_grad_enabled()

    def rank_main(r: int) -> None:
        try:
            local = [tree.map(lambda leaf: leaf[r] if isinstance(leaf, Tensor) else leaf, t) for t in trees]
            with torch.set_grad_enabled(grad_mode):
                outputs[r] = fn(sh.at(torch.tensor(r)), *local)
        except BaseException as error:
            errors.append(error)
            hub.abort()

    threads = [threading.Thread(target=rank_main, args=(r,), name=f"rank {r}") for r in range(sh.mesh.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return tree.map(lambda *values: torch.stack(values) if isinstance(values[0], Tensor) else values[0], *outputs)


def shard_map(
    fn: Callable[..., Any], sh: Sharding, in_names: Sequence[Tree], out_names: Tree, kinds: Sequence[Kind] | None = None
) -> Callable[..., Any]:
    """A function of global tensors from `fn(sh, *local trees)`, with dims named by `in_names` and `out_names`.

    in_names: for each argument a string, or a tree of strings of its structure. out_names: likewise for the result; "" names
    a 0-D output whose true value is the sum of what the ranks return (a loss term). kinds: the list of rules for each
    argument, "compute" if not given ("storage" for parameters at rest). Differentiable inside and outside, with equal results.
    """
    of = list(kinds) if kinds is not None else ["compute"] * len(in_names)

    def mapped(*args: Tree) -> Tree:
        if len(args) != len(in_names):
            raise ValueError(f"shard_map got {len(args)} arguments for {len(in_names)} in_names")
        local = [
            tree.map(lambda names, x, kind=kind: _enter(sh, x, names, kind), names, arg)
            for arg, names, kind in zip(args, in_names, of, strict=True)
        ]
        return tree.map(lambda names, y: _leave(sh, y, names), out_names, spmd(sh, fn)(*local))

    return mapped


def _enter(sh: Sharding, x: Tensor, names: str, kind: Kind) -> Tensor:
    """Global -> local; on a device mesh the backward completes the cotangent, so that every process holds all of it."""
    rank = rank_of(sh.mesh)
    if rank is None:
        return shard(sh, x, names, kind)
    for axis in sh.mesh.axes:
        x = _Boundary.apply(x, rank, Psum(axis))
    place = sh.placement(names, kind)
    whole = Placement(place.names, ((),) * len(place.names))
    x = stored(sh, _pad(sh, x, place.names, None), place.names)
    return run(x, rank, plan_relayout(sh.mesh, whole, place))


def _leave(sh: Sharding, y: Tensor, names: str) -> Tensor:
    """Local -> global; on a device mesh every process holds the same cotangent, and it is counted once."""
    rank = rank_of(sh.mesh)
    if names:
        y = unshard(sh, y, names)
    elif sh.mesh.stacked:
        y = y.sum(0)
    else:
        y = run(y, rank, [Psum(axis) for axis in sh.mesh.axes])
    for axis in sh.mesh.axes if rank is not None else ():
        y = _Boundary.apply(y, rank, Once(axis))
    return y


class _Boundary(torch.autograd.Function):
    """Identity whose backward is an op: between the mesh and the world in which all processes hold one value."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, rank: Tensor, op: Op) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.op = inputs[2]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return apply(cotangent, ctx.saved_tensors[0], ctx.op), None, None
