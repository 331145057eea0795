"""Causal self-attention with grouped key/value heads.

    q [batch seq heads hd]   k, v [batch kv_seq kv hd]   scores [batch heads seq kv_seq]

Query i sees key j where order_j <= order_i, they are of one document, and order_i - order_j < window. `order` is a
token's place in its sequence: the index, unless the batch says otherwise (a sequence that is stored zigzag).

Torch's fused kernel runs unless a soft-cap, a sink or attention dropout asks for the scores themselves, or a torch.func
transform is active: the kernel has no rule for vmap and no second derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fmegatron import random
from fmegatron.nn import dropout, norm, rope
from fmegatron.nn.norm import Norm
from fmegatron.nn.param import Init, Param, bias, zeros
from fmegatron.nn.rope import Rope
from fmegatron.transforms import inside_transform

if TYPE_CHECKING:
    from fmegatron.sharding import Sharding


@dataclass(frozen=True)
class Attention:
    """What one layer's attention computes."""

    scale: float  # of the scores, 1 / sqrt(hd) as a rule
    rope: Rope | None = None
    table: str = "rope"  # where this rope's rotations stand among the chain's values
    window: int | None = None
    causal: bool = True
    bias: bool = False  # of the projections to queries, keys and values
    out_bias: bool = False
    norm: Norm | None = None  # of each head's queries and keys, before the rotation
    softcap: float | None = None  # scores become cap * tanh(scores / cap)
    sink: Literal["one", "learned"] | None = None  # one more logit in the softmax: 0 (off-by-one), or a weight a head
    undo: float = 1.0  # queries are divided by it before, scores multiplied after: Megatron's query-key layer scaling
    dropout: float = 0.0

    @property
    def fused(self) -> bool:
        """Whether torch's scaled_dot_product_attention can do it, dropout aside."""
        return self.softcap is None and self.sink is None


def declare(attn: Attention, inner: Init, outer: Init) -> dict[str, Any]:
    """Its weights: `inner` fills q, k and v, `outer` the projection back into the residual stream."""
    p: dict[str, Any] = {"q": Param("embed heads hd", inner)}
    p |= {"k": Param("embed kv hd", inner), "v": Param("embed kv hd", inner), "o": Param("heads hd embed", outer)}
    if attn.bias:
        p |= {"q_bias": bias("heads hd"), "k_bias": bias("kv hd"), "v_bias": bias("kv hd")}
    if attn.out_bias:
        p["o_bias"] = bias("embed")
    if attn.norm is not None and attn.norm.kind != "l2":
        p |= {"q_norm": norm.declare(attn.norm, "hd"), "k_norm": norm.declare(attn.norm, "hd")}
    if attn.sink == "learned":
        p["sink"] = Param("heads", zeros, decay=False)
    return p


CORE = "batch seq heads hd, batch kv_seq heads hd, batch kv_seq heads hd -> batch seq heads hd"
QKV = (
    "batch seq embed, (embed heads hd | embed kv hd | embed kv hd) -> (batch seq heads hd | batch seq kv hd | batch seq kv hd)"
)
GROUPS = "batch kv_seq kv hd -> batch kv_seq heads hd"


def apply(sh: Sharding, attn: Attention, p: dict[str, Any], x: Tensor, v: dict[str, Tensor], key: Tensor | None) -> Tensor:
    """[batch, seq, embed] -> [batch, seq, embed]; `v` holds rotations, and order and documents where they are given."""
    queries, keys, values = sh.einsum(QKV, x, p["q"], p["k"], p["v"])
    if attn.bias:
        queries, keys, values = queries + p["q_bias"], keys + p["k_bias"], values + p["v_bias"]
    if attn.norm is not None:
        queries = norm.apply(sh, attn.norm, p.get("q_norm", {}), queries)
        keys = norm.apply(sh, attn.norm, p.get("k_norm", {}), keys)
    if attn.rope is not None:
        cos, sin = v[f"{attn.table}.cos"], v[f"{attn.table}.sin"]
        queries, keys = rope.rotate(attn.rope, queries, cos, sin), rope.rotate(attn.rope, keys, cos, sin)
    keys, values = (sh.relayout(y, "batch seq kv hd -> batch kv_seq kv hd") for y in (keys, values))
    if "cache" in v:  # while generating: with those of earlier tokens, see inference/cache.py
        keys, values = v["cache"](keys, values)  # type: ignore[operator]
    keys, values = (sh.groups(y, GROUPS) for y in (keys, values))
    more = {"mask": visible(sh, attn, queries, keys, v), "sink": p.get("sink")}
    if attn.dropout and key is not None:
        more["rows"], more["columns"] = dropout.of_scores(sh, random.fold_in(key, "scores"), queries, v)
    given: dict[str, Tensor] = {name: tensor for name, tensor in more.items() if tensor is not None}

    def core(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return attend(attn, q, k, v, **dict(zip(given, rest, strict=True)))

    y = sh.remat("core_attention", sh.local(core, CORE), queries, keys, values, *given.values())
    y = sh.einsum("batch seq heads hd, heads hd embed -> batch seq embed", y, p["o"])
    return y + p["o_bias"] if attn.out_bias else y


def visible(sh: Sharding, attn: Attention, queries: Tensor, keys: Tensor, v: dict[str, Tensor]) -> Tensor | None:
    """Which keys a query sees, bool [batch or 1, 1, seq, kv_seq]; None where that is plainly causal, or everything."""
    length = keys.shape[1]
    documents, order = "documents.q" in v, "order.q" in v
    narrow = attn.window is not None and attn.window < length
    if not (documents or narrow or (attn.causal and (order or queries.shape[1] != length))):
        return None
    if order:
        here, there = v["order.q"], v["order.k"]
    else:
        here = sh.index("seq", "batch seq heads hd", queries)[None]
        there = sh.index("kv_seq", "batch kv_seq heads hd", keys)[None]
    mask = see(here, there, attn.window if narrow else None, attn.causal)
    if documents:
        mask = mask & (v["documents.q"][:, :, None] == v["documents.k"][:, None, :])
    return mask[:, None]


def see(here: Tensor, there: Tensor, window: int | None, causal: bool = True) -> Tensor:
    """Which keys at `there` [batch, kv_seq] the queries at `here` [batch, seq] see: bool [batch, seq, kv_seq]."""
    back = here[:, :, None] - there[:, None, :]
    mask = back >= 0 if causal else back == back
    return mask if window is None else mask & (back < window) & (back > -window)


def attend(
    attn: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    sink: Tensor | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """Softmax attention of q [batch, seq, heads, hd] over k and v [batch, kv_seq, heads or fewer, hd].

    Query head j uses key/value head j // (heads / key heads). mask: bool, broadcast to [batch, heads, seq, kv_seq];
    None is causal (or everything, where `attn` is not causal). rows, columns: keys and indices of dropout. Returns q's
    shape.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    if attn.fused and rows is None and not inside_transform():
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=attn.causal and mask is None, scale=attn.scale, enable_gqa=grouped
        )
        return y.transpose(1, 2)
    if grouped:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = (q / attn.undo @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * (attn.scale * attn.undo)
    if attn.softcap is not None:
        scores = attn.softcap * (scores / attn.softcap).tanh()
    if mask is None and attn.causal:
        place = torch.arange(q.shape[2], device=q.device)[None]
        mask = see(place, place, None)[:, None]
    if mask is not None:
        scores = torch.where(mask, scores, torch.full_like(scores, float("-inf")))
    if attn.sink is not None:
        extra = torch.zeros_like(scores[..., :1])
        extra = extra if sink is None else extra + sink[:, None, None]
        scores = torch.cat((scores, extra), -1)
    weights = scores.softmax(-1)
    if attn.sink is not None:
        weights = weights[..., :-1]
    if rows is not None and columns is not None:
        weights = random.dropout(weights, attn.dropout, rows, columns)
    return (weights.to(v.dtype) @ v).transpose(1, 2)
