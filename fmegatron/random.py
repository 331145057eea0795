"""Random values by counter: a value depends on (key, index) and on nothing else.

There is no generator that advances. A key is one int64; `fold_in` makes new keys from it; the value at a global index is
a hash of both. So a shard, a slice, a microbatch or a rank of a virtual mesh draws the very bits that the whole would:

    k = fold_in(key(0), "layers.mlp.up")
    normal(k, index)[a:b] == normal(k, index[a:b])                # bit for bit

    key  [ b: 31 bits | a: 32 bits ]       index  [ hi: 32 bits | lo: 32 bits ]
    bits = fold( fold( fold(lo ^ a) ^ b ^ hi ) ^ a )              # fold: times an odd constant, high half onto low half

Keys and indices broadcast, so a coordinate per dim costs what its own shape costs until the last one:
`bits(fold_in(fold_in(k, sample[:, None, None]), position[:, :, None]), feature)`. Integers stay below 2**63 in int64,
so eager, Inductor, vmap, CPU and CUDA agree on every bit; `normal` takes a logarithm and a cosine in fp64, which agree on
one device in eager and to the last few bits elsewhere.

Why not the usual x ^= x >> 15 after each product: Inductor inlines a value once for each of its uses, so a chain of n such
steps costs it 2**n. Six of them took 8 s to compile and a keyed dropout two minutes; three are as good here.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
ROOT = 0x517CC1B727220A95  # the parent of all keys: 2**64 / pi, halved
LOW, HIGH = 0x3C6EF3729E3779B9, 0x78DDE6E4DAA66D2B  # relatives of a key that fold_in draws from
ODD = (0x5BD1E995, 0x7FEB352D, 0x6C8E9CF5)  # multipliers below 2**31 with their highest bit set


def fold(word: Tensor, odd: int) -> Tensor:
    """Multiply a word of 32 bits, fresh and ours to overwrite, and fold the 63 bits of the product onto 32."""
    product = word.mul_(odd)
    return product.bitwise_xor_(product >> 31).bitwise_and_(WORD)


def key(seed: int | Tensor) -> Tensor:
    """The key of a seed: 0-D int64 (a tensor of seeds gives keys of its shape)."""
    seeds = seed if isinstance(seed, Tensor) else torch.tensor(_int64(seed))
    return fold_in(torch.full_like(seeds, ROOT, dtype=torch.int64), seeds)


def fold_in(key: Tensor, data: int | str | Tensor) -> Tensor:
    """A new key from a key and a name or number (int64 tensors broadcast).

    Two words of bits under two relatives of the key: equal for two data by chance alone, once in about 2**60 pairs; the
    order of folds matters.
    """
    if isinstance(data, str):
        data = int.from_bytes(hashlib.blake2b(data.encode(), digest_size=8).digest(), "little")
    index = data.to(torch.int64) if isinstance(data, Tensor) else key.new_full((), _int64(data))
    return ((bits(key ^ HIGH, index) & 0x7FFFFFFF) << 32) | bits(key ^ LOW, index)


def bits(key: Tensor, index: Tensor) -> Tensor:
    """32 random bits per index: int64 in [0, 2**32), of the shape to which key and index broadcast."""
    a, b = key & WORD, key >> 32
    word = fold((index & WORD) ^ a, ODD[0])
    word = fold(word ^ (b ^ ((index >> 32) & WORD)), ODD[1])
    return fold(word ^ a, ODD[2])


def uniform(key: Tensor, index: Tensor) -> Tensor:
    """Uniform fp64 in [0, 1), multiples of 2**-32."""
    return bits(key, index).double() * 2.0**-32


def normal(key: Tensor, index: Tensor) -> Tensor:
    """Standard normal fp64 by Box and Muller's transform of two draws; below 6.77 in size."""
    radius = (uniform(fold_in(key, 1), index) + 2.0**-33).log().mul(-2).sqrt()
    return radius * (uniform(fold_in(key, 2), index) * (2 * math.pi)).cos()


def dropout(x: Tensor, rate: float, key: Tensor, index: Tensor | tuple[Tensor, ...]) -> Tensor:
    """x with each element zero with probability `rate`, the others divided by 1 - rate.

    index: int64, broadcastable to x; or a tuple of coordinates, each broadcastable to x, hashed one after the other.
    The tuple is the faster form where a coordinate is smaller than x: its part of the hash is not repeated.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout rate {rate}: must be at least 0 and below 1")
    if rate == 0:
        return x
    *outer, last = index if isinstance(index, tuple) else (index,)
    for coordinate in outer:
        key = fold_in(key, coordinate)
    keep = bits(key, last) >= round(rate * 2**32)
    return torch.where(keep, x * (1 / (1 - rate)), 0.0)


def _int64(number: int) -> int:
    """The int64 with the low 64 bits of a Python integer."""
    return (number + 2**63) % 2**64 - 2**63
