"""Keys of [fp8]: which products are computed in few bits, and how; config/__init__.py makes a group of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fmegatron.toml import option


@dataclass(frozen=True)
class Fp8:
    """Matrix products of 8 or 4 bits: see docs/fp8.md."""

    recipe: str | None = option(None, "tensorwise, delayed, rowwise, blockwise, mxfp8, nvfp4; none: all in training.dtype")
    match: tuple[str, ...] = option(("layers.*",), "patterns of the paths of weights that it is for")
    others: dict[str, Any] = option({}, 'pattern = "recipe" or "off" for some of them, looked at first')
    first: int = option(0, "first layers that stay in training.dtype", at_least=0)
    last: int = option(0, "last layers that do", at_least=0)
    format: Literal["e4m3", "hybrid"] | None = option(None, "hybrid: gradients in e5m2; none: as the recipe has it")
    block: int | None = option(None, "elements to a scale, where the recipe has blocks; none: its own", at_least=1)
    pow2: bool = option(False, "scales are powers of two")
    margin: int = option(0, "powers of two left free above the largest value", at_least=0)
    wgrad: bool = option(True, "weights' gradients too are products of few bits")
    history: int = option(1, "of delayed: steps whose largest values are remembered", at_least=1)
    algorithm: Literal["max", "most_recent"] = option("most_recent", "of delayed: which of them sets the scale")
    gather: bool = option(True, "tensorwise, delayed, blockwise: shards of weights are gathered in 8 bits")
