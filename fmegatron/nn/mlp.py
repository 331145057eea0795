"""The feed-forward block: up, activation, down; gated ones multiply two projections.

gelu, gelu_tanh, relu2, quick_gelu     down(act(up x))
swiglu, geglu, geglu_tanh              down(act(gate x) * up x)
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
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Mlp:
    """What the block computes."""

    kind: str = "swiglu"
    bias: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ACTIVATIONS and self.kind not in GATED:
            raise ValueError(f"mlp {self.kind!r} is unknown: use one of {', '.join([*GATED, *ACTIVATIONS])}")

    @property
    def gated(self) -> bool:
        """Whether two projections are multiplied."""
        return self.kind in GATED


def declare(mlp: Mlp, inner: Init, outer: Init) -> dict[str, Param]:
    """Its weights: `inner` fills the projections up, `outer` the one back into the residual stream."""
    weights = {"gate": Param("embed mlp", inner)} if mlp.gated else {}
    weights |= {"up": Param("embed mlp", inner), "down": Param("mlp embed", outer)}
    if mlp.bias:
        weights |= {"gate_bias": bias("mlp")} if mlp.gated else {}
        weights |= {"up_bias": bias("mlp"), "down_bias": bias("embed")}
    return weights


def apply(sh: Sharding, mlp: Mlp, p: dict[str, Any], x: Tensor) -> Tensor:
    """[batch, seq, embed] -> [batch, seq, embed]."""
    act = ACTIVATIONS[GATED.get(mlp.kind, mlp.kind)]
    if mlp.gated:
        pattern = "batch seq embed, (embed mlp | embed mlp) -> (batch seq mlp | batch seq mlp)"
        gate, up = sh.einsum(pattern, x, p["gate"], p["up"])
        if mlp.bias:
            gate, up = gate + p["gate_bias"], up + p["up_bias"]
        hidden = sh.remat("mlp_activation", lambda gate, up: act(gate) * up, gate, up)
    else:
        up = sh.einsum("batch seq embed, embed mlp -> batch seq mlp", x, p["up"])
        hidden = sh.remat("mlp_activation", act, up + p["up_bias"] if mlp.bias else up)
    y = sh.einsum("batch seq mlp, mlp embed -> batch seq embed", hidden, p["down"])
    return y + p["down_bias"] if mlp.bias else y
