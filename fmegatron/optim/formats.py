"""How optimizer state lies in memory in fewer bits than it is computed in, and how it is rounded there.

    bf16       the upper half of an fp32
    fp16, fp8  (e4m3) a block of 32 neighbours along the last dim times one power of two, which brings the largest of them
               to [2^14, 2^15) or [2^7, 2^8); its exponent is an int8 beside the block
    root       the root is what is stored: a mean of squares has twice the octaves of a mean

Rounding is stochastic: to one of the two neighbours, with a mean that is the value itself. A mean with a small weight on the
new value would otherwise stand still, each step's change below half of the last bit. The draws are `random.bits` by (key,
leaf, global index), so they are the same bits on every mesh.

    Split      a parameter as bf16 and the 16 bits that the nearest bf16 lacks to the fp32 it is: exact both ways
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fmegatron.kernels.adamw import Kind
from fmegatron.kernels.bits import same_bits
from fmegatron.tree import Tree

BLOCK = 32  # neighbours with one exponent
SHIFTS = (-113, 120)  # exponents that a block may have; below 2^-113 values lose bits


@dataclass(frozen=True)
class Format:
    """One array a suffix: `store(x, bits)` makes them, `load` turns them to what is computed with."""

    suffixes: tuple[str, ...]
    new: tuple[Callable[[Tensor], Tensor], ...]  # zeros, from the parameter
    load: Callable[..., Tensor]
    store: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    draws: bool = True  # whether it looks at the bits
    kind: Kind = "same"  # its name in kernels/adamw.py

    def names(self, slot: str) -> list[str]:
        """The arrays of a slot."""
        return [slot + suffix for suffix in self.suffixes]

    def loaded(self, arrays: list[list[Tensor]]) -> list[Tensor]:
        """The values of all leaves, from lists of their arrays."""
        return [self.load(*own) for own in zip(*arrays, strict=True)]


SAME = Format(("",), (torch.zeros_like,), lambda x: x, lambda x, bits: (x,), draws=False)  # the parameter's dtype


# -- rounding ----------------------------------------------------------------------------------------------------------
def round_stochastically(x: Tensor, bits: Tensor, mantissa: int, least: int = -126) -> Tensor:
    """fp32 to one of the two neighbours with so many bits of mantissa, evenly spaced below 2^least; exact ones stay.

    bits: int64 below 2^32, or those bits as int32, broadcast to x: at random. A value goes up with the probability that makes
    it right on average.
    """
    drop = 23 - mantissa
    word = same_bits(x, torch.int32)
    normal = same_bits((word + (bits & ((1 << drop) - 1)).to(torch.int32)) & -(1 << drop), torch.float32)
    if least <= -126:
        return normal
    steps = x.abs() * 2.0 ** (mantissa - least)
    whole = steps.floor()
    up = (steps - whole) > (bits & 0xFFFFFF).float() * 2.0**-24
    small = torch.copysign((whole + up) * 2.0 ** (least - mantissa), x)
    return torch.where(x.abs() < 2.0**least, small, normal)


def bf16() -> Format:
    """bfloat16, which has fp32's range."""

    def store(x: Tensor, bits: Tensor) -> tuple[Tensor, ...]:
        return (round_stochastically(x.float(), bits, 7).to(torch.bfloat16),)

    return Format(("",), (lambda p: torch.zeros_like(p, dtype=torch.bfloat16),), lambda x: x.float(), store, kind="bf16")


def blocks(n: int) -> int:
    """The number of blocks in a last dim of n."""
    return -(-n // BLOCK)


def in_blocks(dtype: torch.dtype, mantissa: int, least: int, top: int, root: bool) -> Format:
    """A dtype with one exponent a block, whose largest element is brought to [2^top, 2^(top + 1))."""
    stored = torch.uint8 if dtype.itemsize == 1 else dtype  # few operations know fp8

    def per_block(p: Tensor) -> Tensor:
        return p.new_zeros((*p.shape[:-1], blocks(p.shape[-1]) if p.dim() else 1), dtype=torch.int8)

    def spread(shift: Tensor, x: Tensor) -> Tensor:
        """2^shift for each element of x [..., n]."""
        factor = same_bits((shift.to(torch.int32) + 127) << 23, torch.float32)
        return factor.repeat_interleave(BLOCK, -1)[..., : x.shape[-1]]

    def load(codes: Tensor, shift: Tensor) -> Tensor:
        x = (same_bits(codes, dtype) if stored != dtype else codes).float()
        x = (x[None] * spread(-shift, x[None]))[0] if x.dim() == 0 else x * spread(-shift, x)
        return x * x if root else x

    def store(x: Tensor, bits: Tensor) -> tuple[Tensor, ...]:
        scalar = x.dim() == 0
        x = x.float()[None] if scalar else x.float()
        x = x.sqrt() if root else x
        n = x.shape[-1]
        size = x.abs()
        whole = F.pad(size, (0, -n % BLOCK)) if n % BLOCK else size  # a pad of nothing asks a traced tensor for its rows
        largest = whole.reshape(*x.shape[:-1], blocks(n), BLOCK).amax(-1)
        octave = (same_bits(largest, torch.int32) >> 23) - 127
        shift = (top - octave).clamp(*SHIFTS)
        y = round_stochastically(x * spread(shift, x), bits, mantissa, least).to(dtype)
        codes = same_bits(y, torch.uint8) if stored != dtype else y
        return codes[0] if scalar else codes, shift.to(torch.int8)

    kind: Kind = "fp16" if dtype == torch.float16 else "fp8 root" if root else "fp8"
    return Format(("", "_shift"), (lambda p: torch.zeros_like(p, dtype=stored), per_block), load, store, kind=kind)


def format_of(name: str, second: bool = False) -> Format | None:
    """The format of a name: fp32 (None), bf16, fp16, fp8; second: of a mean of squares."""
    if name not in ("fp32", "bf16", "fp16", "fp8"):
        raise ValueError(f"moments in {name!r}: must be fp32, bf16, fp16 or fp8")
    if name == "fp32":
        return None
    if name == "bf16":
        return bf16()
    half = name == "fp16"
    return in_blocks(torch.float16, 10, -14, 14, False) if half else in_blocks(torch.float8_e4m3fn, 3, -6, 7, second)


# -- parameters in two halves ------------------------------------------------------------------------------------------
class Split(NamedTuple):
    """Trees of parameters: bf16, and int16 that make them fp32."""

    high: Tree
    low: Tree


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> the nearest bf16 (of two, the one further from zero), and what it lacks, int16. The inverse of `join`."""
    word = same_bits(x, torch.int32)
    low = word.to(torch.int16)  # the lower half, as a signed number
    high = (word - low) >> 16
    return same_bits(high.to(torch.int16), torch.bfloat16), low


def join(high: Tensor, low: Tensor) -> Tensor:
    """bf16 and what it lacks -> fp32, every bit of it. The inverse of `split`."""
    return same_bits((same_bits(high, torch.int16).to(torch.int32) << 16) + low, torch.float32)


HALVES = Format(("", "_low"), (), join, lambda x, bits: split(x), draws=False)
