"""Ring attention: keys and values stay sharded along the sequence, and travel around a mesh axis of n ranks.

    step        0            1            2       ...       step s: rank r holds the block of rank r - s
    rank 0   q0 · kv0     q0 · kv3     q0 · kv2
    rank 1   q1 · kv1     q1 · kv0     q1 · kv3             the next block is sent for before a block is
    rank 2   q2 · kv2     q2 · kv1     q2 · kv0             computed, and waited for after

Each block adds to an online softmax: (top, below, above) with weights exp(score - top), below their sum, above their sum
times the values. Where a causal sequence lies zigzag, a step computes only the halves that are seen: three quarters of
its own block, and of a later one two quarters, whichever two they are: each rank does the same work. A causal window over a
contiguous sequence ends the ring early.

Backward sends keys and values around once more, from the farthest block inwards, and their gradients with them: so nothing
is kept but q, k, v, the output and its logsumexp. Under a torch.func transform the derivative is the transposed program's.

Source: Liu et al. 2023 (arXiv 2310.01889); Dao 2023 (arXiv 2307.08691) for the softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fmegatron import random
from fmegatron.nn.core import grouped, scores, see
from fmegatron.sharding.bucket import issue
from fmegatron.sharding.collectives import Ppermute, apply
from fmegatron.sharding.mesh import Axis
from fmegatron.sharding.zigzag import places
from fmegatron.transforms import inside_transform

if TYPE_CHECKING:
    from fmegatron.nn.attention import Attention

FLOOR = -1e30  # below any score: of a row that has seen no key yet


class Tokens(NamedTuple):
    """What a mask asks of tokens, natural order: places of the local queries [batch or 1, seq], and of all keys [.., all]
    where they are not their index; documents of both; keys of dropout for the queries [batch, heads, seq, 1]."""

    here: Tensor
    order: Tensor | None = None
    documents_q: Tensor | None = None
    documents: Tensor | None = None
    rows: Tensor | None = None


class Tile(NamedTuple):
    """A part of the local queries by a part of the present block: "all", "head", "tail", or "pick", which is head where the
    block comes before the rank's own, else tail. seen: every query sees every key, as far as order goes."""

    q: str
    k: str
    seen: bool = False


class State(NamedTuple):
    """An online softmax: top and below [batch, heads, seq], above [batch, heads, seq, hd]."""

    top: Tensor
    below: Tensor
    above: Tensor


@dataclass(frozen=True)
class Ring:
    """How the ring runs. steps: blocks that a rank sees. zigzag: ranks among which the sequence lies so. halves: whether
    it is causal over one's own zigzag, so that a step computes what is seen and no more. wide: features of a key."""

    attn: Attention
    axis: Axis
    steps: int
    zigzag: int
    halves: bool
    wide: int

    def shift(self, by: int) -> Ppermute:
        """Rank r gets what rank r - by holds."""
        return Ppermute(self.axis, tuple((r - by) % self.axis.size for r in range(self.axis.size)))

    def tiles(self, step: int) -> tuple[Tile, ...]:
        """What is computed at a step."""
        if not self.halves:
            return (Tile("all", "all"),)
        if step == 0:
            return Tile("head", "head"), Tile("tail", "all")
        return Tile("tail", "head", seen=True), Tile("pick", "pick", seen=True)

    def source(self, rank: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """0-D: the rank whose block is here, and whether it comes before the rank's own."""
        mine = self.axis.coordinate(rank)
        return (mine - step) % self.axis.size, mine >= step


def steps(attn: Attention, n: int, length: int, contiguous: bool) -> int:
    """Blocks of `length` keys that some query sees; contiguous: block i of the queries and of the keys are the same tokens."""
    if not (contiguous and attn.causal) or attn.window is None:
        return n
    return min(n, (attn.window + length - 2) // length + 1)


def attend(
    plan: Ring, rank: Tensor, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of the local q [batch, seq, heads, hd] over the k and v [batch, seq, heads or fewer, hd] of all ranks.

    sink: one more logit a head, [heads]. Returns q's shape, and the largest score of each query [batch, heads, seq].
    """
    q, kv = q.transpose(1, 2), torch.cat((k, v), -1).transpose(1, 2)
    if inside_transform():
        out, lse, top = _forward(plan, rank, q, kv, tokens)
    else:
        out, lse, top = _Ring.apply(plan, rank, q, kv, *tokens)
    if plan.attn.sink is not None:
        out = out * torch.sigmoid(lse if sink is None else lse - sink[:, None])[..., None].to(out.dtype)
    return out.transpose(1, 2), top


def _forward(plan: Ring, rank: Tensor, q: Tensor, kv: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """The output [batch, heads, seq, hd], the logsumexp of the scores and the largest of them [batch, heads, seq]."""
    states: dict[str, State] = {}
    for step in range(plan.steps):
        arriving = _send(plan, rank, kv, 1) if step + 1 < plan.steps else None
        source, before = plan.source(rank, step)
        for tile in plan.tiles(step):
            part = (_part(q, tile.q, before, 2), _part(kv, tile.k, before, 2))
            s, more = _scores(plan, tile, *part, tokens, source, before)
            top = s.detach().amax(-1).clamp(min=FLOOR)
            weights = (s - top[..., None]).exp()
            state = State(top, weights.sum(-1), _weigh(plan, weights, part[1], more))
            _merge(states, tile.q, state, before)
        kv = arriving() if arriving is not None else kv
    parts = [states[name] for name in (("head", "tail") if plan.halves else ("all",))]
    whole = State(*(torch.cat(xs, 2) for xs in zip(*parts, strict=True)))
    return (whole.above / whole.below[..., None]).to(q.dtype), whole.top + whole.below.log(), whole.top


def _backward(
    plan: Ring, rank: Tensor, q: Tensor, kv: Tensor, tokens: Tokens, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of q and kv: each block's, with the final logsumexp as a constant, as the softmax's derivative allows."""
    wide = lse.dtype
    d_below = d_lse - (d_out.to(wide) * out.to(wide)).sum(-1)
    d_q, d_own, block = torch.zeros_like(q, dtype=wide), None, kv
    passing: Callable[[], Tensor] | None = None
    order = (0, *reversed(range(1, plan.steps)))  # one's own block while the farthest comes
    for i, step in enumerate(order):
        arriving = _send(plan, rank, block, -1 if i else plan.steps - 1) if i + 1 < plan.steps else None
        source, before = plan.source(rank, step)

        def parts(q: Tensor, kv: Tensor, step: int = step, source: Tensor = source, before: Tensor = before) -> Any:
            found = []
            for tile in plan.tiles(step):
                part = (_part(q, tile.q, before, 2), _part(kv, tile.k, before, 2))
                s, more = _scores(plan, tile, *part, tokens, source, before)
                weights = (s - _part(lse, tile.q, before, 2)[..., None]).exp()
                found += [weights.sum(-1), _weigh(plan, weights, part[1], more)]
            return tuple(found)

        cotangents = [_part(ct, tile.q, before, 2) for tile in plan.tiles(step) for ct in (d_below, d_out.to(wide))]
        pull = torch.func.vjp(parts, q, block)[1]
        more_q, d_block = pull(tuple(cotangents))
        d_q, d_block = d_q + more_q, d_block.to(wide)
        if passing is not None:
            d_block = d_block + passing()
        if d_own is None:
            d_own = d_block
        else:
            passing = _send(plan, rank, d_block, -1)
        block = arriving() if arriving is not None else block
    assert d_own is not None
    return d_q.to(q.dtype), (d_own if passing is None else d_own + passing()).to(kv.dtype)


def _send(plan: Ring, rank: Tensor, x: Tensor, by: int) -> Callable[[], Tensor]:
    """Send x `by` ranks on; the function returned waits for what comes. At once where a derivative is being recorded."""
    if not (torch.is_grad_enabled() or inside_transform()):
        return issue(x, plan.shift(by), rank)
    y = apply(x, rank, plan.shift(by))
    return lambda: y


def _part(x: Tensor, which: str, before: Tensor, dim: int) -> Tensor:
    """A half of a dim, or all of it."""
    if which == "all":
        return x
    head, tail = x.chunk(2, dim)
    return {"head": head, "tail": tail}[which] if which != "pick" else torch.where(before, head, tail)


def _scores(
    plan: Ring, tile: Tile, q: Tensor, kv: Tensor, tokens: Tokens, source: Tensor, before: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Scores of a tile, -inf where a key is not seen, and the indices of its keys for dropout [batch or 1, 1, 1, keys]."""
    attn, local = plan.attn, kv.shape[2] * (1 if tile.k == "all" else 2)
    length = local * plan.axis.size
    index = places(torch.arange(local, device=q.device) + source * local, length, plan.zigzag)
    index = _part(index, tile.k, before, 0)
    there = index[None] if tokens.order is None else tokens.order.index_select(1, index)
    mask = None
    if attn.window is not None or (attn.causal and not tile.seen):
        mask = see(_part(tokens.here, tile.q, before, 1), there, attn.window, attn.causal)
    if tokens.documents is not None and tokens.documents_q is not None:
        own = _part(tokens.documents_q, tile.q, before, 1)
        same = own[:, :, None] == tokens.documents.index_select(1, index)[:, None, :]
        mask = same if mask is None else mask & same
    s = scores(attn, q, kv[..., : plan.wide], None if mask is None else mask[:, None])
    if tokens.rows is None:
        return s, None
    rows = _part(tokens.rows, tile.q, before, 2)
    return s, random.dropout(torch.ones_like(s), attn.dropout, rows, there[:, None, None, :])


def _weigh(plan: Ring, weights: Tensor, kv: Tensor, kept: Tensor | None) -> Tensor:
    """Values by weights, at least fp32; kept: factors of dropout."""
    weights = weights if kept is None else weights * kept
    return grouped(weights.to(kv.dtype), kv[..., plan.wide :]).to(weights.dtype)


def _merge(states: dict[str, State], which: str, new: State, before: Tensor) -> None:
    """Add a tile's softmax to what its queries have so far."""
    if which != "pick":
        states[which] = _join(states[which], new) if which in states else new
        return
    head, tail = states["head"], states["tail"]
    joined = _join(State(*(torch.where(before, a, b) for a, b in zip(head, tail, strict=True))), new)
    states["head"] = State(*(torch.where(before, a, b) for a, b in zip(joined, head, strict=True)))
    states["tail"] = State(*(torch.where(before, a, b) for a, b in zip(tail, joined, strict=True)))


def _join(a: State, b: State) -> State:
    top = torch.maximum(a.top, b.top)
    x, y = (a.top - top).exp(), (b.top - top).exp()
    return State(top, a.below * x + b.below * y, a.above * x[..., None] + b.above * y[..., None])


class _Ring(torch.autograd.Function):
    """(output, logsumexp, largest scores) with a backward of its own; outside of transforms."""

    @staticmethod
    def forward(plan: Ring, rank: Tensor, q: Tensor, kv: Tensor, *tokens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(plan, rank, q, kv, Tokens(*tokens))  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan = inputs[0]
        ctx.save_for_backward(*inputs[1:], *output[:2])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor, d_top: Tensor) -> Any:
        rank, q, kv, *tokens, out, lse = ctx.saved_tensors
        d_q, d_kv = _backward(ctx.plan, rank, q, kv, Tokens(*tokens), out, lse, d_out, d_lse)
        return None, None, d_q, d_kv, *[None] * len(tokens)
