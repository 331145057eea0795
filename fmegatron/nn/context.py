"""Where queries meet keys: the forms of context parallelism, told apart by where the rules put QUERIES and KEYS.

    gather        a rank's own queries    all keys                    every head of the rank
    ring          a rank's own queries    its own keys, then others'  every head of the rank        nn/ring.py
    ulysses       all queries             all keys                    fewer heads
    hierarchical  one axis exchanges heads for sequence, the other is a ring

The relayouts before and after (nn/attention.py) are the all-gather and the all-to-alls. A zigzag sequence comes in stored
order: keys that are whole are brought to natural order, a rank's own queries are its head and its tail, and where attention is
causal the head is multiplied with the first half of the keys only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmegatron import random
from fmegatron.kernels import attention
from fmegatron.kernels.attention import Seen
from fmegatron.nn import dropout, ring, watch
from fmegatron.nn.core import attend as dense
from fmegatron.nn.core import largest_score, see
from fmegatron.sharding.zigzag import unzigzag, zigzag
from fmegatron.transforms import compiling, inside_transform

if TYPE_CHECKING:
    from fmegatron.nn.attention import Attention
    from fmegatron.sharding import Sharding

QUERIES, KEYS = "batch q_seq q_heads hd", "batch kv_seq q_kv hd"
HEADS = "batch kv_seq q_heads hd"  # keys of the heads that queries read
Values = dict[str, Tensor]


def meet(sh: Sharding, keys: Tensor, values: Tensor, kv: str = "kv") -> tuple[Tensor, Tensor]:
    """Keys and values [batch, seq, kv, ...] to where queries meet them, [batch, kv_seq, heads that these read, ...].

    Where they travel they do so together, one collective for both. kv: the name of their heads; "heads" are the queries' own.
    """
    stream, there = f"batch seq {kv} hd", KEYS.replace("q_kv", "q_heads" if kv == "heads" else "q_kv")
    way = f"{stream} -> {there} -> {HEADS}"
    if sh.placement(stream).axes == sh.placement(there).axes:
        return sh.groups(keys, way), sh.groups(values, way)
    both = sh.groups(torch.cat((keys, values), -1), way)
    keys, values = both.split((keys.shape[-1], values.shape[-1]), -1)
    return keys, values


def table(sh: Sharding, x: Tensor) -> Tensor:
    """Of every token of the sequence, in natural order [batch, all], what lies as "batch seq"; for masks, so no gradient."""
    return unzigzag(sh.relayout(x, "batch seq -> batch all_seq"), 1, sh.zigzag)


def attend(
    sh: Sharding,
    attn: Attention,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Values,
    sink: Tensor | None = None,
    key: Tensor | None = None,
) -> Tensor:
    """Softmax attention of QUERIES over KEYS, as QUERIES.

    v: may hold tables of order.q, order.k and documents.all [batch, all], and sample [batch]. sink: [q_heads]. key: of
    dropout. Raises ValueError where keys lie over two axes.
    """
    around, along = sh.placement(KEYS).of("kv_seq"), sh.placement(QUERIES).of("q_seq")
    n = sh.zigzag
    exact = n > 1 and attn.causal and "order.q" not in v and along == sh.layout.large(sh.rules.zigzag)
    if n > 1 and not around and not along:  # whole queries too are used in natural order
        here = torch.arange(queries.shape[1], device=queries.device)
    else:
        here = sh.index("q_seq", QUERIES, queries)
    order, documents = v.get("order.k"), v.get("documents.all")
    tokens = ring.Tokens(
        here=v["order.q"].index_select(1, here) if "order.q" in v else here[None],
        order=order,
        documents_q=None if documents is None else documents.index_select(1, here),
        documents=documents,
    )
    if attn.dropout and key is not None:
        rows = dropout.of_scores(sh, random.fold_in(key, "scores"), queries, v["sample"], tokens.here)
        tokens = tokens._replace(rows=rows)
    if not around and part_of(exact, along) == "all" and "cache" not in v:
        seen, by = seen_of(sh, attn, queries, keys, tokens, sink)
        if by is not None:
            return unmasked(sh, attn, queries, keys, values, seen, by, sink)
    if not around:
        return whole(sh, attn, queries, keys, values, tokens, sink, n, part_of(exact, along))
    if len(around) > 1:
        raise ValueError(f"keys lie over mesh axes {', '.join(around)}: a ring runs along one axis, give kv_seq only one")
    axis, aligned = sh.mesh[around[0]], along == around and order is None
    steps = ring.steps(attn, axis.size, keys.shape[1], contiguous=aligned and n == 1)
    plan = ring.Ring(attn, axis, steps, zigzag=n, halves=exact and aligned, wide=keys.shape[-1])
    assert sh.rank is not None, "a ring ran outside of its mesh"
    rank = sh.rank
    tops: list[Tensor] = []

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, top = ring.attend(plan, rank, q, k, v, tokens, sink)
        tops.append(top)
        return y

    y = sh.local(core, f"{QUERIES} -> {QUERIES}")(queries, keys, values)
    if attn.clip or sh.watches("attention"):
        watch.max_logit(sh, tops[0].amax((0, 2)), queries, attn.clip)
    return y


def part_of(exact: bool, along: tuple[str, ...]) -> str:
    """What the queries are, see `whole`."""
    return "halves" if exact else "queries" if along else "all"


def seen_of(
    sh: Sharding, attn: Attention, queries: Tensor, keys: Tensor, tokens: ring.Tokens, sink: Tensor | None
) -> tuple[Seen, attention.Choice | None]:
    """What queries see of as many keys, and the kernel of torch that takes that as it is, without a mask; else None.

    Eager blocks with kernels "triton" alone: varlen_attn asks for the number of documents, flex_attention compiles itself.
    """
    window = attn.window if attn.window is not None and attn.window < keys.shape[1] else None
    seen = Seen(attn.causal, window, tokens.order, tokens.documents)
    watched = (attn.clip and sh.taps is not None) or sh.watches("attention")
    if sh.kernels != "triton" or watched or inside_transform() or compiling() or tokens.rows is not None:
        return seen, None
    if queries.shape[1] != keys.shape[1] or attn.undo != 1.0 or sh.zigzag > 1 or attn.sink == "one":
        return seen, None
    by = attention.choose(queries, seen, attn.softcap, sink)
    return seen, by if by in ("varlen", "flex") else None


def unmasked(
    sh: Sharding, attn: Attention, queries: Tensor, keys: Tensor, values: Tensor, seen: Seen, by: attention.Choice,
    sink: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention by the kernel that `kernels.attention` chose; by the definition where remat runs it again in a transform."""
    found = {"sink": sink, "place": seen.place, "document": seen.document}
    given = {name: x for name, x in found.items() if x is not None}

    def core(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        g = dict(zip(given, rest, strict=True))
        here = replace(seen, place=g.get("place"), document=g.get("document"))
        how: attention.Choice = "dense" if inside_transform() else by
        return attention.attend(q, k, v, here, scale=attn.scale, softcap=attn.softcap, sink=g.get("sink"), by=how)

    return sh.remat("core_attention", sh.local(core, f"{QUERIES} -> {QUERIES}"), queries, keys, values, *given.values())


def whole(
    sh: Sharding,
    attn: Attention,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    tokens: ring.Tokens,
    sink: Tensor | None,
    n: int,
    part: str,
) -> Tensor:
    """Attention over whole keys, stored zigzag among n ranks. part: what the queries are: "all" of them, some "queries", or
    "halves", a head and a tail of which the head sees the first half of the keys only."""
    length, local = keys.shape[1], queries.shape[1]
    spans = [(0, local, length)] if part != "halves" else [(0, local // 2, length // 2), (local // 2, local, length)]
    there = tokens.order if tokens.order is not None else torch.arange(length, device=keys.device)[None]
    given: Values = {} if sink is None else {"sink": sink}
    for i, (start, stop, end) in enumerate(spans):
        span = tokens._replace(here=tokens.here[:, start:stop])
        if tokens.documents is not None and tokens.documents_q is not None:
            span = span._replace(documents_q=tokens.documents_q[:, start:stop], documents=tokens.documents[:, :end])
        plain = part == "all" and local == length and tokens.order is None
        mask = visible(attn, span, there[:, :end], plain)
        given |= {} if mask is None else {f"mask{i}": mask}
        if tokens.rows is not None:
            given |= {f"rows{i}": tokens.rows[:, :, start:stop], f"columns{i}": there[:, None, None, :end]}

    if (attn.clip and sh.taps is not None) or sh.watches("attention"):
        q, k = unzigzag(queries.detach(), 1, n) if part == "all" else queries.detach(), unzigzag(keys.detach(), 1, n)
        tops = [largest_score(attn, q[:, a:b], k[:, :end], given.get(f"mask{i}")) for i, (a, b, end) in enumerate(spans)]
        watch.max_logit(sh, torch.stack(tops).amax(0), queries, attn.clip)

    def core(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        g = dict(zip(given, rest, strict=True))
        k, v = unzigzag(k, 1, n), unzigzag(v, 1, n)
        q = unzigzag(q, 1, n) if part == "all" else q
        found = [
            dense(
                attn,
                q[:, start:stop],
                k[:, :end],
                v[:, :end],
                mask=g.get(f"mask{i}"),
                sink=g.get("sink"),
                rows=g.get(f"rows{i}"),
                columns=g.get(f"columns{i}"),
            )
            for i, (start, stop, end) in enumerate(spans)
        ]
        y = torch.cat(found, 1) if len(found) > 1 else found[0]
        return zigzag(y, 1, n) if part == "all" else y

    return sh.remat("core_attention", sh.local(core, f"{QUERIES} -> {QUERIES}"), queries, keys, values, *given.values())


def visible(attn: Attention, tokens: ring.Tokens, there: Tensor, plain: bool) -> Tensor | None:
    """Which keys at `there` a query sees, bool [batch or 1, 1, seq, kv_seq]; None where that is plainly causal, or everything.

    plain: queries and keys are the same tokens in the same order.
    """
    narrow = attn.window is not None and attn.window < there.shape[1]
    if tokens.documents is None and not narrow and (plain or not attn.causal):
        return None
    mask = see(tokens.here, there, attn.window if narrow else None, attn.causal)
    if tokens.documents is not None and tokens.documents_q is not None:
        mask = mask & (tokens.documents_q[:, :, None] == tokens.documents[:, None, :])
    return mask[:, None]
