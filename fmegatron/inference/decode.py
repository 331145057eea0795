"""Generate tokens: the prompt in one pass, then one token at a time, over the nodes of the model's own chain.

    generate(model, params, tokens, 64)       [batch, n] -> [batch, n + 64]

Every node runs as in training; attention finds a cache among its values, and the tokens know their places by `order`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fmegatron import random, tree
from fmegatron.inference import cache, draw
from fmegatron.models.model import Model, node_params
from fmegatron.sharding import SINGLE, Sharding, spmd
from fmegatron.tree import Tree


def generate(
    model: Model,
    params: Tree,
    tokens: Tensor,
    steps: int,
    *,
    sh: Sharding = SINGLE,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    cached: bool = True,
) -> Tensor:
    """Continue int64 [batch, n] by `steps` tokens: [batch, n + steps], on every rank.

    params: local shards as `sh` stores them (on one device whole). Temperature 0 takes the likeliest, and draws nothing.
    cached: keep keys and values (the same tokens without, slowly). Raises ValueError beyond a model's learned positions.
    """
    _check(model, tokens, steps)
    draw.check(temperature, top_k, top_p)
    sh = sh.bind({**model.sizes, "batch": 1}).decoding()  # one row is on all ranks: so is every row
    settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "cached": cached}

    def on_rank(here: Sharding, own: Tree, like: Tensor) -> Tensor:
        new = list(islice(_tokens(model, own, tokens + like, steps, here, **settings), steps))
        return torch.stack(new, 1) if new else tokens[:, :0]

    like = torch.zeros(sh.mesh.size if sh.mesh.stacked else (), dtype=torch.int64, device=tokens.device)
    with torch.no_grad():
        new = spmd(sh, on_rank)(params, like)
    return torch.cat([tokens, new[0] if sh.mesh.stacked else new], 1)


def stream(
    model: Model,
    params: Tree,
    tokens: Tensor,
    steps: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[Tensor]:
    """The tokens of `generate`, int64 [batch], each as soon as it is there; on one device."""
    _check(model, tokens, steps)
    draw.check(temperature, top_k, top_p)
    sh = SINGLE.bind(model.sizes).decoding()
    made = _tokens(model, params, tokens, steps, sh, temperature, top_k, top_p, seed)
    for _ in range(steps):
        with torch.no_grad():
            token = next(made)
        yield token


def _check(model: Model, tokens: Tensor, steps: int) -> None:
    if model.output is None:
        raise ValueError("this model has no output node, so it cannot generate")
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}: expected [batch, n] with at least one token")
    longest = model.config.context if getattr(model.config, "positions", "") == "learned" else None
    if longest is not None and tokens.shape[1] + steps > longest:
        raise ValueError(
            f"{tokens.shape[1]} tokens and {steps} more are beyond the model's {longest} positions: "
            f"ask for {max(0, longest - tokens.shape[1])} at most"
        )


def _tokens(
    model: Model,
    params: Tree,
    tokens: Tensor,
    steps: int,
    sh: Sharding,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    cached: bool = True,
) -> Iterator[Tensor]:
    """New tokens, without end (`steps` is what the cache has room for); on one rank."""
    logits_of = Decoder(model, params, sh, tokens.shape[1] + steps) if cached else Again(model, params, sh)
    key = random.key(seed).to(tokens.device)
    number = tokens.shape[1]
    while True:
        logits = logits_of(tokens)
        tokens = draw.draw(logits, random.fold_in(key, number), temperature, top_k, top_p)[:, None]
        number += 1
        yield tokens[:, 0]


class Decoder:
    """`decoder(new tokens [batch, new]) -> logits [batch, vocab]` of the last of them; remembers all before."""

    def __init__(self, model: Model, params: Tree, sh: Sharding, capacity: int) -> None:
        assert model.output is not None
        self.model, self.sh, self.length = model, sh, 0
        slices = tree.map(lambda p, x: x.unbind(0) if p.layers is not None else x, model.declare, params)
        self.nodes = [(node, node_params(node, model.declare, slices, sh)) for node in model.trunk]
        self.output = (model.output, node_params(model.output, model.declare, slices, sh))
        self.caches = [cache.Cache(capacity) for _ in self.nodes]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits after the last token."""
        sh, stop = self.sh, self.length + tokens.shape[1]
        here, there = cache.order(self.length, stop, tokens)
        batch = {"tokens": tokens, "positions": here.expand(tokens.shape), "order": here.expand(tokens.shape)}
        values: dict[str, Any] = self.model.inputs(sh, batch)
        for (node, own), kept in zip(self.nodes, self.caches, strict=True):
            reads: dict[str, Any] = {**node.given(values), "cache": kept}
            values |= {node.outside(name): x for name, x in node.fn(sh, own, reads, None).items()}
            if "order.k" in node.writes:
                values["order.k"] = there
        self.length = stop
        node, own = self.output
        reads = {name: x[:, -1:] for name, x in node.given(values).items()}
        return _whole(sh, node.fn(sh, own, reads, None)["logits"])


class Again:
    """The same without a memory: everything anew for each token."""

    def __init__(self, model: Model, params: Tree, sh: Sharding) -> None:
        self.model, self.params, self.sh = model, params, sh
        self.tokens: Tensor | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits after the last token."""
        self.tokens = tokens if self.tokens is None else torch.cat([self.tokens, tokens], 1)
        return Decoder(self.model, self.params, self.sh, self.tokens.shape[1])(self.tokens)


def _whole(sh: Sharding, logits: Tensor) -> Tensor:
    """[batch, 1, local vocab] -> [batch, true vocab]."""
    whole = sh.relayout(logits, "batch loss_seq vocab -> batch loss_seq token")
    return whole[:, 0, : sh.true_size("vocab")]
