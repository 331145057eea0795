"""Cross-entropy over a vocabulary that may lie on many ranks: full logits are on none of them.

    ce = logsumexp(x) - (1 - a) x[label] - a mean(x)        a: label smoothing, the mean over the true vocabulary
    z  = c logsumexp(x)^2                                   c: keeps the logits' scale in place (PaLM)

Sums over tokens, each times its weight; the caller divides by the global sum of weights. Pads are -inf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmegatron.kernels import cross_entropy as kernel
from fmegatron.sharding import Size
from fmegatron.transforms import compiling

if TYPE_CHECKING:
    from fmegatron.sharding import Sharding


@dataclass(frozen=True)
class Loss:
    """How logits are made and judged."""

    smoothing: float = 0.0
    z: float = 0.0
    softcap: float | None = None  # logits become cap * tanh(logits / cap)
    multiplier: float = 1.0

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that `cross_entropy` returns."""
        return ("ce", "z") if self.z else ("ce",)


LOGITS = "batch loss_seq vocab"


def logits(sh: Sharding, loss: Loss, h: Tensor, table: Tensor) -> Tensor:
    """[batch, loss_seq, embed], [vocab, embed] -> [batch, loss_seq, vocab] in fp32 at least, pads -inf."""
    x = sh.einsum("batch loss_seq embed, vocab embed -> batch loss_seq vocab", h, table)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if loss.multiplier != 1.0:
        x = x * loss.multiplier
    if loss.softcap is not None:
        x = loss.softcap * (x / loss.softcap).tanh()
    if isinstance(sh.sizes["vocab"], Size):  # it may have pads
        x = torch.where(sh.index("vocab", LOGITS, x) < sh.true_size("vocab"), x, torch.full_like(x, float("-inf")))
    return x


def cross_entropy(sh: Sharding, loss: Loss, h: Tensor, table: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Local sums of the terms over the tokens of h [batch, loss_seq, embed]; labels and weights [batch, loss_seq]."""
    if sh.kernels == "triton":
        return fused(sh, loss, h, table, labels, weights)
    x = logits(sh, loss, h, table)
    lse = sh.reduce(f"{LOGITS} -> batch loss_seq", x, "logsumexp")
    ce = lse - (1 - loss.smoothing) * pick(sh, x, labels)
    if loss.smoothing:
        true, real = sh.true_size("vocab"), x
        if isinstance(sh.sizes["vocab"], Size):
            real = torch.where(sh.index("vocab", LOGITS, x) < true, x, torch.zeros_like(x))
        ce = ce - loss.smoothing / true * sh.reduce(f"{LOGITS} -> batch loss_seq", real, "sum")
    terms = {"ce": sh.total(ce * weights, "batch loss_seq")}
    return terms | ({"z": sh.total(loss.z * lse.square() * weights, "batch loss_seq")} if loss.z else {})


def fused(sh: Sharding, loss: Loss, h: Tensor, table: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """`cross_entropy` in one pass over the logits each way, which stay in the dtype of h: no fp32 copy of them is made."""
    x = sh.einsum("batch loss_seq embed, vocab embed -> batch loss_seq vocab", h, table)
    first, true = sh.index("vocab", LOGITS, x)[0], sh.true_size("vocab")
    mine = sh.align(labels, "batch loss_seq", within=LOGITS) - first
    real = true - first if isinstance(sh.sizes["vocab"], Size) else None
    local = kernel.stats(x, mine, real, multiplier=loss.multiplier, softcap=loss.softcap, form="triton")
    ops = ("logsumexp", "sum", "sum")  # of this rank's columns -> of all
    lse, picked, total = (sh.reduce(f"{LOGITS} -> batch loss_seq", y[..., None], op) for y, op in zip(local, ops, strict=True))
    ce = lse - (1 - loss.smoothing) * picked - loss.smoothing / true * total
    terms = {"ce": sh.total(ce * weights, "batch loss_seq")}
    return terms | ({"z": sh.total(loss.z * lse.square() * weights, "batch loss_seq")} if loss.z else {})


def pick(sh: Sharding, x: Tensor, labels: Tensor) -> Tensor:
    """x[label] of each token, whichever rank has it: [batch, loss_seq]."""
    vocab = sh.index("vocab", LOGITS, x)
    labels = sh.align(labels, "batch loss_seq", within=LOGITS)  # nothing moves, unless vocab took an axis that batch has too
    if compiling():  # fuses into the passes of the logsumexp, forward and backward
        mine = torch.where(labels[..., None] == vocab, x, torch.zeros_like(x))
    elif not sh.placement(LOGITS).of("vocab"):
        mine = x.gather(-1, labels[..., None])  # an error where a label is beyond the vocabulary
    else:
        row = labels - vocab[0]
        here = (row >= 0) & (row < vocab.shape[0])
        mine = x.gather(-1, row.clamp(0, vocab.shape[0] - 1)[..., None])
        mine = torch.where(here[..., None], mine, torch.zeros_like(mine))
    return sh.reduce(f"{LOGITS} -> batch loss_seq", mine, "sum")
