"""The decoder of a config as one writes it by hand in plain torch: what this library is raced against.

Parameters lie as torch's modules have them, matrices [out, in]; `fill` copies this library's into them. Importing it imports
torch alone, so that a peer's process pays for nothing else.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from fmegatron.models import Config


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The halves of a head's features turned; in fp32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Dense(nn.Module):
    """The feed-forward block: SwiGLU, or GELU without a gate."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        linear = partial(nn.Linear, bias=False)
        self.gate = linear(c.embed, c.mlp) if c.block_mlp.gated else None
        self.up, self.down = linear(c.embed, c.mlp), linear(c.mlp, c.embed)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        return self.down(F.gelu(up) if self.gate is None else F.silu(self.gate(x)) * up)


class Experts(nn.Module):
    """Softmax over the top k, rows sorted by expert, grouped products."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        assert c.moe is not None
        self.k, n, width = c.moe.top_k, c.moe.experts, c.moe.mlp or c.mlp
        self.router = nn.Linear(c.embed, n, bias=False)
        self.gate, self.up = (nn.Parameter(torch.empty(n, c.embed, width)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(n, width, c.embed))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        best, index = (flat.float() @ self.router.weight.float().t()).topk(self.k)
        expert, order = index.flatten().sort(stable=True)
        ends = torch.zeros(len(self.up), dtype=torch.int64, device=x.device).scatter_add(0, expert, torch.ones_like(expert))
        product = partial(F.grouped_mm, offs=ends.cumsum(0).to(torch.int32))
        rows = flat[order // self.k]
        y = product(F.silu(product(rows, self.gate)) * product(rows, self.up), self.down)
        y = y * best.softmax(-1).flatten()[order, None].to(y.dtype)
        return torch.zeros_like(flat).index_add(0, order // self.k, y).view_as(x)


class Block(nn.Module):
    """Attention, then the feed-forward block, each on the normed stream and added to it."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        linear, kv = partial(nn.Linear, bias=False), c.kv or c.heads
        self.hd = c.head_dim
        self.attn_norm, self.mlp_norm = (nn.RMSNorm(c.embed, eps=c.norm_eps) for _ in range(2))
        self.q, self.o = linear(c.embed, c.heads * self.hd), linear(c.heads * self.hd, c.embed)
        self.k, self.v = linear(c.embed, kv * self.hd), linear(c.embed, kv * self.hd)
        self.mlp = Dense(c) if c.moe is None else Experts(c)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.attn_norm(h)
        q, k, v = (y.unflatten(-1, (-1, self.hd)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        h = h + self.o(y.transpose(1, 2).flatten(2))
        return h + self.mlp(self.mlp_norm(h))


def judge(h: Tensor, table: Tensor, labels: Tensor) -> Tensor:
    """The sum of the cross-entropies of rows."""
    return F.cross_entropy((h @ table.t()).float(), labels, reduction="sum")


class Llama(nn.Module):
    """The model with its loss: the mean cross-entropy. pieces: of the tokens, whose logits exist one after the other."""

    def __init__(self, c: Config, pieces: int = 1) -> None:
        super().__init__()
        self.c, self.pieces, self.judge = c, pieces, judge
        self.embed = nn.Embedding(c.vocab, c.embed)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.embed, eps=c.norm_eps)
        self.head = None if c.tied else nn.Linear(c.embed, c.vocab, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        pairs = torch.arange(0, self.c.head_dim, 2, dtype=torch.float32, device=ids.device) / self.c.head_dim
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] / self.c.rope_base**pairs
        h, cos, sin = self.embed(ids), angles.cos(), angles.sin()
        for layer in self.layers:
            h = layer(h, cos, sin)
        h, labels = self.norm(h).flatten(0, 1), labels.flatten()
        table = (self.embed if self.head is None else self.head).weight
        if self.pieces == 1:
            return self.judge(h, table, labels) / labels.numel()
        parts = zip(h.chunk(self.pieces), labels.chunk(self.pieces), strict=True)
        return sum(checkpoint(self.judge, x, table, y, use_reentrant=False) for x, y in parts) / labels.numel()

    def compile_parts(self) -> None:
        """Compile a layer, once for all of them, and the loss."""
        for layer in self.layers:
            layer.compile()
        self.judge = torch.compile(judge)


def matrices(params: Any) -> dict[str, Tensor]:
    """This library's parameters under the names and in the shapes of `Llama`."""
    from fmegatron import tree

    found = {}
    for path, x in tree.to_paths(params).items():
        if not path.startswith("layers."):
            found["embed.weight" if path == "embed.token" else path] = x
            continue
        _, first, place = path.split(".", 2)
        for i, own in enumerate(x):
            name, w = in_layer(place, own)
            found[f"layers.{int(first) + i}.{name}"] = w
    return found


def in_layer(place: str, x: Tensor) -> tuple[str, Tensor]:
    """A parameter of a layer as `Block` has it."""
    if place.startswith("attn."):
        return f"{place[5:]}.weight", (x.flatten(0, 1) if place == "attn.o" else x.flatten(1)).t()
    if place.startswith("mlp.experts."):
        return place.replace("experts.", ""), x
    if place == "mlp.router.weight":
        return place, x.t()
    return (f"{place}.weight", x.t()) if place.startswith("mlp.") else (place, x)


def fill(own: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy values into tensors of the same names; all of them must be there."""
    assert own.keys() == values.keys(), f"names differ: {sorted(own.keys() ^ values.keys())}"
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(values[name])
