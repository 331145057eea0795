"""Softmax attention by torch's own kernels, chosen by what a query sees and what is done to its scores.

    sdpa     causal, or everything                                  scaled_dot_product_attention
    varlen   documents one after the other, windows                 varlen_attn: no mask at all (CUDA, fp16 and bf16)
    flex     soft-cap, sinks, windows, documents, any order          flex_attention over the blocks that are seen
    dense    where none of these runs                                scores in memory, in torch's operators

A sink is one more logit in the softmax: the result without it times sigmoid(logsumexp - sink).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Choice = Literal["sdpa", "varlen", "flex", "dense"]


@dataclass(frozen=True)
class Seen:
    """Query i sees key j where they are of one document, place_i - place_j < window, and (causal) place_j <= place_i.

    place, document: int64 [batch, seq] of queries and keys alike; None: the index, and one document.
    """

    causal: bool = True
    window: int | None = None
    place: Tensor | None = None
    document: Tensor | None = None

    def mask(self, length: int, device: torch.device) -> Tensor:
        """Bool [batch or 1, 1, seq, seq]."""
        at = torch.arange(length, device=device)[None] if self.place is None else self.place
        back = at[:, :, None] - at[:, None, :]
        seen = back >= 0 if self.causal else torch.ones_like(back, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (back.abs() < self.window)
        if self.document is not None:
            seen = seen & (self.document[:, :, None] == self.document[:, None, :])
        return seen[:, None]


def choose(q: Tensor, seen: Seen, softcap: float | None, sink: Tensor | None) -> Choice:
    """The kernel for queries [batch, seq, heads, hd]; varlen_attn wants documents whose tokens are neighbours: ids are read."""
    plain = seen.window is None and seen.place is None and seen.document is None
    if softcap is None and sink is None and plain:
        return "sdpa"
    narrow = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    if softcap is None and sink is None and seen.place is None and q.is_cuda and narrow and windows_of_varlen():
        if seen.document is None or not comes_back(seen.document):
            return "varlen"
    return "flex" if q.is_cuda and q.dtype != torch.float64 and q.shape[-1] >= 16 else "dense"


def comes_back(document: Tensor) -> bool:
    """Whether in some row [batch, seq] a document's tokens are not neighbours: it has more runs than it has ids."""
    ids = document.sort(-1).values
    return bool(((document.diff(dim=-1) != 0).sum(-1) > (ids.diff(dim=-1) != 0).sum(-1)).any())


def windows_of_varlen() -> bool:
    """Whether this torch has varlen_attn with windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "window_size" in inspect.signature(varlen_attn).parameters


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Seen, *, scale: float, softcap: float | None = None, sink: Tensor | None = None,
    by: Choice | None = None,
) -> Tensor:
    """Attention of q [batch, seq, heads, hd] over k and v [batch, seq, heads or fewer, hd], sink [heads]: q's shape.

    by: the kernel, in place of what `choose` says.
    """
    by = by or choose(q, seen, softcap, sink)
    if by == "varlen":
        return varlen(q, k, v, seen, scale)
    several = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if by == "sdpa":
        y = F.scaled_dot_product_attention(q, k, v, is_causal=seen.causal, scale=scale, enable_gqa=several)
    elif by == "flex":
        y = flex(q, k, v, seen, scale, softcap, sink)
    else:
        y = dense(q, k, v, seen, scale, softcap, sink)
    return y.transpose(1, 2)


def dense(
    q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float, softcap: float | None, sink: Tensor | None
) -> Tensor:
    """The definition, of [batch, heads, seq, hd]; scores at least fp32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    s = s if softcap is None else softcap * (s / softcap).tanh()
    s = torch.where(seen.mask(q.shape[2], q.device), s, float("-inf"))
    if sink is not None:
        s = torch.cat((s, sink.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)), -1)
    return s.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v


def flex(
    q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float, softcap: float | None, sink: Tensor | None
) -> Tensor:
    """flex_attention of [batch, heads, seq, hd], compiled on CUDA; on CPU torch runs it eager, and forward only."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    place, document, length = seen.place, seen.document, q.shape[2]

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        back = i - j if place is None else place[b, i] - place[b, j]
        mask = back >= 0 if seen.causal else back == back
        if seen.window is not None:
            mask = mask & (back < seen.window) & (back > -seen.window)
        return mask if document is None else mask & (document[b, i] == document[b, j])

    def capped(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s if softcap is None else softcap * torch.tanh(s / softcap)

    batch = q.shape[0] if place is not None or document is not None else None
    blocks = create_block_mask(sees, batch, None, length, length, device=q.device)
    run: Any = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention
    options = {"enable_gqa": q.shape[1] != k.shape[1], "return_aux": AuxRequest(lse=True)}
    y, aux = run(q, k, v, score_mod=capped, block_mask=blocks, scale=scale, **options)
    return y if sink is None else (y * torch.sigmoid(aux.lse - sink[:, None])[..., None]).to(y.dtype)


def varlen(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float, kernel: Callable[..., Any] | None = None) -> Tensor:
    """varlen_attn of [batch, seq, heads, hd], each row's documents one after the other: one that comes back would be two, so
    `choose` does not ask it then. kernel: in place of torch's."""
    run: Any = kernel
    if run is None:
        from torch.nn.attention.varlen import varlen_attn

        run = varlen_attn
    batch, length = q.shape[:2]
    document = seen.document if seen.document is not None else q.new_zeros(1, 1, dtype=torch.int64)
    document = document.expand(batch, length)
    new = torch.ones_like(document, dtype=torch.bool)
    new[:, 1:] = document[:, 1:] != document[:, :-1]
    starts = new.reshape(-1).nonzero().reshape(-1)
    offsets = torch.cat((starts, starts.new_tensor([batch * length]))).to(torch.int32)
    longest = int(offsets.diff().max())
    left = -1 if seen.window is None else seen.window - 1
    right = 0 if seen.causal else left
    several: dict[str, bool] = {}
    if q.shape[2] != k.shape[2]:
        if "enable_gqa" in inspect.signature(run).parameters:
            several["enable_gqa"] = True
        else:  # torch 2.11: as many key and value heads as query heads
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    y: Tensor = run(*(x.flatten(0, 1) for x in (q, k, v)), offsets, offsets, longest, longest, scale=scale,
                    window_size=(left, right), **several)
    return y.unflatten(0, (batch, length))
