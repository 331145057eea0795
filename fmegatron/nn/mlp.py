"""The feed-forward block: up, activation, down; gated ones multiply two projections.

gelu, gelu_tanh, relu2, quick_gelu     down(act(up x))
swiglu, geglu, geglu_tanh, quick_geglu     down(act(gate x) * up x)

With a limit c and an offset o a gated one is act(min(g, c)) * (clamp(u, -c, c) + o): gpt-oss has quick_geglu, 7 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fmegatron.kernels import activation
from fmegatron.kernels.activation import ACTIVATIONS
from fmegatron.kernels.launch import Form
from fmegatron.nn.param import Init, Param, bias

if TYPE_CHECKING:
    from fmegatron.sharding import Sharding

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


def hidden(mlp: Mlp, gate: Tensor | None, up: Tensor, form: Form = "reference", weights: Tensor | None = None) -> Tensor:
    """What the last projection reads, of any shape; gate: of gated kinds. weights [...]: factors of rows."""
    act = GATED.get(mlp.kind, mlp.kind)
    if gate is None:
        return activation.activate(up, None, weights, act=act, form=form)
    return activation.glu(gate, up, None, None, weights, act=act, clamp=mlp.limit, offset=mlp.offset, form=form)


def apply(sh: Sharding, mlp: Mlp, p: dict[str, Any], x: Tensor, width: str = "mlp") -> Tensor:
    """[batch, seq, embed] -> [batch, seq, embed]."""
    inner, form = f"batch seq {width}", sh.kernels
    if mlp.gated:
        pattern = f"batch seq embed, (embed {width} | embed {width}) -> ({inner} | {inner})"
        gate, up = sh.einsum(pattern, x, p["gate"], p["up"])
        if mlp.bias:
            gate, up = gate + p["gate_bias"], up + p["up_bias"]
        h = sh.remat("mlp_activation", partial(hidden, mlp, form=form), gate, up)
    else:
        up = sh.einsum(f"batch seq embed, embed {width} -> {inner}", x, p["up"])
        h = sh.remat("mlp_activation", partial(hidden, mlp, None, form=form), up + p["up_bias"] if mlp.bias else up)
    y = sh.einsum(f"{inner}, {width} embed -> batch seq embed", h, p["down"])
    return y + p["down_bias"] if mlp.bias else y
