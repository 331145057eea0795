"""Tokens to their experts and back: what each form of expert parallelism does between a router and grouped products.

    y_t = sum_j w_tj f_e(x_t),  e = index_tj        dispatch(sh, form, x, index, weight, ...) -> y

    gather   all tokens of the ranks that share experts come to each of them, and sums of results are scattered back
    padded   each rank sends every expert `slots` rows by all-to-all, zeros where it has fewer: static shapes
    ragged   each rank sends every expert the rows that it has, by all-to-alls of uneven splits

Where experts lie, and over what the width of one is cut, is the rules' choice (names `expert`, `expert_mlp`): over any mesh
axes, those of the batch, of the sequence, of tensor parallelism or their own. With tokens and experts on one axis rows are
exchanged; a rank without tokens of its own there takes its experts' share; along the width of an expert rows are gathered.
The way back is the transpose of the way in, so it is never written down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from fmegatron.kernels.permute import permute, unpermute
from fmegatron.sharding.collectives import AllGather, Op, Psum
from fmegatron.sharding.named import offset
from fmegatron.sharding.placement import Placement
from fmegatron.sharding.ragged import Back, Meanwhile, own, spread, swap
from fmegatron.sharding.relayout import plan_relayout, run

if TYPE_CHECKING:
    from fmegatron.sharding import Sharding
    from fmegatron.sharding.sharding import Layout

Static = Callable[[Tensor], Tensor]  # rows [experts here, slots, d] -> the same
Grouped = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # rows [n, d], counts, whose each is, scale [n] -> [n, d]
Lean = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # tokens [t, d], whose each row is, counts, scale [n] -> [t, d]


@dataclass(frozen=True)
class Ways:
    """The collectives of a dispatch. tokens: those that gather tokens [t, d]; rows: from [experts, slots, d] of a rank's
    tokens to those of its experts; partial: what is summed over ranks at the end. experts: the axes of `expert`, of which
    `moved` carry tokens too; wide: those of `expert_mlp` that do."""

    tokens: tuple[Op, ...]
    rows: tuple[Op, ...]
    partial: tuple[Op, ...]
    experts: tuple[str, ...]
    moved: tuple[str, ...]
    wide: tuple[str, ...]

    @property
    def alone(self) -> bool:
        """Whether every token finds all experts where it is."""
        return not (self.rows or self.partial)


def plan_ways(layout: Layout) -> Ways:
    """From where the rules put tokens and experts. Raises ValueError where features of a token lie over an axis."""
    at_tokens, at_experts = layout.placement(("batch", "seq", "embed")), layout.placement(("expert", "expert_mlp"))
    if over := at_tokens.of("embed"):
        raise ValueError(f"embed lies over mesh axes {', '.join(over)}: experts take whole tokens, drop that rule")
    experts, width = at_experts.axes
    tokens = (*at_tokens.of("batch"), *at_tokens.of("seq"))
    moved, wide = [a for a in experts if a in tokens], [a for a in width if a in tokens]
    rest = [a for a in tokens if a not in experts and a not in wide]
    mesh = layout.mesh
    dims = ("expert", "slot", "embed")
    source = Placement(dims, ((), (*rest, *wide, *reversed(moved)), ()))
    target = Placement(dims, (experts, tuple(rest), ()))
    return Ways(
        tokens=tuple(AllGather(mesh[a], 0) for a in (*moved, *wide)),
        rows=plan_relayout(mesh, source, target),
        partial=tuple(Psum(mesh[a]) for a in (*experts, *width) if a not in tokens),
        experts=experts,
        moved=tuple(moved),
        wide=tuple(wide),
    )


def back(ops: tuple[Op, ...]) -> tuple[Op, ...]:
    """The transpose of a way."""
    return tuple(op.transpose for op in reversed(ops))


def capacity(tokens: int, top_k: int, experts: int, factor: float) -> int:
    """Rows that an expert takes from a rank: its even share times `factor`, rounded up, at most one a token."""
    return min(tokens, math.ceil(tokens * top_k / experts * factor))


def slots_of(index: Tensor, weight: Tensor, experts: int, slots: int, drop: Literal["probs", "position"]) -> Tensor:
    """A slot among experts x slots for each choice [t, k]; what is over `slots` gets the number behind the last, and is
    dropped: the choices of least weight, or the last ones."""
    t, k = index.shape
    if slots >= t:  # each token in its own
        return index * slots + torch.arange(t, device=index.device)[:, None]
    flat = index.reshape(-1)
    first = weight.detach().reshape(-1).argsort(descending=True, stable=True) if drop == "probs" else None
    order = flat.argsort(stable=True) if first is None else first[flat[first].argsort(stable=True)]
    chosen = flat[order]
    place = torch.arange(t * k, device=index.device) - torch.searchsorted(chosen, chosen)
    place = torch.zeros_like(place).scatter(0, order, place).reshape(t, k)
    return torch.where(place < slots, index * slots + place, experts * slots)


def ways_of(sh: Sharding) -> Ways:
    """The ways under a sharding, planned once."""
    memo = sh.layout.memo
    if "dispatch" not in memo:
        memo["dispatch"] = plan_ways(sh.layout)
    ways: Ways = memo["dispatch"]
    return ways


def padded(
    sh: Sharding, ways: Ways, x: Tensor, weight: Tensor, slot: Tensor, experts: int, slots: int, f: Static
) -> Tensor:
    """Through slots: x [t, d] at slot [t, k] of experts x slots, and back with weight [t, k]."""
    rows = permute(x, slot, experts * slots, form=sh.kernels).unflatten(0, (experts, slots))
    y = run(f(run(rows, sh.rank, ways.rows)), sh.rank, back(ways.rows))
    return run(unpermute(y.flatten(0, 1), slot, weight, form=sh.kernels), sh.rank, ways.partial)


class Sorted(NamedTuple):
    """Choices sorted by expert: order [n], numbers among t x k; expert [n]; counts [experts]; home [t, k], places in order."""

    order: Tensor
    expert: Tensor
    counts: Tensor
    home: Tensor


def by_expert(index: Tensor, experts: int, dropped: bool) -> Sorted:
    """index int64 [t, k]; dropped: some are `experts`, chosen no more, which are left out; their place is n."""
    expert, order = index.reshape(-1).sort(stable=True)
    counts = expert.new_zeros(experts + 1).scatter_add(0, expert, torch.ones_like(expert))[:experts]
    if dropped and not index.is_meta:
        n = int(counts.sum())
        expert, order = expert[:n], order[:n]
    place = torch.arange(len(order), device=index.device)
    home = index.new_full((index.numel(),), len(order)).scatter(0, order, place)
    return Sorted(order, expert, counts, home.reshape(index.shape))


def local(
    x: Tensor, index: Tensor, weight: Tensor, experts: int, f: Grouped, lean: Lean | None, dropped: bool = False
) -> Tensor:
    """Where tokens and all experts are here: rows sorted by expert, grouped products, and back; lean: all of that at once."""
    s = by_expert(index, experts, dropped)
    token, scale = s.order // index.shape[1], weight.reshape(-1).index_select(0, s.order)
    if lean is not None:
        return lean(x, token, s.counts, scale)
    y = f(x.index_select(0, token), s.counts, s.expert, scale)
    y = torch.cat([y, torch.zeros_like(x[:1])]) if dropped else y
    return y.index_select(0, s.home.reshape(-1)).unflatten(0, index.shape).sum(1)


def ragged(
    sh: Sharding,
    ways: Ways,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    experts: int,
    f: Grouped,
    dropped: bool = False,
    meanwhile: Meanwhile | None = None,
) -> Tensor:
    """By exchanges of as many rows as there are: x [t, d] at index [t, k], and back with weight [t, k]."""
    rank, s = sh.rank, by_expert(index, experts, dropped)
    assert rank is not None, "rows were exchanged outside of a mesh"
    rows, counts, undo = x.index_select(0, s.order // index.shape[1]), s.counts, list[Back]()
    for name in ways.experts:
        axis = sh.mesh[name]
        rows, counts, home = swap(rows, counts, axis, rank, meanwhile) if name in ways.moved else own(rows, counts, axis, rank)
        undo.append(home)
    for name in ways.wide:
        rows, counts, home = spread(rows, counts, sh.mesh[name], rank)
        undo.append(home)
    y = f(rows, counts, torch.arange(len(counts), device=x.device).repeat_interleave(counts), None)
    for home in reversed(undo):
        y = home(y)
    return run(unpermute(y, s.home, weight, form=sh.kernels), rank, ways.partial)


def gathered(
    sh: Sharding, ways: Ways, x: Tensor, index: Tensor, weight: Tensor, experts: int, f: Grouped | None, lean: Lean | None,
    batched: Static,
) -> Tensor:
    """By gathering tokens: every rank runs its own experts on all of them, and the sums are scattered.

    f: None where values cannot be looked at, and each expert has a slot for every token.
    """
    rank, here = sh.rank, experts // math.prod(sh.mesh[a].size for a in ways.experts)
    everything, chosen, shares = (run(y, rank, ways.tokens) for y in (x, index, weight))
    mine = chosen - offset(sh.mesh, rank, ways.experts, here)
    inside = (mine >= 0) & (mine < here)
    if f is not None:
        y = local(everything, torch.where(inside, mine, here), shares, here, f, lean, dropped=True)
    else:
        t = len(chosen)
        slot = torch.where(inside, mine * t + torch.arange(t, device=x.device)[:, None], here * t)
        rows = batched(permute(everything, slot, here * t, form=sh.kernels).unflatten(0, (here, t)))
        y = unpermute(rows.flatten(0, 1), slot, shares, form=sh.kernels)
    return run(run(y, rank, back(ways.tokens)), rank, ways.partial)
