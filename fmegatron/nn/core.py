"""The core of attention on one device: which keys a query sees, scores, and the softmax over them.

    q [batch heads seq hd]   k, v [batch kv kv_seq hd]   scores [batch heads seq kv_seq]

Query head j uses key/value head j // (heads / kv). Torch's fused kernel runs unless a soft-cap, a sink or attention dropout
asks for the scores themselves, or a torch.func transform is active: the kernel has no rule for vmap and no second derivatives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fmegatron import random
from fmegatron.transforms import inside_transform

if TYPE_CHECKING:
    from fmegatron.nn.attention import Attention


PIECE = 512  # queries whose scores are looked at together


def see(here: Tensor, there: Tensor, window: int | None, causal: bool = True) -> Tensor:
    """Which keys at `there` [batch, kv_seq] the queries at `here` [batch, seq] see: bool [batch, seq, kv_seq]."""
    back = here[:, :, None] - there[:, None, :]
    mask = back >= 0 if causal else back == back
    return mask if window is None else mask & (back < window) & (back > -window)


def scores(attn: Attention, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled and capped products, at least fp32, -inf where the mask (broadcast to the scores) is False."""
    s = grouped(q / attn.undo, k.transpose(-1, -2))
    s = s.to(torch.promote_types(q.dtype, torch.float32)) * (attn.scale * attn.undo)
    if attn.softcap is not None:
        s = attn.softcap * (s / attn.softcap).tanh()
    return s if mask is None else torch.where(mask, s, torch.full_like(s, float("-inf")))


def largest_score(attn: Attention, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """The largest score of q [batch, seq, heads, hd] and the keys k that they see, [heads]: what `attend` would put through
    the softmax. A piece of the queries at a time, so that few scores are alive."""
    q, k, found = q.transpose(1, 2), k.transpose(1, 2), []
    for start in range(0, q.shape[2], PIECE):
        stop = min(start + PIECE, q.shape[2])
        here, keys = mask, k
        if mask is not None and mask.shape[2] > 1:
            here = mask[:, :, start:stop]
        elif mask is None and attn.causal:
            place, keys = torch.arange(stop, device=q.device)[None], k[:, :, :stop]
            here = see(place[:, start:], place, None)[:, None]
        found.append(scores(attn, q[:, :, start:stop], keys, here).amax((0, 2, 3)))
    return torch.stack(found).amax(0)


def clip_factors(largest: Tensor, kv: int, threshold: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Factors on query heads and on key heads that bring each head's largest score [..., heads] to `threshold` (QK-Clip).

    g = min(1, threshold / largest) for each head, alpha of it by the queries; with fewer key heads a key head shrinks by its
    smallest g ** (1 - alpha), and the queries by what is left of each g. Returns [..., heads], [..., kv].
    """
    g = torch.where(largest > threshold, threshold / largest, torch.ones_like(largest))
    shared = g.unflatten(-1, (kv, -1)).amin(-1) ** (1 - alpha)
    return g / shared.repeat_interleave(g.shape[-1] // kv, -1), shared


def grouped(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product of [batch, heads, m, k] and [batch, fewer heads, k, n], a head of b for neighbouring heads of a."""
    if a.shape[1] == b.shape[1]:
        return a @ b
    by_group = a.unflatten(1, (b.shape[1], -1))
    return (by_group.flatten(2, 3) @ b).unflatten(2, by_group.shape[2:4]).flatten(1, 2)


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

    mask: bool, broadcast to [batch, heads, seq, kv_seq]; None is causal (or everything, where `attn` is not causal).
    rows, columns: keys and indices of dropout. Returns q's shape.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if attn.fused and rows is None and not inside_transform():
        several = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=attn.causal and mask is None, scale=attn.scale, enable_gqa=several
        )
        return y.transpose(1, 2)
    if mask is None and attn.causal:
        place = torch.arange(q.shape[2], device=q.device)[None]
        mask = see(place, place, None)[:, None]
    s = scores(attn, q, k, mask)
    if attn.sink is not None:
        extra = torch.zeros_like(s[..., :1])
        extra = extra if sink is None else extra + sink[:, None, None]
        s = torch.cat((s, extra), -1)
    weights = s.softmax(-1)
    if attn.sink is not None:
        weights = weights[..., :-1]
    if rows is not None and columns is not None:
        weights = random.dropout(weights, attn.dropout, rows, columns)
    return grouped(weights.to(v.dtype), v).transpose(1, 2)
