"""From tokens to vectors: a lookup in a table sharded over the vocabulary, and learned positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fmegatron.nn.param import Init, Param

if TYPE_CHECKING:
    from fmegatron.sharding import Sharding


def declare(init: Init, learned_positions: bool = False) -> dict[str, Param]:
    """The tables."""
    tables = {"token": Param("vocab embed", init)}
    return tables | ({"position": Param("position embed", init)} if learned_positions else {})


def apply(sh: Sharding, p: dict[str, Tensor], tokens: Tensor, positions: Tensor, multiplier: float = 1.0) -> Tensor:
    """[batch, seq] -> [batch, seq, embed]; the multiplier is rounded to the table's dtype, as Gemma has it."""
    h = sh.lookup("batch seq, vocab embed -> batch seq embed", tokens, p["token"])
    if multiplier != 1.0:
        h = h * h.new_full((), multiplier)
    if "position" in p:
        h = h + sh.lookup("batch seq, position embed -> batch seq embed", positions.expand(tokens.shape), p["position"])
    return h
