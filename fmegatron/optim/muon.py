"""Muon: momentum, made orthogonal, for the hidden matrices; AdamW for embeddings, head, norms and biases.

    mu = m mu + (1 - m) g,   x = m mu + (1 - m) g  (Nesterov's; without: mu)
    x = x / |x|,  5 times:   A = x x^T,   x = a x + (b A + c A^2) x         singular values go to about 1
    p = p - rate (scale x + weight_decay p)

Newton-Schulz runs on whole matrices, batched over all of one shape and shared out over the ranks (`over.whole`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fmegatron import tree
from fmegatron.nn import param
from fmegatron.nn.core import clip_factors
from fmegatron.nn.param import Matrix
from fmegatron.optim.adam import Moving, adamw
from fmegatron.optim.base import LOCAL, Over, Transform, Tree, Views, chain
from fmegatron.optim.decay import Mask, add_decayed_weights
from fmegatron.optim.elementwise import Elementwise, Slots, elementwise
from fmegatron.optim.groups import multi
from fmegatron.optim.rate import scale_by_learning_rate
from fmegatron.optim.schedules import schedule

QUINTIC = (3.4445, -4.7750, 2.0315)
Scale = Literal["spectral", "unit_rms_norm", "shape_scaling"]


def muon(
    learning_rate: Moving, momentum: float = 0.95, nesterov: bool = True, weight_decay: Moving = 0.1,
    scale: Scale = "spectral", scale_factor: float = 0.2, steps: int = 5, dtype: torch.dtype | None = None,
    betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, adam_lr: float = 1.0,
    declare: Tree = None, mask: Mask = None,
) -> Transform:
    """Muon (Jordan et al. 2024), with Megatron-LM's scales; spectral with 0.2 matches AdamW's step (Liu et al. 2025).

    declare: the model's declarations, which say what is a hidden matrix and which dims are its inputs; None: leaves of two
    dims, layers not counted, without embed, head, token or position in their path. dtype: of Newton-Schulz; None: the
    updates'. betas, eps, adam_lr: of AdamW for the rest; adam_lr is a factor on the rate.
    """
    rate = schedule(learning_rate)
    matrices = chain(scale_by_mean(momentum, nesterov), orthogonalize(steps, scale, scale_factor, dtype, declare),
                     add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate))
    rest = adamw(lambda count: rate(count) * adam_lr, betas, eps, weight_decay, mask)

    def label(path: str, leaf: Tensor) -> str:
        return "muon" if view_of(declare, path, leaf) else "adamw"

    return multi({"muon": matrices, "adamw": rest}, label)


def view_of(declare: Tree, path: str, leaf: Tensor) -> Matrix | None:
    """The hidden matrices of a leaf, by its declaration or, without, by its path and dims; None for the rest."""
    if declare is not None:
        declared = tree.to_paths(declare)[path]
        return None if param.table(declared) else param.matrix(declared)
    parts = path.split(".")
    batch = int("layers" in parts)
    hidden = leaf.dim() - batch >= 2 and not {"embed", "head", "token", "position"} & set(parts)
    return Matrix(batch, 1) if hidden else None


def scale_by_mean(momentum: float = 0.95, nesterov: bool = True) -> Transform:
    """The running mean of updates; Nesterov's is one step ahead. State: {"mu"}."""
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum {momentum}: must be at least 0 and below 1")

    def leaf(u: Any, p: Any, slots: Slots, s: dict[str, Any]) -> tuple[Any, Slots]:
        mu = slots["mu"].lerp(u, 1 - momentum)
        return u.lerp(mu, momentum) if nesterov else mu, {"mu": mu}

    return elementwise(Elementwise(leaf, ("mu",)))


def orthogonalize(
    steps: int = 5, scale: Scale = "spectral", scale_factor: float = 1.0, dtype: torch.dtype | None = None,
    declare: Tree = None,
) -> Transform:
    """Newton-Schulz on every leaf, scaled by its matrices' shape; every leaf must be matrices. No state."""
    by = scale_of(scale)
    if steps < 1:
        raise ValueError(f"muon steps = {steps}: must be at least 1, of Newton-Schulz")

    def fn(x: Tensor) -> Tensor:
        return newton_schulz(x, steps, dtype) * (scale_factor * by(x.shape[1], x.shape[2]))

    def update(grads: Tree, state: Tree, params: Tree, *, over: Over = LOCAL) -> tuple[Tree, Tree]:
        views: Views = {path: view for path, leaf in tree.to_paths(params).items() if (view := view_of(declare, path, leaf))}
        return over.whole(fn, grads, views), state

    return Transform(lambda params: {}, update)


def scale_of(scale: Scale) -> Callable[[int, int], float]:
    """(rows, columns) -> factor, for matrices of inputs by outputs."""
    scales: dict[str, Callable[[int, int], float]] = {
        "spectral": lambda rows, columns: math.sqrt(max(rows, columns)),
        "unit_rms_norm": lambda rows, columns: math.sqrt(columns / rows),
        "shape_scaling": lambda rows, columns: math.sqrt(max(1.0, columns / rows)),
    }
    if scale not in scales:
        raise ValueError(f"muon scale {scale!r}: must be one of {', '.join(scales)}")
    return scales[scale]


def newton_schulz(
    x: Tensor, steps: int = 5, dtype: torch.dtype | None = None, coefficients: tuple[float, float, float] = QUINTIC,
    eps: float = 1e-7,
) -> Tensor:
    """[n, rows, columns]: each matrix with its singular values near 1, by the quintic iteration; zeros stay zeros."""
    a, b, c = coefficients
    y = x.to(dtype or x.dtype)
    wide = y if y.shape[-2] <= y.shape[-1] else y.mT
    wide = wide / torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide if y.shape[-2] <= y.shape[-1] else wide.mT).to(x.dtype)


def qk_clip(q: Tensor, k: Tensor, max_logits: Tensor, threshold: float = 100.0, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """Query and key weights whose largest logits are at most `threshold` again (QK-Clip, Kimi K2 2025); else unchanged.

    q [..., embed, heads, hd], k [..., embed, kv, hd], max_logits [..., heads]: the largest seen logit of each head, with its
    scale. A head's logits shrink by g = min(1, threshold / max), alpha of it by the queries; with fewer key heads than query
    heads a key head shrinks by its smallest g ** (1 - alpha), and the queries by what is left of each g.
    """
    own, shared = clip_factors(max_logits.to(q.dtype), k.shape[-2], threshold, alpha)
    return q * own[..., None, :, None], k * shared[..., None, :, None]
