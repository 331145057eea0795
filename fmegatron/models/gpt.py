"""One decoder for GPT-2, Llama, Qwen, Mistral and Gemma: a config, a block, and the chain that joins blocks to a model.

embed  tokens -> h          token table (+ learned positions), multiplier, norm; rotations for all layers, once
layer  h -> h               h + attention(norm(h)), then h + mlp(norm(h))
final  h -> out             last norm
mtp    h, further tokens -> h, out.1, ...    where further tokens are predicted: models/mtp.py
loss   out, labels -> sums  logits over a sharded vocabulary, a piece of the sequence at a time

Layers with experts add their losses to running sums "moe.TERM", which become terms behind the last layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fmegatron import random
from fmegatron.models import mtp
from fmegatron.models.config import Config, kinds, moe_of
from fmegatron.models.model import Model, Node, Values, count_tokens, next_token, run_chain
from fmegatron.nn import attention, context, dropout, embedding, losses, mlp, moe, norm, rope, router, watch
from fmegatron.nn.attention import Attention
from fmegatron.nn.core import clip_factors
from fmegatron.nn.moe import Moe
from fmegatron.nn.param import Param, normal, stack
from fmegatron.sharding import SINGLE, Sharding

STREAM = "batch seq embed"


# -- nodes ----------------------------------------------------------------------------------------------------------
def embed(c: Config, sh: Sharding, p: Any, v: Values, key: Tensor | None) -> Values:
    """Tokens to the residual stream; and all that attention needs to know of them, brought to where its heads lie."""
    tokens = v["tokens"]
    place = sh.index("seq", "batch seq", tokens)[None]
    positions = v.get("positions", place)
    out = {"h": embedding.apply(sh, p, tokens, positions, c.embed_multiplier)}
    if c.embed_norm:
        out["h"] = norm.apply(sh, c.block_norm, p["norm"], out["h"])
    heads = "batch seq heads hd"
    for a in {a.table: a for a in kinds(c) if a.rope is not None}.values():
        here = sh.align(positions, "batch seq", within=heads)
        out[f"{a.table}.cos"], out[f"{a.table}.sin"] = rope.tables(a.rope, c.turned, here)  # type: ignore[arg-type]
    if "order" in v:
        out["order.q"] = out["order.k"] = context.table(sh, v["order"])
    if "documents" in v:
        out["documents.all"] = context.table(sh, v["documents"])
    if key is not None and c.dropouts:
        out |= dropout.places(sh, v, place)
        out["h"] = dropout.apply(sh, c.embed_dropout, key, out["h"], out)
    if c.fp32_residual:
        out["h"] = out["h"].to(torch.promote_types(out["h"].dtype, torch.float32))
    watch.activation(sh, "h", out["h"], STREAM)
    return out


def layer(c: Config, a: Attention, m: Moe | None, sh: Sharding, p: Any, v: Values, key: Tensor | None) -> Values:
    """One block: attention, then the feed-forward or the experts, each added to the residual stream."""
    n, out = c.block_norm, {}
    narrow = p.get("attn_norm", p.get("attn_out_norm"))["weight"].dtype if c.fp32_residual else None  # what blocks compute in

    def part(x: Tensor, name: str, site: int, block: Callable[[Tensor], Tensor]) -> Tensor:
        y = block(x if narrow is None else x.to(narrow))
        if c.norm_at in ("peri", "out"):
            y = norm.apply(sh, n, p[f"{name}_out_norm"], y)
        watch.activation(sh, name, y, STREAM)
        if key is not None and c.hidden_dropout:
            y = dropout.apply(sh, c.hidden_dropout, random.fold_in(key, site), y, v)
        return y if c.residual_multiplier == 1 else y * c.residual_multiplier

    def add(h: Tensor, y: Tensor, name: str) -> Tensor:
        return norm.apply(sh, n, p[f"{name}_norm"], h + y) if c.norm_at == "post" else h + y

    def forward(x: Tensor) -> Tensor:
        if m is None:
            return mlp.apply(sh, c.block_mlp, p["mlp"], x)
        y, terms = moe.apply(sh, m, c.block_mlp, p["mlp"], x, v, key)
        out.update({name: x for name, x in terms.items() if name in ("route", "load")})
        terms = {f"moe.{name}": x for name, x in terms.items() if name not in out}
        out.update({name: v[name] + x if name in v else x for name, x in terms.items()})
        return y

    h, before = v["h"], c.norm_at in ("pre", "peri")
    x = norm.apply(sh, n, p["attn_norm"], h) if before else h
    y = part(x, "attn", 0, lambda x: attention.apply(sh, a, p["attn"], x, v, key))
    if before:
        x, h = norm.after_add(sh, n, p["mlp_norm"], y, h)
    else:
        x = h = add(h, y, "attn")
    h = add(h, part(x, "mlp", 1, forward), "mlp")
    watch.activation(sh, "h", h, STREAM)
    return {"h": h, **out}


def balance(c: Config, sh: Sharding, p: Any, v: Values, key: Tensor | None) -> Values:
    """The routers' losses of all layers, as terms."""
    return {f"loss.{name}": v[f"moe.{name}"] for name in _terms(c)}


def _terms(c: Config) -> tuple[str, ...]:
    """The routers' terms that are on."""
    return tuple(c.moe.coefficients) if c.moe is not None else ()


def final(c: Config, sh: Sharding, p: Any, v: Values, key: Tensor | None) -> Values:
    """The last norm; the stream, labels and weights to where the loss wants their sequence."""
    h = norm.apply(sh, c.block_norm, p["norm"], v["h"]) if "norm" in p else v["h"]
    h = h.to(p["norm"]["weight"].dtype) if c.fp32_residual else h
    watch.activation(sh, "out", h, STREAM)
    return ({"h": h} if c.mtp else {}) | {
        "out": sh.relayout(h, "batch seq embed -> batch loss_seq embed"),
        "out.labels": sh.relayout(v["labels"], "batch seq -> batch loss_seq"),
        "out.weights": sh.relayout(v["weights"], "batch seq -> batch loss_seq"),
    }


def loss(c: Config, sh: Sharding, p: Any, v: Values, key: Tensor | None) -> Values:
    """Local sums of the loss's terms, over a piece of the sequence or all of it."""
    terms = losses.cross_entropy(sh, c.head, v["out"], p["table"], v["out.labels"], v["out.weights"])
    return {f"loss.{name}": value for name, value in terms.items()}


def output(c: Config, sh: Sharding, p: Any, v: Values, key: Tensor | None) -> Values:
    """Logits in place of the loss."""
    return {"logits": losses.logits(sh, c.head, v["out"], p["table"])}


# -- the model ------------------------------------------------------------------------------------------------------
def declare_layer(c: Config, a: Attention, m: Moe | None = None) -> dict[str, Any]:
    """Weights of one block."""
    inner = normal(c.init_std)
    outer = normal(c.init_std / math.sqrt(2 * c.layers)) if c.init_scaled else inner
    forward = mlp.declare(c.block_mlp, inner, outer) if m is None else moe.declare(m, c.block_mlp, inner, outer)
    p: dict[str, Any] = {"attn": attention.declare(a, inner, outer), "mlp": forward}
    for name in ("attn", "mlp"):
        if c.norm_at != "out":
            p[f"{name}_norm"] = norm.declare(c.block_norm)
        if c.norm_at in ("peri", "out"):
            p[f"{name}_out_norm"] = norm.declare(c.block_norm)
    return p


def runs(c: Config) -> list[range]:
    """Neighbouring layers whose weights have one structure: what is stacked together."""
    found: list[range] = []
    declared = [declare_layer(c, a, moe_of(c, i)) for i, a in enumerate(kinds(c))]
    for i in range(c.layers):
        if found and declared[i] == declared[found[-1].start]:
            found[-1] = range(found[-1].start, i + 1)
        else:
            found.append(range(i, i + 1))
    return found


CONTEXT = (
    "rope.cos",
    "rope.sin",
    "rope.window.cos",
    "rope.window.sin",
    "order.q",
    "order.k",
    "documents.all",
)
BATCH = ("tokens", "positions", "order", "documents", "sample")
PLACES = ("sample", "place.h")


def gpt(c: Config) -> Model:
    """The model of a config."""
    every = [(a, moe_of(c, i)) for i, a in enumerate(kinds(c))]
    sums, terms = tuple(f"moe.{name}" for name in _terms(c)), tuple(f"loss.{name}" for name in _terms(c))
    declare: dict[str, Any] = {"embed": embedding.declare(normal(c.init_std), c.positions == "learned")}
    if c.embed_norm:
        declare["embed"]["norm"] = norm.declare(c.block_norm)
    declare["layers"] = {str(run.start): stack(declare_layer(c, *every[run.start]), len(run)) for run in runs(c)}
    if c.norm_at != "post":
        declare["norm"] = norm.declare(c.block_norm)
    if c.mtp:
        declare["mtp"] = {"0": stack(mtp.declare(c, declare_layer(c, *every[-1])), c.mtp)}
    if not c.tied:
        declare["head"] = {"weight": Param("vocab embed", normal(c.init_std))}
    head = (("table", "embed.token" if c.tied else "head.weight"),)
    live = (*CONTEXT, *PLACES) if c.dropouts else CONTEXT
    fns = {kind: partial(layer, c, *kind) for kind in every}  # one function a kind: what is compiled once
    blocks = [
        Node(
            fn=fns[every[i]],
            params=(("", f"layers.{run.start}"),),
            reads=("h", *live, *sums, f"route.{i + 1}", f"load.{i + 1}"),
            writes=("h", *sums),
            own=moe.own(i + 1),
            layer=i - run.start,
            index=i + 1,
        )
        for run in runs(c)
        for i in run
    ]
    ends, averaged = ("out", "out.labels", "out.weights"), c.moe is not None and c.moe.global_average
    chain = (
        Node(
            partial(embed, c),
            (("", "embed"),),
            ("tokens", "positions", "order", "documents", "sample"),
            ("h", *live),
            linear=not c.embed_norm,
            light=True,
        ),
        *blocks,
        Node(
            partial(final, c),
            (("norm", "norm"),) if "norm" in declare else (),
            ("h", "labels", "weights"),
            ("h", *ends) if c.mtp else ends,
            index=c.layers + 1,
            light=True,
        ),
        *mtp.modules(c, blocks[-1]),
        *([Node(partial(balance, c), (), sums, terms, index=c.layers + 3, light=True)] if terms else []),
        Node(
            partial(loss, c),
            head,
            ends,
            tuple(f"loss.{name}" for name in c.head.terms),
            index=c.layers + 2,
            chunks=c.loss_chunks,
        ),
        *mtp.judges(c, head),
    )
    return Model(
        declare=declare,
        sizes=c.sizes,
        chain=chain,
        inputs=partial(mtp.inputs, c) if c.mtp else next_token,
        counts_of=partial(counts_of, c),
        output=Node(partial(output, c), head, ("out",), ("logits",), index=c.layers + 2),
        config=c,
        dropout=c.dropouts,
        factors=partial(factors, c) if c.qk_clip is not None else None,
        carries=tuple(outside for node in chain for name, outside in node.own if name == "load" and averaged),
        moves=partial(moves, c) if c.moe is not None and c.moe.balance_bias else None,
    )


def counts_of(c: Config, sh: Sharding, v: Values) -> dict[str, Tensor]:
    """The terms' denominators: tokens by their weights, and what the routers' losses are means over."""
    counts = mtp.counts_of(c, sh, v) if c.mtp else count_tokens(c.head.terms)(sh, v)
    return counts if c.moe is None else counts | router.denominators(sh, c.moe, v["tokens"])


def routes(model: Model, params: Any, batch: Mapping[str, Tensor], *, sh: Sharding = SINGLE) -> Values:
    """{"route.N": the experts int64 [batch, seq, k] that node N's router chooses}; in a batch, they are chosen again."""
    sh = sh.bind(model.sizes).tapping({}).watching(frozenset({"routes"}))
    values = run_chain(model, model.chain, params, model.inputs(sh, batch), sh=sh)
    return {name: x for name, x in values.items() if name.startswith("route.")}


def moves(c: Config, taps: Mapping[str, Tensor]) -> Values:
    """What a step adds to the routers' balance biases, by the loads that were tapped."""
    assert c.moe is not None
    found = {}
    for name, load in taps.items():
        if name.startswith("experts/") and name.endswith(".load"):
            number = int(name[len("experts/") : -len(".load")])  # of the node
            layer = f"layers.{number - 1}" if number <= c.layers else f"mtp.{number - c.layers - 4}.layer"
            found[f"{layer}.mlp.router.balance"] = router.move(c.moe, load)
    return found


def factors(c: Config, taps: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """What a step multiplies queries' and keys' heads by, by the scores that were tapped: QK-Clip (Kimi K2, 2025)."""
    assert c.qk_clip is not None
    found, kv = dict[str, tuple[str, Tensor]](), c.kv or c.heads
    for name, largest in taps.items():
        if name.startswith("attention/") and name.endswith(".max_logits"):
            number = int(name[len("attention/") : -len(".max_logits")])  # of the node
            own, shared = clip_factors(largest, kv, c.qk_clip, c.qk_clip_alpha)
            for leaf, by in (("q", ("heads", own)), ("k", ("kv", shared))):
                found |= {f"layers.{number - 1}.attn.{leaf}{end}": by for end in ("", "_bias")}
    return found
