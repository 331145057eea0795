"""Multi-token prediction: from a token's place, module k = 1, 2, ... predicts the token k places behind the next one.

    h_k = norm(layer(proj [norm_e(embedding of the token k places ahead); norm_h(h_{k-1})]))        h_0: the decoder's output

Embedding and head are the model's own. Term mtp_k is mtp_weight / mtp of the mean loss over all tokens, on all ranks, that
have a token k places ahead in their document. Which tokens these are is said by `inputs`, from the whole sequence: so neither
cuts of it nor zigzag matter.

Source: Gloeckle et al. 2024 (arXiv 2404.19737); as chained modules, DeepSeek-V3 (arXiv 2412.19437).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fmegatron.models.config import Config
from fmegatron.models.model import Node, NodeFn, Values, count_tokens, next_token
from fmegatron.nn import context, embedding, losses, moe, norm
from fmegatron.nn.param import Param, normal
from fmegatron.sharding import Sharding


# -- batches --------------------------------------------------------------------------------------------------------
def inputs(c: Config, sh: Sharding, batch: Mapping[str, Tensor]) -> Values:
    """`next_token`, and of each token what stands k places ahead: "tokens.k", "labels.k" and "weights.k" [batch, seq].

    The weight is that of the token ahead, zero where there is none in the sequence, or it is of another document.
    """
    values = next_token(sh, batch)
    whole = {name: in_order(sh, values[name], values) for name in ("tokens", "labels", "weights")}
    documents = in_order(sh, values["documents"], values) if "documents" in values else torch.zeros_like(whole["tokens"])
    for k in range(1, c.mtp + 1):
        ahead = {name: torch.cat((x[:, k:], torch.zeros_like(x[:, :k])), 1) for name, x in whole.items()}
        same = torch.cat((documents[:, k:] == documents[:, :-k], torch.zeros_like(documents[:, :k], dtype=torch.bool)), 1)
        ahead["weights"] = torch.where(same, ahead["weights"], torch.zeros_like(ahead["weights"]))
        values |= {f"{name}.{k}": in_place(sh, x, values) for name, x in ahead.items()}
    return values


def in_order(sh: Sharding, x: Tensor, v: Values) -> Tensor:
    """All tokens' values [batch, all] in the order of their sequence, from [batch, seq]; the inverse of `in_place`."""
    whole = context.table(sh, x)
    return whole.gather(1, context.table(sh, v["order"]).argsort(1)) if "order" in v else whole


def in_place(sh: Sharding, x: Tensor, v: Values) -> Tensor:
    """Of all tokens' values the local ones."""
    if "order" in v:
        x = torch.zeros_like(x).scatter(1, context.table(sh, v["order"]).argsort(1), x)
    return x.index_select(1, sh.index("seq", "batch seq", v["tokens"]))


def counts_of(c: Config, sh: Sharding, v: Values) -> dict[str, Tensor]:
    """The terms' denominators."""
    further = {f"mtp_{k}": sh.total(v[f"weights.{k}"], "batch seq") for k in range(1, c.mtp + 1)}
    return count_tokens(c.head.terms)(sh, v) | further


# -- nodes ----------------------------------------------------------------------------------------------------------
def declare(c: Config, layer: dict[str, Any]) -> dict[str, Any]:
    """Weights of one module, beside those of its layer."""
    n = c.block_norm
    joins = {"token_norm": norm.declare(n), "h_norm": norm.declare(n), "proj": Param("joined embed", normal(c.init_std))}
    return {**joins, "layer": layer, "norm": norm.declare(n)}


def module(c: Config, block: NodeFn, k: int, sh: Sharding, p: Any, v: Values, key: Tensor | None) -> Values:
    """The stream of module k, normed, and what its loss wants."""
    n, tokens = c.block_norm, v[f"tokens.{k}"]
    ahead = embedding.apply(sh, p["embed"], tokens, torch.zeros_like(tokens), c.embed_multiplier)
    joined = torch.cat((norm.apply(sh, n, p["token_norm"], ahead), norm.apply(sh, n, p["h_norm"], v["h"])), -1)
    h = sh.einsum("batch seq joined, joined embed -> batch seq embed", joined, p["proj"])
    out = block(sh, p["layer"], {**v, "h": h}, key)
    h = norm.apply(sh, n, p["norm"], out["h"])
    out |= {"h": h, f"out.{k}": sh.relayout(h, "batch seq embed -> batch loss_seq embed")}
    return out | {f"out.{name}.{k}": sh.relayout(v[f"{name}.{k}"], "batch seq -> batch loss_seq") for name in JUDGED}


def judge(c: Config, k: int, sh: Sharding, p: Any, v: Values, key: Tensor | None) -> Values:
    """The local sum of module k's loss."""
    out, labels, weights = (v[name] for name in _ends(k))
    terms = losses.cross_entropy(sh, replace(c.head, z=0.0), out, p["table"], labels, weights)
    return {f"loss.mtp_{k}": terms["ce"] * (c.mtp_weight / c.mtp)}


JUDGED = ("labels", "weights")


def _ends(k: int) -> tuple[str, ...]:
    return (f"out.{k}", *(f"out.{name}.{k}" for name in JUDGED))


def modules(c: Config, last: Node) -> list[Node]:
    """The nodes that look ahead, each with a layer like the decoder's last."""
    return [
        Node(
            partial(module, c, last.fn, k),
            (("", "mtp.0"), ("embed", "embed")),
            (*moe.renumbered(last.reads, c.layers + k), *(f"{name}.{k}" for name in ("tokens", *JUDGED))),
            (*last.writes, *_ends(k)),
            own=moe.own(c.layers + k),
            layer=k - 1,
            mtp=True,
            index=c.layers + 3 + k,
        )
        for k in range(1, c.mtp + 1)
    ]


def judges(c: Config, head: tuple[tuple[str, str], ...]) -> list[Node]:
    """The nodes of their losses; head: the parameters of the model's own."""
    return [
        Node(partial(judge, c, k), head, _ends(k), (f"loss.mtp_{k}",), index=c.layers + 3 + c.mtp + k, chunks=c.loss_chunks)
        for k in range(1, c.mtp + 1)
    ]
