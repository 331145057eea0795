"""What attention has seen: for each layer the keys and values of earlier tokens, as plain tensors.

    keys, values    [batch, capacity, kv, hd]                      filled up to `length`
    latent, key     [batch, capacity, kv_lora], [.., rope_hd]      of latent attention, whatever its heads

A layer's attention hands what is new to `v["cache"]` and gets all of it back, the earlier first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Cache:
    """One layer's, written in place: room for `capacity` tokens is taken at once."""

    capacity: int
    length: int = 0
    held: tuple[Tensor, ...] = ()

    def __call__(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Add tensors of new tokens [batch, new, ...]; returns all so far."""
        if not self.held:
            self.held = tuple(x.new_zeros(x.shape[0], self.capacity, *x.shape[2:]) for x in new)
        stop = self.length + new[0].shape[1]
        if stop > self.capacity:
            raise ValueError(f"the cache has room for {self.capacity} tokens and is asked to hold {stop}")
        for room, x in zip(self.held, new, strict=True):
            room[:, self.length : stop] = x
        self.length = stop
        return tuple(room[:, :stop] for room in self.held)


def order(length: int, stop: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(places of the new tokens [1, new], of all tokens so far [1, stop]), int64."""
    every = torch.arange(stop, device=like.device)[None]
    return every[:, length:], every
