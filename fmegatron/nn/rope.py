"""Rotary positions: each pair of features is turned by position * frequency.

    frequency_i = base^(-2i/d) / interpolation        a pair is (x_i, x_{i + d/2}), or (x_{2i}, x_{2i+1}) if interleaved

Source: Su et al. 2021 (arXiv 2104.09864); the scaling of long contexts is Llama 3.1's, or YaRN (arXiv 2309.00071).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmegatron.kernels import rope as kernel
from fmegatron.kernels.launch import Form


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow frequencies are divided by `factor`, fast ones kept, those between blended."""

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    context: int = 8192  # of the training before it


@dataclass(frozen=True)
class Yarn:
    """Pairs that turn less than `slow` times within `context` are divided by `factor`, those beyond `fast` kept.

    cos and sin are multiplied by `magnitude`: m(mscale) / m(mscale_all), where m(k) = 0.1 k ln(factor) + 1.
    """

    factor: float = 40.0
    context: int = 4096  # of the training before it
    fast: float = 32.0
    slow: float = 1.0
    mscale: float | None = None  # None: 1, and mscale_all does not divide
    mscale_all: float | None = None
    attention_factor: float | None = None  # in place of the magnitude
    truncate: bool = True  # the range between slow and fast to whole pairs

    def m(self, k: float) -> float:
        """0.1 k ln(factor) + 1, the growth of the scores' scale."""
        return 1.0 if self.factor <= 1 else 0.1 * k * math.log(self.factor) + 1.0

    @property
    def magnitude(self) -> float:
        """The factor of cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        return self.m(self.mscale) / self.m(self.mscale_all) if self.mscale and self.mscale_all else self.m(1.0)

    def blend(self, f: Tensor, base: float, dims: int) -> Tensor:
        """The frequencies f [dims / 2], fast ones as they are, slow ones divided, a line between."""

        def pair(turns: float) -> float:
            return dims * math.log(self.context / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair(self.fast), pair(self.slow)
        low, high = (math.floor(low), math.ceil(high)) if self.truncate else (low, high)
        low, high = max(low, 0), min(high, dims - 1)
        high = high + 0.001 if low == high else high
        slow = ((torch.arange(dims // 2, device=f.device).double() - low) / (high - low)).clamp(0, 1)
        return f / self.factor * slow + f * (1 - slow)


Scaling = Llama3Scaling | Yarn


def scaling_of(table: Mapping[str, Any]) -> Scaling:
    """The scaling with these fields: YaRN where one of them is a field that only YaRN has."""
    known, given = set(Llama3Scaling.__dataclass_fields__), set(table)
    return Llama3Scaling(**table) if given <= known else Yarn(**table)


@dataclass(frozen=True)
class Rope:
    """One table of rotations; `fraction` of the head's features turn, the others pass through."""

    base: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False
    interpolation: float = 1.0  # divides the positions
    scaling: Scaling | None = None


def frequencies(rope: Rope, hd: int, like: Tensor) -> Tensor:
    """Radians per position, fp32 [rotated features / 2], on the device of `like`; computed in fp64, as in `tables`."""
    dims = int(hd * rope.fraction)
    f = 1.0 / rope.base ** (torch.arange(0, dims, 2, device=like.device).double() / dims)
    s = rope.scaling
    if isinstance(s, Yarn):
        f = s.blend(f, rope.base, dims)
    elif s is not None:
        wavelength = 2 * math.pi / f
        smooth = (s.context / wavelength - s.low) / (s.high - s.low)
        blend = (1 - smooth) * f / s.factor + smooth * f
        f = torch.where(wavelength > s.context / s.low, f / s.factor, torch.where(wavelength < s.context / s.high, f, blend))
    return (f / rope.interpolation).float()


def tables(rope: Rope, hd: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [batch, seq, 1, pairs], for positions [batch, seq].

    Taken in fp64 and rounded: eager, compiled and other devices' fp32 cosines differ in the last bit, these do not.
    """
    angles = (positions.float()[..., None, None] * frequencies(rope, hd, positions)).double()
    size = rope.scaling.magnitude if isinstance(rope.scaling, Yarn) else 1.0
    return (angles.cos() * size).float(), (angles.sin() * size).float()


def rotate(rope: Rope, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the features of [batch, seq, heads, hd]; in fp32, back in x's dtype."""
    return kernel.reference(x, cos, sin, rope.interleaved)


def rotate_both(rope: Rope, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """`rotate` of queries and keys, by one kernel where the form is one."""
    return kernel.rotate(q, k, cos, sin, interleaved=rope.interleaved, form=form)
