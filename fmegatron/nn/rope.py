"""Rotary positions: each pair of features is turned by position * frequency.

    frequency_i = base^(-2i/d) / interpolation        a pair is (x_i, x_{i + d/2}), or (x_{2i}, x_{2i+1}) if interleaved

Source: Su et al. 2021 (arXiv 2104.09864); the scaling of long contexts is Llama 3.1's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow frequencies are divided by `factor`, fast ones kept, those between blended."""

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    context: int = 8192  # of the training before it


@dataclass(frozen=True)
class Rope:
    """One table of rotations; `fraction` of the head's features turn, the others pass through."""

    base: float = 10000.0
    fraction: float = 1.0
    interleaved: bool = False
    interpolation: float = 1.0  # divides the positions
    scaling: Llama3Scaling | None = None


def frequencies(rope: Rope, hd: int, like: Tensor) -> Tensor:
    """Radians per position, fp32 [rotated features / 2], on the device of `like`; computed in fp64, as in `tables`."""
    dims = int(hd * rope.fraction)
    f = 1.0 / rope.base ** (torch.arange(0, dims, 2, device=like.device).double() / dims)
    s = rope.scaling
    if s is not None:
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
    return angles.cos().float(), angles.sin().float()


def rotate(rope: Rope, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the features of [batch, seq, heads, hd]; in fp32, back in x's dtype."""
    dims = 2 * cos.shape[-1]
    turned, rest = (x, None) if dims == x.shape[-1] else (x[..., :dims], x[..., dims:])
    pair = -1 if rope.interleaved else -2
    a, b = turned.unflatten(-1, (-1, 2) if rope.interleaved else (2, -1)).unbind(pair)
    y = torch.stack((a * cos - b * sin, b * cos + a * sin), pair).flatten(-2).to(x.dtype)
    return y if rest is None else torch.cat((y, rest), -1)
