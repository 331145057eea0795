"""Keys and values of sequences that grow, in pages of a common pool, and attention of one new token a sequence over them.

    pool [pages, page, kv, hd]      slot of a token: page number * page + place in it
    table [batch, most]             the pages of each sequence, in order; lengths [batch]: its tokens so far, the new one too

Decoding reads every key and value once, whatever the number of query heads: a program takes all query heads of one
key/value head and a share of the pages, with a running softmax; shares are joined by their logsumexps. No gradients.
Sources: Kwon et al. 2023 (arXiv 2309.06180); Dao et al. 2023, Flash-Decoding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmegatron.kernels.launch import Form, Jit, power, programs, wide

if TYPE_CHECKING:
    import triton.language as tl


def append(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor, *, form: Form = "reference") -> None:
    """Write tokens k and v [tokens, kv, hd] to slots [tokens] of the pools, in place; a negative slot is passed over."""
    if form == "reference":
        kept = slots >= 0
        for pool, new in ((keys, k), (values, v)):
            pool.view(-1, *pool.shape[2:])[slots[kept]] = new[kept].to(pool.dtype)
        return
    assert keys.is_contiguous() and values.is_contiguous(), "a pool is contiguous"
    n = keys.shape[2] * keys.shape[3]
    _append[(len(slots),)](keys, values, k.contiguous(), v.contiguous(), slots.contiguous(), n, N=power(n))


def decode(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, *, scale: float, window: int | None = None,
    softcap: float | None = None, sink: Tensor | None = None, form: Form = "reference",
) -> Tensor:
    """Attention of q [batch, heads, hd] over the pages of its sequence: [batch, heads, hd]; zeros where the length is 0.

    window: keys seen, the newest first. sink: [heads], one more logit in the softmax.
    """
    if form == "reference":
        return reference(q, keys, values, table, lengths, scale=scale, window=window, softcap=softcap, sink=sink)
    batch, heads, hd = q.shape
    kv, page, most = keys.shape[2], keys.shape[1], table.shape[1]
    shares = max(1, min(most, programs(q) // max(1, batch * kv)))
    each = -(-most // shares)
    y = q.new_empty(batch, heads, shares, hd, dtype=torch.promote_types(q.dtype, torch.float32))
    lse = y.new_empty(batch, heads, shares)
    _decode[batch, kv, shares](
        q.contiguous(), keys, values, table.contiguous(), lengths.contiguous(), y, lse, heads // kv, hd, page, most, each,
        *keys.stride()[:3], *values.stride()[:3], scale, softcap, window,
        WIDE=wide(q), G=power(heads // kv), P=power(page), D=power(hd))
    return joined(y, lse, sink).to(q.dtype)


def joined(y: Tensor, lse: Tensor, sink: Tensor | None) -> Tensor:
    """Parts y [.., shares, hd] of a softmax over parts of the keys, with their logsumexps [.., shares], as a whole."""
    every = lse if sink is None else torch.cat((lse, sink.to(lse.dtype)[:, None].expand(*lse.shape[:-1], 1)), -1)
    share = (lse - every.logsumexp(-1, keepdim=True)).exp()
    seen = (lse > float("-inf")) | lse.isnan()
    return torch.where(seen[..., None], y * share[..., None], torch.zeros_like(y)).sum(-2)


def reference(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, *, scale: float, window: int | None,
    softcap: float | None, sink: Tensor | None,
) -> Tensor:
    """`decode` in torch, all pages of all sequences side by side."""
    group = q.shape[1] // keys.shape[2]
    k, v = (pool[table.long()].flatten(1, 2).repeat_interleave(group, 2) for pool in (keys, values))
    s = torch.einsum("bhd,bshd->bhs", q, k).to(torch.promote_types(q.dtype, torch.float32)) * scale
    s = s if softcap is None else softcap * (s / softcap).tanh()
    place = torch.arange(s.shape[-1], device=q.device)
    seen = place < lengths[:, None]
    seen = seen if window is None else seen & (place >= lengths[:, None] - window)
    s = torch.where(seen[:, None], s, float("-inf"))
    if sink is not None:
        s = torch.cat((s, sink.to(s.dtype)[:, None].expand(*s.shape[:2], 1)), -1)
    weights = s.softmax(-1)[..., : k.shape[1]].nan_to_num() if sink is None else s.softmax(-1)[..., :-1]
    return torch.einsum("bhs,bshd->bhd", weights.to(v.dtype), torch.where(seen[..., None, None], v, 0.0))


# -- triton ---------------------------------------------------------------------------------------------------------
@Jit
def _append(keys, values, k, v, slots, n, N: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    col = tl.arange(0, N)
    inside = (col < n) & (slot >= 0)
    a = tl.load(k + token * n + col, mask=inside, other=0.0)
    b = tl.load(v + token * n + col, mask=inside, other=0.0)
    tl.store(keys + slot * n + col, a.to(keys.dtype.element_ty), mask=inside)
    tl.store(values + slot * n + col, b.to(values.dtype.element_ty), mask=inside)


@Jit
def _decode(q, keys, values, table, lengths, y, lse, group, hd, page, most, each,
            k_page, k_place, k_head, v_page, v_place, v_head,
            scale: tl.constexpr, softcap: tl.constexpr, window: tl.constexpr,
            WIDE: tl.constexpr, G: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    batch = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1)
    share = tl.program_id(2)
    head = tl.arange(0, G)
    feature = tl.arange(0, D)
    place = tl.arange(0, P)
    length = tl.load(lengths + batch).to(tl.int32)
    mine = (head[:, None] < group) & (feature[None, :] < hd)
    at = (batch * tl.num_programs(1) + kv) * group + head
    x = tl.load(q + at[:, None] * hd + feature[None, :], mask=mine, other=0.0).to(WIDE) * scale
    peak = tl.full([G], float("-inf"), WIDE)
    mass = tl.zeros([G], WIDE)
    total = tl.zeros([G, D], WIDE)
    first = share * each
    if window is not None:
        first = tl.maximum(first, (length - window) // page)
    for i in range(first, tl.minimum(tl.minimum(share * each + each, most), (length + page - 1) // page)):
        number = tl.load(table + batch * most + i).to(tl.int64)
        token = i * page + place
        seen = (place < page) & (token < length)
        if window is not None:
            seen = seen & (token >= length - window)
        inside = seen[:, None] & (feature[None, :] < hd)
        at_k = number * k_page + place[:, None] * k_place + kv * k_head + feature[None, :]
        k = tl.load(keys + at_k, mask=inside, other=0.0)
        s = tl.sum(x[:, None, :] * k.to(WIDE)[None, :, :], 2)
        if softcap is not None:
            s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
        s = tl.where(seen[None, :], s, float("-inf"))
        new = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        before = tl.exp(peak - base)
        p = tl.exp(s - base[:, None])
        at_v = number * v_page + place[:, None] * v_place + kv * v_head + feature[None, :]
        v = tl.load(values + at_v, mask=inside, other=0.0)
        mass = mass * before + tl.sum(p, 1)
        total = total * before[:, None] + tl.sum(p[:, :, None] * v.to(WIDE)[None, :, :], 1)
        peak = new
    out = at * tl.num_programs(2) + share
    some = tl.where(mass == 0.0, 1.0, mass)
    tl.store(y + out[:, None] * hd + feature[None, :], total / some[:, None], mask=mine)
    tl.store(lse + out, tl.where(mass == 0.0, float("-inf"), peak + tl.log(some)), mask=head < group)
