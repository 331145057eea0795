"""What every participant trains: shapes, one set of weights, one batch, the optimizer's numbers. numpy only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

ADAMW = MappingProxyType({"lr": 1e-3, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "decay": 0.1, "clip": 1.0})


@dataclass(frozen=True)
class Shape:
    """A Llama and a batch of it."""

    layers: int
    embed: int
    heads: int
    kv: int
    mlp: int
    vocab: int
    batch: int
    seq: int

    @property
    def hd(self) -> int:
        """Features of a head."""
        return self.embed // self.heads

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(w.size for w in weights(replace(self, layers=0)).values()) + self.layers * (
            self.embed * (2 * self.heads * self.hd + 2 * self.kv * self.hd + 3 * self.mlp + 2)
        )


SHAPES = MappingProxyType(
    {
        "small": Shape(layers=4, embed=256, heads=8, kv=4, mlp=704, vocab=8192, batch=4, seq=256),
        "wide": Shape(layers=2, embed=128, heads=4, kv=2, mlp=352, vocab=65536, batch=2, seq=256),
        # A CPU without bf16 arithmetic runs torch's own bf16 products tens of times slower: fewer tokens for all
        "small bf16": Shape(layers=4, embed=256, heads=8, kv=4, mlp=704, vocab=8192, batch=1, seq=128),
        "wide bf16": Shape(layers=2, embed=128, heads=4, kv=2, mlp=352, vocab=32768, batch=1, seq=64),
        "tiny": Shape(layers=2, embed=32, heads=4, kv=2, mlp=64, vocab=256, batch=2, seq=32),
    }
)


def shape_of(name: str, dtype: str) -> Shape:
    """The shape that a dtype is run with."""
    return SHAPES.get(f"{name} {dtype}", SHAPES[name])


def weights(shape: Shape) -> dict[str, np.ndarray]:
    """fp32 weights by name; those of layers are stacked on a leading dim, matrices are [in, out], tables [vocab, embed]."""
    draw = np.random.default_rng(0)
    e, q, k, m, n = shape.embed, shape.heads * shape.hd, shape.kv * shape.hd, shape.mlp, shape.layers
    sizes = {"q": (n, e, q), "k": (n, e, k), "v": (n, e, k), "o": (n, q, e)}
    sizes |= {"gate": (n, e, m), "up": (n, e, m), "down": (n, m, e), "embed": (shape.vocab, e), "head": (shape.vocab, e)}
    out = {name: draw.standard_normal(size, dtype=np.float32) * np.float32(0.02) for name, size in sizes.items()}
    norms = {"attn_norm": (n, e), "mlp_norm": (n, e), "norm": (e,)}
    return out | {name: np.ones(size, np.float32) for name, size in norms.items()}


def tokens(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and the labels of each position, int64 [batch, seq]."""
    text = np.random.default_rng(1).integers(0, shape.vocab, (shape.batch, shape.seq + 1))
    return text[:, :-1].copy(), text[:, 1:].copy()
