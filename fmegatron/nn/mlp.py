"""The feed-forward block: up, activation, down; gated ones multiply two projections.

gelu, gelu_tanh, relu2, quick_gelu     down(act(up x))
swiglu, geglu, geglu_tanh, quick_geglu     down(act(gate x) * up x)

With a limit c and an offset o a gated one is act(min(g, c)) * (clamp(u, -c, c) + o): gpt-oss has quick_geglu, 7 and 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from fmegatron.nn.param import Init, Param, bias

if TYPE_CHECKING:
    from fmegatron.sharding import Sharding

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
}
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "quick_geglu": "quick_gelu"}


@dataclass(frozen=True)
class Mlp:
    """What the block computes."""

    kind: str = "swiglu"
    bias: bool = False
    limit: float | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not self.gated and (self.limit is not None or self.offset):
            raise ValueError(f"mlp {self.kind!r} has no gate, so no glu_limit and no glu_offset")
        if self.kind not in ACTIVATIONS and self.kind not in GATED:
            raise ValueError(f"mlp {self.kind!r} is unknown: use one of {', '.join([*GATED, *ACTIVATIONS])}")

    @property
    def gated(self) -> bool:
        """Whether two projections are multiplied."""
        return self.kind in GATED


def declare(mlp: Mlp, inner: Init, outer: Init, width: str = "mlp") -> dict[str, Param]:
    """Its weights: `inner` fills the projections up, `outer` the one back into the residual stream; width: a dim's name."""
    weights = {"gate": Param(f"embed {width}", inner)} if mlp.gated else {}
    weights |= {"up": Param(f"embed {width}", inner), "down": Param(f"{width} embed", outer)}
    if mlp.bias:
        weights |= {"gate_bias": bias(width)} if mlp.gated else {}
        weights |= {"up_bias": bias(width), "down_bias": bias("embed")}
    return weights


def hidden(mlp: Mlp, gate: Tensor | None, up: Tensor) -> Tensor:
    """What the last projection reads, of any shape; gate: of gated kinds."""
    act = ACTIVATIONS[GATED.get(mlp.kind, mlp.kind)]
    if gate is None:
        return act(up)
    if mlp.limit is not None:
        gate, up = gate.clamp(max=mlp.limit), up.clamp(-mlp.limit, mlp.limit)
    return act(gate) * (up + mlp.offset if mlp.offset else up)


def apply(sh: Sharding, mlp: Mlp, p: dict[str, Any], x: Tensor, width: str = "mlp") -> Tensor:
    """[batch, seq, embed] -> [batch, seq, embed]."""
    inner = f"batch seq {width}"
    if mlp.gated:
        pattern = f"batch seq embed, (embed {width} | embed {width}) -> ({inner} | {inner})"
        gate, up = sh.einsum(pattern, x, p["gate"], p["up"])
        if mlp.bias:
            gate, up = gate + p["gate_bias"], up + p["up_bias"]
        h = sh.remat("mlp_activation", partial(hidden, mlp), gate, up)
    else:
        up = sh.einsum(f"batch seq embed, embed {width} -> {inner}", x, p["up"])
        h = sh.remat("mlp_activation", partial(hidden, mlp, None), up + p["up_bias"] if mlp.bias else up)
    y = sh.einsum(f"{inner}, {width} embed -> batch seq embed", h, p["down"])
    return y + p["down_bias"] if mlp.bias else y
