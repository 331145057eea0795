"""Draw the next token from logits: temperature, top-k, top-p, and noise that depends on (key, row, token) only.

    likeliest of  logits / temperature + Gumbel noise      is a draw from  softmax(logits / temperature)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fmegatron import random


def draw(logits: Tensor, key: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """[batch, vocab] -> int64 [batch]. Temperature 0 takes the likeliest.

    top_k keeps the k likeliest tokens, then top_p the fewest likeliest that hold that probability together.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[..., -1:]
        logits = torch.where(logits < least, torch.full_like(logits, -torch.inf), logits)
    if top_p is not None and top_p < 1:
        logits = nucleus(logits, top_p)
    rows, vocab = logits.shape
    index = torch.arange(rows * vocab, device=logits.device).reshape(rows, vocab)
    noise = -(-(random.uniform(key, index) + 2.0**-33).log()).log()
    return (logits + noise).argmax(-1)


def nucleus(logits: Tensor, p: float) -> Tensor:
    """-inf outside of the fewest likeliest tokens whose probabilities add up to p; the likeliest always stays."""
    values, order = logits.sort(-1, descending=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    kept = torch.where((before >= p) & (before > 0), torch.full_like(values, -torch.inf), values)
    return torch.zeros_like(logits).scatter(-1, order, kept)


def check(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """ValueError where a setting makes no sense."""
    if temperature < 0:
        raise ValueError(f"temperature {temperature}: 0 takes the likeliest token, above it is randomness; not below")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k}: at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: above 0 and at most 1")
