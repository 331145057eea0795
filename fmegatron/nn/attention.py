"""Causal self-attention with grouped key/value heads.

    q [batch seq heads hd]   k, v [batch kv_seq kv hd]   scores [batch heads seq kv_seq]

Query i sees key j where order_j <= order_i, they are of one document, and order_i - order_j < window. `order` is a
token's place in its sequence: the index, unless the batch says otherwise.

Queries, keys and values go from where they were made to where they meet, by the names of their dims: which form of context
parallelism that is (`nn/context.py`) is the rules' choice, and nothing here knows of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from fmegatron.nn import context, mla, norm, rope
from fmegatron.nn.context import HEADS, KEYS, QUERIES
from fmegatron.nn.mla import Latent
from fmegatron.nn.norm import Norm
from fmegatron.nn.param import Init, Param, bias, zeros
from fmegatron.nn.rope import Rope

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
    clip: bool = False  # tap each head's largest score, for QK-Clip
    latent: Latent | None = None  # keys and values are projections of a latent: nn/mla.py

    @property
    def fused(self) -> bool:
        """Whether torch's scaled_dot_product_attention can do it, dropout aside."""
        return self.softcap is None and self.sink is None


def declare(attn: Attention, inner: Init, outer: Init) -> dict[str, Any]:
    """Its weights: `inner` fills q, k and v, `outer` the projection back into the residual stream."""
    if attn.latent is not None:
        return mla.declare(attn.latent, inner, outer)
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


QKV = (
    "batch seq embed, (embed heads hd | embed kv hd | embed kv hd) -> (batch seq heads hd | batch seq kv hd | batch seq kv hd)"
)


def apply(sh: Sharding, attn: Attention, p: dict[str, Any], x: Tensor, v: dict[str, Tensor], key: Tensor | None) -> Tensor:
    """[batch, seq, embed] -> [batch, seq, embed]; `v` holds rotations, and order and documents where they are given."""
    if attn.latent is not None:
        return mla.apply(sh, attn, attn.latent, p, x, v, key)
    queries, keys, values = sh.einsum(QKV, x, p["q"], p["k"], p["v"])
    if attn.bias:
        queries, keys, values = queries + p["q_bias"], keys + p["k_bias"], values + p["v_bias"]
    if attn.norm is not None:
        queries = norm.apply(sh, attn.norm, p.get("q_norm", {}), queries)
        keys = norm.apply(sh, attn.norm, p.get("k_norm", {}), keys)
    if attn.rope is not None:
        cos, sin = v[f"{attn.table}.cos"], v[f"{attn.table}.sin"]
        queries, keys = rope.rotate_both(attn.rope, queries, keys, cos, sin, sh.kernels)
    queries = sh.relayout(queries, f"batch seq heads hd -> {QUERIES}")
    if "cache" in v:  # while generating: with those of earlier tokens, see inference/cache.py
        keys, values = (sh.relayout(y, f"batch seq kv hd -> {KEYS}") for y in (keys, values))
        keys, values = (sh.groups(y, f"{KEYS} -> {HEADS}") for y in v["cache"](keys, values))  # type: ignore[operator]
    else:
        keys, values = context.meet(sh, keys, values)
    sink = sh.relayout(p["sink"], "heads -> q_heads") if attn.sink == "learned" else None
    y = context.attend(sh, attn, queries, keys, values, v, sink, key)
    y = sh.relayout(y, f"{QUERIES} -> batch seq heads hd")
    y = sh.einsum("batch seq heads hd, heads hd embed -> batch seq embed", y, p["o"])
    return y + p["o_bias"] if attn.out_bias else y
