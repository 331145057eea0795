"""Collectives: linear maps along one mesh axis, each with its true transpose as backward.

The one law: the loss is the sum of what the ranks return, and the backward of every collective is its transpose.

    forward                                    backward
    psum            every rank gets the sum    psum            (its own transpose)
    all_gather      pieces => whole            reduce_scatter  summed whole <= pieces   (and the reverse)
    take            whole => my piece          place           my piece among zeros     (and the reverse)
    all_to_all      split a, join b            all_to_all      split b, join a
    ppermute        x of rank source[me]       ppermute        the inverse permutation
    once            kept on rank 0, else 0     once            (its own transpose)

On ranks A, B of an axis, with the sum of all ranks' inner products as the inner product:

    psum         A: a => a+b        all_gather   A: a => ab       reduce_scatter  A: a1 a2 => a1+b1
                 B: b => a+b                     B: b => ab                       B: b1 b2 => a2+b2

Each is a frozen value, `apply(x, rank, op)` runs it: eager, under torch.func (grad, jvp, vmap) and compiled. The
0-D rank is an operand, so that the vmap rule knows the mesh's own level from a user's vmap.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fmegatron.sharding.mesh import Axis
from fmegatron.sharding.transports import Stacked, Transport


@dataclass(frozen=True)
class Op:
    """A linear map along `axis`; `dim` counts in the rank's own tensor."""

    axis: Axis

    def issue(self, x: Tensor, rank: Tensor, via: Transport) -> Tensor:
        """Start it by the primitives of `via`, on this rank or on all stacked ranks; `complete` waits for the result."""
        raise NotImplementedError

    def complete(self, issued: Tensor, via: Transport) -> Tensor:
        """The result of what `issue` returned."""
        return via.wait(issued)

    def run(self, x: Tensor, rank: Tensor, via: Transport) -> Tensor:
        """Issue it and wait."""
        return self.complete(self.issue(x, rank, via), via)

    @property
    def transpose(self) -> Op:
        """The op whose application to a cotangent is this one's backward."""
        return self

    def under(self, dims: int) -> Op:
        """The same map on tensors with `dims` more leading dims."""
        return self


@dataclass(frozen=True)
class Psum(Op):
    """Every rank gets the sum."""

    def issue(self, x: Tensor, rank: Tensor, via: Transport) -> Tensor:
        return via.all_reduce(x, self.axis, rank, "sum")


@dataclass(frozen=True)
class Pmax(Op):
    """Every rank gets the maximum; not linear, hence without derivative: give it detached values."""

    def issue(self, x: Tensor, rank: Tensor, via: Transport) -> Tensor:
        return via.all_reduce(x, self.axis, rank, "max")

    @property
    def transpose(self) -> Op:
        raise RuntimeError("pmax has no derivative: detach its operand")


@dataclass(frozen=True)
class Once(Op):
    """Kept on the first rank of the axis, zeros elsewhere: what all ranks hold alike is counted once."""

    def issue(self, x: Tensor, rank: Tensor, via: Transport) -> Tensor:
        return via.keep_first(x, self.axis, rank)

    def complete(self, issued: Tensor, via: Transport) -> Tensor:
        return issued


@dataclass(frozen=True)
class AlongDim(Op):
    """An op that cuts or joins one dim; `pad` zeros are added to its end before it is cut, and dropped once it is joined."""

    dim: int
    pad: int = 0

    def under(self, dims: int) -> Op:
        return replace(self, dim=self.dim + dims)

    def cut(self, x: Tensor) -> Tensor:
        """Whole -> n blocks on a leading dim."""
        if self.pad:
            x = torch.cat([x, x.new_zeros((*x.shape[: self.dim], self.pad, *x.shape[self.dim + 1 :]))], self.dim)
        return x.unflatten(self.dim, (self.axis.size, -1)).movedim(self.dim, 0)

    def join(self, blocks: Tensor) -> Tensor:
        """n blocks on a leading dim -> whole."""
        whole = blocks.movedim(0, self.dim).flatten(self.dim, self.dim + 1)
        return whole.narrow(self.dim, 0, whole.shape[self.dim] - self.pad).contiguous() if self.pad else whole


@dataclass(frozen=True)
class AllGather(AlongDim):
    """Every rank gets the whole dim."""

    def issue(self, x: Tensor, rank: Tensor, via: Transport) -> Tensor:
        return via.all_gather(x, self.axis, rank)

    def complete(self, issued: Tensor, via: Transport) -> Tensor:
        return self.join(via.wait(issued))

    @property
    def transpose(self) -> Op:
        return ReduceScatter(self.axis, self.dim, self.pad)


@dataclass(frozen=True)
class ReduceScatter(AlongDim):
    """Each rank gets its piece of the sum."""

    def issue(self, x: Tensor, rank: Tensor, via: Transport) -> Tensor:
        return via.reduce_scatter(self.cut(x), self.axis, rank)

    @property
    def transpose(self) -> Op:
        return AllGather(self.axis, self.dim, self.pad)


@dataclass(frozen=True)
class Take(AlongDim):
    """Each rank keeps its piece of what all hold: no communication."""

    def issue(self, x: Tensor, rank: Tensor, via: Transport) -> Tensor:
        return via.pick(self.cut(x), self.axis, rank)

    def complete(self, issued: Tensor, via: Transport) -> Tensor:
        return issued

    @property
    def transpose(self) -> Op:
        return Place(self.axis, self.dim, self.pad)


@dataclass(frozen=True)
class Place(AlongDim):
    """Each rank's piece among zeros: a partial whole, without communication."""

    def issue(self, x: Tensor, rank: Tensor, via: Transport) -> Tensor:
        return self.join(via.spread(x, self.axis, rank))

    def complete(self, issued: Tensor, via: Transport) -> Tensor:
        return issued

    @property
    def transpose(self) -> Op:
        return Take(self.axis, self.dim, self.pad)


@dataclass(frozen=True)
class AllToAll(Op):
    """The axis moves from dim `joined` to dim `split`: pieces of `split` go out, whole `joined` comes in.

    pads: zeros added to `split` before it is cut, and dropped from `joined`.
    """

    split: int
    joined: int
    pads: tuple[int, int] = (0, 0)

    def under(self, dims: int) -> Op:
        return replace(self, split=self.split + dims, joined=self.joined + dims)

    def issue(self, x: Tensor, rank: Tensor, via: Transport) -> Tensor:
        return via.all_to_all(AllGather(self.axis, self.split, self.pads[0]).cut(x), self.axis, rank)

    def complete(self, issued: Tensor, via: Transport) -> Tensor:
        return AllGather(self.axis, self.joined, self.pads[1]).join(via.wait(issued))

    @property
    def transpose(self) -> Op:
        return AllToAll(self.axis, self.joined, self.split, self.pads[::-1])


@dataclass(frozen=True)
class Ppermute(Op):
    """Rank i gets the value of rank source[i]; `source` is a permutation."""

    source: tuple[int, ...]

    def issue(self, x: Tensor, rank: Tensor, via: Transport) -> Tensor:
        return via.permute(x, self.axis, rank, self.source)

    @property
    def transpose(self) -> Op:
        return Ppermute(self.axis, tuple(self.source.index(i) for i in range(self.axis.size)))


def apply(x: Tensor, rank: Tensor, op: Op) -> Tensor:
    """Run one collective; differentiable any number of times, forward and reverse, inside and outside of vmap."""
    return _Collective.apply(x, rank, op)


class _Collective(torch.autograd.Function):
    """The only form that works eager, under torch.func and under AOTAutograd."""

    @staticmethod
    def forward(x: Tensor, rank: Tensor, op: Op) -> Tensor:
        return op.run(x, rank, op.axis.transport)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, rank, op = inputs
        ctx.save_for_backward(rank)
        ctx.save_for_forward(rank)
        ctx.op = op

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return apply(cotangent, ctx.saved_tensors[0], ctx.op.transpose), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Any:
        return apply(tangent, ctx.saved_tensors[0], ctx.op)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, rank: Tensor, op: Op) -> Any:
        x_dim, rank_dim, _ = in_dims
        if rank_dim is None:  # a user's vmap: the same collective on tensors with one more dim
            return apply(x.movedim(x_dim, 0), rank, op.under(1)), 0
        x = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
        return op.under(1).run(x, rank, stacked_form(op.axis.transport)), 0


def stacked_form(transport: Transport) -> Transport:
    """The transport of a mesh's own vmap level; other kinds of mesh have no such level."""
    inner = getattr(transport, "inner", transport)
    assert isinstance(inner, Stacked), "a rank was vmapped over a mesh that is not virtual"
    return transport
