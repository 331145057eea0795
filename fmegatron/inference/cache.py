"""What attention has seen: for each layer the keys and values of earlier tokens, as plain tensors.

    keys, values  [batch, capacity, kv, hd]       filled up to `length`

A layer's attention hands its new keys and values to `v["cache"]` and gets all of them back, the earlier ones first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Cache:
    """One layer's keys and values, written in place: room for `capacity` tokens is taken at once."""

    capacity: int
    length: int = 0
    keys: Tensor | None = None
    values: Tensor | None = None

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of new tokens [batch, new, kv, hd]; returns all so far."""
        if self.keys is None or self.values is None:
            room = (keys.shape[0], self.capacity, *keys.shape[2:])
            self.keys, self.values = keys.new_zeros(room), values.new_zeros(room)
        stop = self.length + keys.shape[1]
        if stop > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens and is asked to hold {stop}")
        self.keys[:, self.length : stop] = keys
        self.values[:, self.length : stop] = values
        self.length = stop
        return self.keys[:, :stop], self.values[:, :stop]


def order(length: int, stop: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(places of the new tokens [1, new], of all tokens so far [1, stop]), int64."""
    every = torch.arange(stop, device=like.device)[None]
    return every[:, length:], every
