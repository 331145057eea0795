"""Packed sequences: offsets of documents (`cu_seqlens`) to a document id for each token, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def from_cu_seqlens(cu_seqlens: Tensor, length: int) -> Tensor:
    """Document ids 0, 1, ... of `length` tokens, int64 [length], from offsets [documents + 1] that lead from 0 to `length`.

    Raises ValueError where they do not.
    """
    offsets = cu_seqlens.tolist()
    if not offsets or offsets[0] != 0:
        raise ValueError(f"cu_seqlens starts at {offsets[0] if offsets else 'nothing'}: it starts at 0")
    if any(a > b for a, b in zip(offsets, offsets[1:], strict=False)):
        raise ValueError("cu_seqlens must not decrease: it is the running sum of the documents' lengths")
    if offsets[-1] != length:
        raise ValueError(f"cu_seqlens ends at {offsets[-1]}, the sequence has {length} tokens: make the pads a document")
    index = torch.arange(length, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)


def to_cu_seqlens(documents: Tensor) -> Tensor:
    """Offsets of the runs of equal ids in [length], int64 [documents + 1]: the inverse of `from_cu_seqlens`."""
    starts = torch.nonzero(documents[1:] != documents[:-1]).flatten() + 1
    ends = documents.new_tensor([0]), starts, documents.new_tensor([len(documents)])
    return torch.cat(ends)
